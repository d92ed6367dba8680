"""The cheapest choices, against all there are."""

from __future__ import annotations

import itertools
import random

import pytest

from tunekit.memory.choose import choose_units
from tunekit.memory.costs import Costs


def brute_force(states: list[Costs], seconds: list[list[float]], budget: int) -> float | None:
    best = None
    for chosen in itertools.product(range(len(states)), repeat=len(states[0].units)):
        held, fits = 0, True
        for unit, state in enumerate(chosen):
            fits &= held + states[state].need[unit] <= budget
            held += states[state].kept[unit]
        fits &= held + states[0].need[-1] <= budget
        cost = sum(seconds[state][unit] for unit, state in enumerate(chosen))
        if fits and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [2, 3])
def test_the_cheapest_choices_are_made(seed: int, count: int) -> None:
    """Against all of them, with two and with three states per unit."""
    draw = random.Random(seed)
    units = 9 if count == 2 else 7
    kept = [draw.randrange(50, 400) for _ in range(units)]  # in all below 4096: nothing is rounded
    need = [k + draw.randrange(150) for k in [*kept, 50]]
    states, seconds = [Costs([""] * units, kept, need, [], 1, {})], [[0.0] * units]
    for share in (20, 5)[: count - 1]:
        small = [size // draw.randrange(share // 2, share) for size in kept]
        states.append(Costs([""] * units, small, [k + 50 for k in need[:-1]] + need[-1:], [], 1, {}))
        seconds.append([draw.uniform(1, 10) * share for _ in range(units)])
    others = list(zip(states[1:], seconds[1:], strict=True))
    for budget in (sum(kept) // 4, sum(kept) // 2, int(sum(kept) * 0.8), sum(kept) * 2):
        found = choose_units(states[0], others, budget)
        best = brute_force(states, seconds, budget)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            chosen, cost = found
            assert cost == pytest.approx(sum(seconds[state][unit] for unit, state in enumerate(chosen)))
            assert cost == pytest.approx(best, rel=1e-9)
