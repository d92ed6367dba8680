"""The order in which a search tries combinations, on landscapes that are known."""

from __future__ import annotations

import itertools
import math

import pytest

from tunekit.passes.tradeoff import GAIN, Found, Point, Rungs, Tradeoff

ERRORS = ((0.0, 0.2, 0.5, 2.0), (0.0, 0.1, 0.3), (0.0, 0.05, 0.2, 0.4, 0.9, 3.0))
COSTS = ((1.0, 0.8, 0.6, 0.4), (1.0, 0.5, 0.99), (1.0, 0.8, 0.6, 0.4, 0.3, 0.2))


def truth(point: Point, wrong: float = 1.0) -> Found:
    error = sum(axis[choice] for axis, choice in zip(ERRORS, point, strict=True))
    if sum(choice > 0 for choice in point) > 1:
        error *= wrong
    cost = math.prod(axis[choice] for axis, choice in zip(COSTS, point, strict=True))
    return Found({"psnr": error}, 100 * cost)


def explore(limit: float, wrong: float = 1.0, broken: frozenset[Point] = frozenset()) -> Tradeoff:
    search = Tradeoff([len(axis) for axis in ERRORS], {"psnr": limit})
    while (point := search.next()) is not None:
        assert point not in search.known
        search.known[point] = None if point in broken else truth(point, wrong)
    return search


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.45, 0.8, 1.3, 10.0])
@pytest.mark.parametrize("wrong", [0.7, 1.0, 1.4])
def test_it_finds_what_trying_everything_finds(limit: float, wrong: float) -> None:
    search = explore(limit, wrong)
    every = itertools.product(*(range(len(axis)) for axis in ERRORS))
    cheapest = min(found.cost for point in every if (found := truth(point, wrong)).keeps(search.limits))
    best = search.known[search.best()[0]]
    assert best is not None and best.cost <= cheapest / (1 - GAIN)
    assert len(search.known) <= 25  # of 72


def test_what_is_bolder_than_a_miss_is_not_tried() -> None:
    tried = explore(0.1).known
    assert (0, 0, 3) in tried and (0, 0, 4) not in tried and (0, 0, 5) not in tried


def test_long_ladders_take_few_tries_and_what_lies_between_is_expected() -> None:
    search = Tradeoff([17, 2], {"psnr": 0.5})

    def truly(point: Point) -> Found:
        return Found({"psnr": (point[0] / 16) ** 2 + 0.1 * point[1]}, 0.9 ** point[0] * 0.5 ** point[1])

    while (point := search.next()) is not None:
        search.known[point] = truly(point)
    assert search.best()[0] == (10, 1)  # which was never tried alone
    assert (10, 0) not in search.known and len(search.known) <= 10


def test_axes_that_gain_nothing_together_are_not_tried_on() -> None:
    """Of a student of few steps fewer calls are no gain: known after one try."""
    search = Tradeoff([4, 4], {"psnr": 1.0})
    while (point := search.next()) is not None:
        costs = [(1.0, 0.5, 0.3, 0.2)[choice] for choice in point]
        search.known[point] = Found({"psnr": 0.1 * sum(point)}, min(costs))
    assert len([point for point in search.known if all(point)]) <= 2


def test_two_that_disturb_each_other_say_nothing_of_a_third() -> None:
    """Cached steps and few steps together draw badly; int8 goes with either all the same."""
    search = Tradeoff([2, 2, 2], {"psnr": 1.0})
    while (point := search.next()) is not None:
        error = 0.4 * point[0] + 0.4 * point[1] + 0.1 * point[2] + 9 * point[0] * point[1]
        search.known[point] = Found({"psnr": error}, 0.5 ** sum(point))
    assert search.best()[0] in ((0, 1, 1), (1, 0, 1))


def test_what_a_part_does_badly_the_whole_does_badly() -> None:
    """Another choice of all axes that went well is no reason to try it."""
    search = Tradeoff([3, 3, 2], {"psnr": 1.0})

    def truly(point: Point) -> Found:
        error = 0.1 * sum(point) + (9 if point[:2] == (2, 2) else 0)
        return Found({"psnr": error}, 0.5 ** sum(point))

    while (point := search.next()) is not None:
        search.known[point] = truly(point)
        if len(search.known) == 4:
            search.known[2, 2, 0] = truly((2, 2, 0))
    assert (2, 2, 1) not in search.known and search.best()[0] in ((2, 1, 1), (1, 2, 1))


def test_what_takes_long_is_tried_when_the_rest_is_combined() -> None:
    """A ladder that trains waits; the others are combined before."""
    ladders = [Rungs(0, (1,), 2), Rungs(0, (2, 3), 1), Rungs(1, (1, 2)), Rungs(2, (1, 2, 3, 4, 5))]
    search = Tradeoff([len(axis) for axis in ERRORS], {"psnr": 10.0}, ladders)
    order = []
    while (point := search.next()) is not None:
        order.append(point)
        search.known[point] = truth(point)
    assert order.index((0, 1, 5)) < order.index((3, 0, 0)) < order.index((3, 1, 5)) < order.index((1, 0, 0))
    between = order[order.index((0, 1, 5)) + 1 : order.index((3, 1, 5))]
    assert not [point for point in between if point[0] and point[1:] != (0, 0)]  # all alone, then combined
    assert search.best()[0] == (3, 1, 5)


def test_what_makes_nothing_cheaper_is_left_out_of_combinations() -> None:
    search = explore(10.0)
    assert search.useless() == [(1, 2)]
    assert not [point for point in search.known if point[1] == 2 and sum(point) > 2]


def test_what_cannot_be_made_is_gone_round() -> None:
    search = explore(10.0, broken=frozenset({(3, 0, 0), (0, 0, 5)}))
    assert not [point for point, found in search.known.items() if found and (point[0] == 3 or point[2] == 5)]
    assert search.best()[0] == (2, 1, 4)
    assert explore(1.0, broken=frozenset({(0, 0, 0)})).best() == []


def test_an_error_that_is_no_number_keeps_no_limit() -> None:
    assert not Found({"psnr": math.nan}, 1.0).keeps({"psnr": 1.0})


def test_the_front() -> None:
    search = explore(10.0)
    front = [search.known[point] for point in search.front("psnr")]
    for one, other in itertools.pairwise(front):
        assert one is not None and other is not None
        assert one.cost < other.cost and one.errors["psnr"] > other.errors["psnr"]
    for found in search.known.values():
        assert found is not None
        assert any(
            o is not None and o.cost <= found.cost and o.errors["psnr"] <= found.errors["psnr"] for o in front
        )


def test_what_fails_on_other_pictures_makes_room_for_what_lies_between() -> None:
    """The cheapest is rejected: not the next that was made is the answer, but what now promises most."""
    search = explore(0.8)
    best = search.best()[0]
    seen = search.known[best]
    assert seen is not None
    search.reject(best, {"psnr": 1.3 * seen.errors["psnr"]})
    more = 0
    while (point := search.next()) is not None:
        search.known[point] = truth(point)
        more += 1
    assert best not in search.best()
    assert more >= 1
    final = search.known[search.best()[0]]
    every = itertools.product(*(range(len(axis)) for axis in ERRORS))
    safe = [found for point in every if 1.3 * (found := truth(point)).errors["psnr"] <= 0.8]
    assert final is not None
    assert final.cost <= min(found.cost for found in safe) / (1 - GAIN)
