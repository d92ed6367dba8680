"""What planning needs of a trace: bytes and work of each unit, peaks of each phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunekit.memory.allocator import least_capacity
from tunekit.memory.job import STAYS
from tunekit.memory.plan import Phase
from tunekit.memory.step import StepTrace
from tunekit.memory.trace import ROOM, WORKSPACE, Target, Trace

SECOND_STEP = ("forward", "backward", "optimizer")
MOMENTS = 160

Row = tuple[str, int, int, int, bool, int]
"""Phase, place, flops, traffic, half, how often: `trace.Work`, counted."""


@dataclass(frozen=True)
class Costs:
    """What is kept of a trace of two optimizer steps.

    Attributes:
        units: module paths of the checkpointing units, in order.
        kept: bytes each unit keeps from its forward to its backward pass.
        need: [units + 1] most bytes while the step is at a unit, without what the units before it keep; the
            last one is the loss.
        work: of the second step.
        passes: forward and backward passes in it.
        phases: of "first_step", "step" and "save".
        moments: the second step in `MOMENTS` parts: [phase, ledger at the part's peak].
        weights: unit -> bytes of its frozen weights.
        saving, paged: of the host, see `StepTrace`.
    """

    units: list[str]
    kept: list[int]
    need: list[int]
    work: list[Row]
    passes: int
    phases: dict[str, Phase]
    moments: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    saving: int = 0
    paged: int = 0

    @classmethod
    def load(cls, content: dict[str, Any]) -> Costs:
        """From the fields as they come out of JSON."""
        found = dict(content)
        found["work"] = [tuple(row) for row in content["work"]]
        found["moments"] = [(phase, ledger) for phase, ledger in content["moments"]]
        return cls(**found)


def costs(traced: StepTrace, target: Target, passes: int = 1) -> Costs:
    """Reduces a trace, of as many forward and backward passes per step, to what planning needs."""
    events = traced.trace.events
    count = len(traced.units)
    born: dict[int, tuple[int, int]] = {}
    last = ""
    for event in events:
        if event.phase == "forward" and last != "forward":
            born.clear()  # of several forwards in a step, the last
        last = event.phase
        if event.phase == "forward" and event.size > 0 and event.storage >= 0 and event.place % 2:
            born[event.storage] = (event.place // 2, event.size)
        elif event.phase == "forward" and event.size < 0:
            born.pop(event.storage, None)
    kept = [0] * count
    for unit, size in born.values():
        kept[unit] += size
    before = np.concatenate([[0], np.cumsum(kept)]).astype(int).tolist()
    need = [0] * (count + 1)
    live = 0
    for event in events:
        live += event.size
        if event.phase in ("forward", "backward"):
            at = event.place // 2
            need[at] = max(need[at], live - before[at])
    phases = {
        "first_step": phase_of(traced.trace, ("first forward", "first backward", "first optimizer"), target),
        "step": phase_of(traced.trace, SECOND_STEP, target),
        "save": _at_rest(traced, traced.saving if target.name == "cpu" else 0),
    }
    counted = Counter(work for work in traced.trace.work if not work.phase.startswith("first "))
    work = [(*one, times) for one, times in counted.items()]
    return Costs(
        list(traced.units),
        kept,
        need,
        work,
        passes,
        phases,
        _moments(traced.trace),
        dict(traced.weights),
        traced.saving,
        traced.paged,
    )


def _moments(trace: Trace) -> list[tuple[str, dict[str, int]]]:
    """What is there during the second step, part by part."""
    inside = [index for index, event in enumerate(trace.events) if event.phase in SECOND_STEP]
    part = max(1, -(-len(inside) // MOMENTS))
    ends = dict.fromkeys(inside[part - 1 :: part])
    ledger: Counter[str] = Counter()
    live = 0
    best: tuple[int, str, dict[str, int]] | None = None
    found = []
    for index, event in enumerate(trace.events):
        name = WORKSPACE if event.storage == ROOM else trace.categories[event.storage]
        ledger[name] += event.size
        live += event.size
        if event.phase in SECOND_STEP and (best is None or live > best[0]):
            best = (live, event.phase, {key: size for key, size in ledger.items() if size})
        if index in ends and best is not None:
            found.append(best[1:])
            best = None
    return found


def phase_of(trace: Trace, names: Sequence[str], target: Target) -> Phase:
    """Peak, ledger and least capacity of a part of a trace; what was before it counts as far as it lives."""
    there = set(trace.phases())
    peak = max((trace.peak(name) for name in names if name in there), key=lambda found: found.size)
    last = max(index for index, event in enumerate(trace.events) if event.phase in names)
    return {
        "peak_allocated_bytes": peak.size,
        "least_bytes": peak.size if target.name == "cpu" else least_capacity(trace.events[: last + 1]),
        "ledger": peak.ledger,
    }


def _at_rest(traced: StepTrace, saving: int) -> Phase:
    """After a step: weights and optimizer state. What is saved is copied to the host tensor by tensor."""
    ledger: Counter[str] = Counter()
    for event in traced.trace.events:
        if event.storage >= 0:
            ledger[traced.trace.categories[event.storage]] += event.size
    held = {name: size for name, size in ledger.items() if size and name in STAYS}
    if saving:
        held["what is saved"] = saving
    total = sum(held.values())
    return {"peak_allocated_bytes": total, "least_bytes": total, "ledger": held}
