"""When a trial is stopped early: a pure function of the curves, which says the same whenever it is asked.

A trial is compared at a step with those before it in the sweep's order, and is decided once all of these have
come so far, or will not. So the outcome does not depend on how many run at once, which is faster, or what was
killed and continued; a trial that is ahead of those before it trains on until they decide.

Median: Golovin et al., Google Vizier, https://doi.org/10.1145/3097983.3098043, section 3.1. Successive
halving with rungs that do not wait for later trials: Li et al., https://arxiv.org/abs/1810.05934.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Curve:
    """What is known of a trial.

    Attributes:
        points: figure by step, the smaller the better.
        ended: whether nothing will come any more.
        last: the step that it would end at; None where that is not known.
    """

    points: Mapping[int, float]
    ended: bool = False
    last: int | None = None


class Rule(Protocol):
    """Decides at a step."""

    def steps(self, curve: Curve) -> list[int]:
        """Steps at which a trial is looked at, as far as it has come."""
        ...

    def fails(self, value: float, before: Sequence[float]) -> bool:
        """Whether a trial with this figure ends, given those of the trials before it."""
        ...


@dataclass(frozen=True)
class Median:
    """See `MedianConfig`."""

    grace: int
    trials: int = 3

    def steps(self, curve: Curve) -> list[int]:
        """See `Rule`."""
        return [step for step in sorted(curve.points) if step >= self.grace and step != curve.last]

    def fails(self, value: float, before: Sequence[float]) -> bool:
        """See `Rule`."""
        return len(before) >= self.trials and value > statistics.median(before)


@dataclass(frozen=True)
class Asha:
    """See `AshaConfig`."""

    grace: int
    factor: int = 3

    def steps(self, curve: Curve) -> list[int]:
        """See `Rule`: of each rung the first step that has a figure."""
        known, found, rung = sorted(curve.points), [], self.grace
        while known and rung <= known[-1]:
            step = next(step for step in known if step >= rung)
            if step != curve.last and step not in found:
                found.append(step)
            rung *= self.factor
        return found

    def fails(self, value: float, before: Sequence[float]) -> bool:
        """See `Rule`."""
        row = sorted([*before, value])
        return value > row[math.ceil(len(row) / self.factor) - 1]


def stopped_at(rule: Rule | None, curves: Sequence[Curve]) -> list[int | None]:
    """For each trial, in order, the step at which it is stopped; None for not, or not yet."""
    found: list[int | None] = []
    for index, curve in enumerate(curves):
        found.append(_verdict(rule, curve, list(zip(curves[:index], found, strict=True))) if rule else None)
    return found


def _verdict(rule: Rule, curve: Curve, before: Sequence[tuple[Curve, int | None]]) -> int | None:
    for step in rule.steps(curve):
        values = []
        for other, end in before:
            if end is not None and step > end:
                continue  # was stopped before
            if (value := other.points.get(step)) is not None:
                values.append(value)
            elif not other.ended and (not other.points or max(other.points) < step):
                return None  # has still to come
        if rule.fails(curve.points[step], values):
            return step
    return None
