"""What several steps together cost in quality and time, told from what each costs alone.

A search has a few axes (a share to prune, a flavour of quantization, a number of sampling steps), each a row
of choices from the mildest, which leaves the model as it is, to the boldest. Errors of small and unrelated
changes add up, and factors of speed multiply; so each axis is tried alone, every combination is predicted,
and only those are made that promise to be the best within the limits. What was measured corrects what is
predicted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Point = tuple[int, ...]
"""The number of the choice on each axis; 0 is the mildest."""
GAIN = 0.03
"""Costs that differ by less are not called different: rounds of a measurement differ as much."""


@dataclass(frozen=True)
class Found:
    """What one combination turned out to be.

    Attributes:
        errors: measure -> how far it is from the model as it was; errors add up.
        cost: milliseconds, or bytes.
    """

    errors: Mapping[str, float]
    cost: float

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether no error is above its limit; one that is not finite is."""
        return all(self.errors[name] <= limit for name, limit in limits.items())


@dataclass
class Tradeoff:
    """Says what to try next.

    Attributes:
        choices: how many each axis has.
        limits: measure -> largest error.
        known: what was tried; None for a combination that could not be made.
        margins: measure -> how much larger errors are on pictures that the search did not see; learned from
            combinations that kept the limits, and did not there.
    """

    choices: Sequence[int]
    limits: Mapping[str, float]
    known: dict[Point, Found | None] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    _rejected: set[Point] = field(default_factory=set)

    def reject(self, point: Point, errors: Mapping[str, float]) -> None:
        """A combination that keeps the limits, but not on other pictures, where its errors are these."""
        self._rejected.add(point)
        found = self.known[point]
        assert found is not None
        for name in self.limits:
            if 0 < found.errors[name] < errors[name] < math.inf:
                self.margins[name] = max(self.margins.get(name, 1.0), errors[name] / found.errors[name])

    def next(self) -> Point | None:
        """The combination to try, or None where nothing that is left promises more.

        First nothing at all, then each axis alone from its mildest choice up to the first that misses a
        limit, then combinations from the cheapest that should keep them.
        """
        origin = self._alone(0, 0)
        if origin not in self.known:
            return origin
        if self.known[origin] is None:
            return None
        for axis, count in enumerate(self.choices):
            for choice in range(1, count):
                point = self._alone(axis, choice)
                if point not in self.known:
                    return point
                found = self.known[point]
                if found is not None and not found.keeps(self.limits):
                    break
        return self._promising()

    def predict(self, point: Point) -> Found | None:
        """What a combination should be; None where one of its choices cannot be made, or was not tried."""
        start = self.known.get(self._alone(0, 0))
        if start is None:
            return None
        errors, cost = dict(start.errors), start.cost
        for axis, choice in enumerate(point):
            if not choice:
                continue
            alone = self.known.get(self._alone(axis, choice))
            if alone is None:
                return None
            for name, error in alone.errors.items():
                errors[name] += max(0.0, error - start.errors[name])
            cost *= alone.cost / start.cost if start.cost else 1.0
        return Found(errors, cost)

    def best(self) -> list[Point]:
        """All that keep the limits and were not rejected, the cheapest first."""
        kept = [
            (found.cost, point)
            for point, found in self.known.items()
            if found and found.keeps(self.limits) and point not in self._rejected
        ]
        return [point for _, point in sorted(kept)]

    def useless(self) -> list[tuple[int, int]]:
        """Choices (axis, number) that alone are no cheaper than leaving them out."""
        start = self.known.get(self._alone(0, 0))
        if start is None:
            return []
        return [
            (axis, choice)
            for axis, count in enumerate(self.choices)
            for choice in range(1, count)
            if (alone := self.known.get(self._alone(axis, choice))) and alone.cost > (1 - GAIN) * start.cost
        ]

    def front(self, measure: str) -> list[Point]:
        """Those that nothing beats in both the error of one measure and the cost, the cheapest first."""
        sane = [
            (found.cost, found.errors[measure], point)
            for point, found in self.known.items()
            if found and math.isfinite(found.errors[measure])
        ]
        front: list[Point] = []
        least = math.inf
        for _, error, point in sorted(sane):
            if error < least:
                front.append(point)
                least = error
        return front

    def _promising(self) -> Point | None:
        """The cheapest combination that should keep the limits and be cheaper than what was found."""
        useless = set(self.useless())
        wrong = self._corrections()
        best = self.best()
        bound = self.known[best[0]].cost if best else math.inf  # type: ignore[union-attr]
        found: tuple[float, Point] | None = None
        for point in itertools.product(*(range(count) for count in self.choices)):
            if point in self.known or any((axis, choice) in useless for axis, choice in enumerate(point)):
                continue
            told = self.predict(point)
            if told is None or told.cost >= (1 - GAIN) * bound:
                continue
            errors = {
                name: error * wrong[name] * self.margins.get(name, 1.0) for name, error in told.errors.items()
            }
            if Found(errors, told.cost).keeps(self.limits) and (found is None or told.cost < found[0]):
                found = (told.cost, point)
        return found[1] if found else None

    def _corrections(self) -> dict[str, float]:
        """Measured over predicted errors of the combinations so far, as geometric means."""
        logs: dict[str, list[float]] = {name: [] for name in self.limits}
        for point, found in self.known.items():
            if found is None or sum(choice > 0 for choice in point) < 2:
                continue
            told = self.predict(point)
            for name, list_of in logs.items():
                if told and told.errors[name] > 0 and 0 < found.errors[name] < math.inf:
                    list_of.append(math.log(found.errors[name] / told.errors[name]))
        known = {name: math.exp(_mean(values)) for name, values in logs.items()}
        return dict.fromkeys(self._measures(), 1.0) | known

    def _measures(self) -> set[str]:
        return {name for found in self.known.values() if found for name in found.errors}

    def _alone(self, axis: int, choice: int) -> Point:
        return tuple(choice if index == axis else 0 for index in range(len(self.choices)))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
