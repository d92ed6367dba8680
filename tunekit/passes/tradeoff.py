"""What several steps together cost in quality and time, told from what each costs alone.

A search has a few axes (what to prune, a flavour of quantization, a number of calls), each with choices, of
which the first leaves the model as it is. Choices stand on ladders, from the mildest to the boldest. Errors
of small and unrelated changes add up, and factors of speed multiply; so each ladder is tried alone, and the
boldest rung that keeps enough is found by halving; every combination is predicted, and only those are made
that promise to be the best within the limits. What was measured corrects what is predicted, for the axes
that were measured together. What takes little time is tried, and combined, before what takes much.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Point = tuple[int, ...]
"""The number of the choice on each axis; 0 is the mildest."""
COST = "cost"
GAIN = 0.03
"""Costs that differ by less are not called different: rounds of a measurement differ as much."""


@dataclass(frozen=True)
class Rungs:
    """Choices of one axis, from the mildest to the boldest.

    Attributes:
        axis: its number.
        choices: their numbers.
        effort: of making one; ladders of less are tried first.
    """

    axis: int
    choices: Sequence[int]
    effort: int = 0


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
        ladders: on which they stand; none: each axis is one.
        known: what was tried; None for a combination that could not be made.
        margins: measure -> how much larger errors are on pictures that the search did not see; learned from
            combinations that kept the limits, and did not there.
    """

    choices: Sequence[int]
    limits: Mapping[str, float]
    ladders: Sequence[Rungs] = ()
    known: dict[Point, Found | None] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    _rejected: set[Point] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.ladders:
            self.ladders = [Rungs(axis, range(1, count)) for axis, count in enumerate(self.choices)]

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

        First nothing at all. Then, from the least effort to the most: each ladder alone, by halving, and
        combinations from the cheapest that should keep the limits.
        """
        origin = self._alone(0, 0)
        if origin not in self.known:
            return origin
        if self.known[origin] is None:
            return None
        for effort in sorted({ladder.effort for ladder in self.ladders}):
            for ladder in self.ladders:
                if ladder.effort == effort and (point := self._rung(ladder)) is not None:
                    return point
            if (point := self._promising(effort)) is not None:
                return point
        return None

    def predict(self, point: Point) -> Found | None:
        """What a combination should be; None where one of its choices cannot be made, or nothing is known."""
        start = self.known.get(self._alone(0, 0))
        if start is None:
            return None
        errors, cost = dict(start.errors), start.cost
        for axis, choice in enumerate(point):
            if not choice:
                continue
            alone = self._expected(axis, choice)
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

    def _rung(self, ladder: Rungs) -> Point | None:
        """The rung to try; None where the boldest that gains something and keeps the limits is known."""
        origin = self.known[self._alone(0, 0)]
        start = origin.cost if origin else math.inf
        low, high = 0, len(ladder.choices) + 1
        open_rungs = []
        for rung, choice in enumerate(ladder.choices, start=1):
            point = self._alone(ladder.axis, choice)
            if point not in self.known:
                open_rungs.append((rung, point))
            elif (found := self.known[point]) is not None:
                if found.keeps(self.limits) and found.cost <= (1 - GAIN) * start:
                    low = rung
                else:
                    high = min(high, rung)
        between = [point for rung, point in open_rungs if low < rung < high]
        return between[len(between) // 2] if between else None

    def _expected(self, axis: int, choice: int) -> Found | None:
        """What a choice is alone: as was measured, or between what was measured on its ladder."""
        point = self._alone(axis, choice)
        if point in self.known:
            return self.known[point]
        start = self.known.get(self._alone(0, 0))
        ladder = next((one for one in self.ladders if one.axis == axis and choice in one.choices), None)
        if start is None or ladder is None:
            return None
        below: tuple[int, Found] = (0, start)
        own = list(ladder.choices).index(choice) + 1
        for rung, other in enumerate(ladder.choices, start=1):
            found = self.known.get(self._alone(axis, other))
            if found is None:
                continue
            if rung < own:
                below = (rung, found)
            else:
                share = (own - below[0]) / (rung - below[0])
                errors = {
                    name: error + share**2 * (found.errors[name] - error)
                    for name, error in below[1].errors.items()
                }
                ratio = found.cost / below[1].cost if below[1].cost else 1.0
                return Found(errors, below[1].cost * ratio**share)
        return None  # bolder than all that was tried

    def _promising(self, effort: int) -> Point | None:
        """The cheapest combination that should keep the limits and be cheaper than what was found.

        Args:
            effort: of its choices at most: those of more are combined when all their ladders were tried.
        """
        left_out = set(self.useless())
        for ladder in self.ladders:
            if ladder.effort > effort:
                left_out |= {(ladder.axis, choice) for choice in ladder.choices}
        together = self._together()
        best = self.best()
        bound = self.known[best[0]].cost if best else math.inf  # type: ignore[union-attr]
        found: tuple[float, Point] | None = None
        for point in itertools.product(*(range(count) for count in self.choices)):
            if point in self.known or any((axis, choice) in left_out for axis, choice in enumerate(point)):
                continue
            told = self.predict(point)
            if told is None:
                continue
            wrong = _nearest(together, point)
            cost = told.cost * wrong[COST]
            if cost >= (1 - GAIN) * bound:
                continue
            errors = {
                name: error * wrong.get(name, 1.0) * self.margins.get(name, 1.0)
                for name, error in told.errors.items()
            }
            if Found(errors, cost).keeps(self.limits) and (found is None or cost < found[0]):
                found = (cost, point)
        return found[1] if found else None

    def _together(self) -> dict[Point, dict[str, float]]:
        """Combinations that were measured -> measured over predicted errors and cost."""
        ratios: dict[Point, dict[str, float]] = {}
        for point, found in self.known.items():
            told = self.predict(point) if found is not None and len(_active(point)) > 1 else None
            if told is None or found is None:
                continue
            own = ratios.setdefault(point, {})
            if told.cost > 0 and found.cost > 0:
                own[COST] = found.cost / told.cost
            for name in self.limits:
                if told.errors[name] > 0 and 0 < found.errors[name] < math.inf:
                    own[name] = found.errors[name] / told.errors[name]
        return ratios

    def _alone(self, axis: int, choice: int) -> Point:
        return tuple(choice if index == axis else 0 for index in range(len(self.choices)))


def _active(point: Point) -> frozenset[int]:
    """Axes on which something is done."""
    return frozenset(axis for axis, choice in enumerate(point) if choice)


def _nearest(together: Mapping[Point, Mapping[str, float]], point: Point) -> dict[str, float]:
    """What was found out about the combination with the most of these axes, and of those the nearest.

    Of errors it holds for what is as bold or bolder, and half as much with each choice that is milder. Of
    other axes nothing is concluded: two that disturb each other say nothing of a third.
    """
    axes = _active(point)
    within = [other for other in together if _active(other) <= axes]
    if not within:
        return {COST: 1.0}

    def distance(other: Point) -> tuple[int, int]:
        return -len(_active(other)), sum(abs(point[axis] - other[axis]) for axis in _active(other))

    nearest = min(within, key=distance)
    milder = sum(max(0, nearest[axis] - point[axis]) for axis in _active(nearest))
    found = {COST: 1.0} | {
        name: value if name == COST else value ** (0.5**milder) for name, value in together[nearest].items()
    }
    for other in within:
        if all(point[axis] == other[axis] for axis in _active(other)):  # a part of it: no better as a whole
            for name, value in together[other].items():
                if name != COST:
                    found[name] = max(value, found.get(name, value))
    return found
