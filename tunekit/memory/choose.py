"""Which units save memory, and how: the cheapest choice that fits, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunekit.memory.costs import Costs

LEVELS = 4096
"""Steps of the saved bytes in the dynamic program."""


def choose_units(
    keeping: Costs, others: Sequence[tuple[Costs, Sequence[float]]], budget: int
) -> tuple[list[int], float] | None:
    """The cheapest choice for each unit, so that no moment of the step needs more than `budget`.

    Units in forward order; state: bytes saved by the units so far, rounded down to 1/4096 of all that can
    be. Before unit i the units of 0..i-1 keep what they keep, so a choice for unit i fits if

        kept(0..i-1, all kept) - saved + need(i, choice) <= budget.

    Args:
        keeping: of the trace in which units keep everything: choice 0.
        others: of traces in which all units save something, and what that costs each unit in seconds:
            choices 1, 2 ...
        budget: bytes of tensors.

    Returns:
        The choice for each unit, and their cost in seconds; None if nothing fits.
    """
    count = len(keeping.units)
    saving = [
        [max(0, kept - other) for kept, other in zip(keeping.kept, costs.kept, strict=True)]
        for costs, _ in others
    ]
    most = sum(max((one[unit] for one in saving), default=0) for unit in range(count))
    quantum = max(1, -(-most // (LEVELS - 1)))
    best = np.full(LEVELS, np.inf)
    best[0] = 0.0
    level = np.arange(LEVELS)
    choices = np.zeros((count, LEVELS), dtype=np.int8)
    before = 0
    for unit in range(count):
        room = level * quantum + budget - before
        made = np.where(room >= keeping.need[unit], best, np.inf)
        for number, (costs, seconds) in enumerate(others, start=1):
            step = saving[number - 1][unit] // quantum
            if step == 0:
                continue
            changed = np.where(room >= costs.need[unit], best, np.inf) + seconds[unit]
            shifted = np.full(LEVELS, np.inf)
            shifted[step:] = changed[: LEVELS - step]
            choices[unit] = np.where(shifted < made, number, choices[unit])
            made = np.minimum(made, shifted)
        best = made
        before += keeping.kept[unit]
    end = max(costs.need[count] for costs in (keeping, *(costs for costs, _ in others)))
    best = np.where(level * quantum + budget - before >= end, best, np.inf)
    at = int(best.argmin())
    if not np.isfinite(best[at]):
        return None
    cost, chosen = float(best[at]), []
    for unit in reversed(range(count)):
        number = int(choices[unit, at])
        chosen.append(number)
        if number:
            at -= saving[number - 1][unit] // quantum
    return chosen[::-1], cost
