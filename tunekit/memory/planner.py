"""How to train a job on a device: the fastest way that fits, decided before a weight is loaded.

1. The training step is traced with no unit checkpointed and with all of them (`job.trace_step`); that gives
   for each unit what it keeps either way, what it needs while it runs, and how long running it twice takes.
2. For each micro-batch, `choose_units` finds the cheapest set of units to checkpoint that fits: exactly, by
   dynamic programming.
3. The fastest plan by the roofline of the device is traced as it would run, replayed through the allocator,
   and believed only then; otherwise the budget is tightened by what was missing, and 2 repeats.

Nothing here changes what is learned: micro-batch, accumulation and checkpointing do not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.artifacts import write_json
from tunekit.errors import DoesNotFit
from tunekit.hardware import DeviceFacts
from tunekit.memory import job as jobs
from tunekit.memory.allocator import least_capacity
from tunekit.memory.job import Job
from tunekit.memory.trace import CPU, CUDA, ROOM, WORKSPACE, Target, Trace
from tunekit.units import format_bytes

VERSION = 1
TRACES = 4
"""Version of the cached traces: raise it when `Costs`, or what a trace counts, changes."""
GIB = 2**30
CONTEXT = round(0.45 * GIB)
"""What a CUDA context and its libraries hold outside the allocator, where it cannot be measured."""
HEADROOM_SHARE, HEADROOM = 0.04, round(0.1 * GIB)
"""Kept free above the prediction."""
TRIES = 5
LEVELS = 4096
"""Steps of the saved bytes in the dynamic program."""
EFFICIENCY, BANDWIDTH_EFFICIENCY, LAUNCH_SECONDS = 0.45, 0.8, 4e-6
"""Of the roofline: share of the peak arithmetic and bandwidth that kernels reach, and the least they take."""
SECOND_STEP = ("forward", "backward", "optimizer")
MOMENTS = 160
PHASES = ("encode", "first_step", "step", "preview", "save")

Row = tuple[str, int, int, int, bool, int]
"""Phase, place, flops, traffic, half, how often: `trace.Work`, counted."""
Phase = dict[str, Any]
"""`{"peak_allocated_bytes", "least_bytes", "ledger"}`."""


# Costs ------------------------------------------------------------------------------------------------------


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
    """

    units: list[str]
    kept: list[int]
    need: list[int]
    work: list[Row]
    passes: int
    phases: dict[str, Phase]
    moments: list[tuple[str, dict[str, int]]] = field(default_factory=list)


def costs(traced: jobs.StepTrace, target: Target, passes: int = 1) -> Costs:
    """Reduces a trace, of as many forward and backward passes per step, to what planning needs."""
    events = traced.trace.events
    count = len(traced.units)
    born: dict[int, tuple[int, int]] = {}
    for event in events:
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
        "save": _at_rest(traced.trace),
    }
    counted = Counter(work for work in traced.trace.work if not work.phase.startswith("first "))
    work = [(*one, times) for one, times in counted.items()]
    return Costs(list(traced.units), kept, need, work, passes, phases, _moments(traced.trace))


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
    peak = max((trace.peak(name) for name in names), key=lambda found: found.size)
    last = max(index for index, event in enumerate(trace.events) if event.phase in names)
    return {
        "peak_allocated_bytes": peak.size,
        "least_bytes": peak.size if target.name == "cpu" else least_capacity(trace.events[: last + 1]),
        "ledger": peak.ledger,
    }


def _at_rest(trace: Trace) -> Phase:
    """After a step: weights and optimizer state. What is saved is copied to the host tensor by tensor."""
    ledger: Counter[str] = Counter()
    for event in trace.events:
        if event.storage >= 0:
            ledger[trace.categories[event.storage]] += event.size
    held = {name: size for name, size in ledger.items() if size and name in jobs.STAYS}
    total = sum(held.values())
    return {"peak_allocated_bytes": total, "least_bytes": total, "ledger": held}


# Time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """A device's roofline.

    Attributes:
        half: operations per second of 16-bit matrix products with float32 sums.
        full: of float32.
        bandwidth: bytes per second.
    """

    half: float
    full: float
    bandwidth: float

    def seconds(self, rows: Collection[Row]) -> float:
        """Predicted time of operators; only ratios of such times are worth something."""
        total = 0.0
        for _, _, flops, traffic, half, times in rows:
            arithmetic = flops / (EFFICIENCY * (self.half if half else self.full))
            moving = traffic / (BANDWIDTH_EFFICIENCY * self.bandwidth)
            total += times * (max(arithmetic, moving) + LAUNCH_SECONDS)
        return total


# Which units ------------------------------------------------------------------------------------------------


def choose_units(
    keeping: Costs, checkpointing: Costs, seconds: Sequence[float], budget: int
) -> tuple[list[int], float] | None:
    """The cheapest set of units to compute twice, so that no moment of the step needs more than `budget`.

    Units in forward order; state: bytes saved by the units so far, rounded down to 1/4096 of all that can
    be. Before unit i the units of 0..i-1 keep what they keep, so unit i fits if

        kept(0..i-1, all kept) - saved + need(i) <= budget.

    Args:
        keeping: of the trace without checkpoints.
        checkpointing: of the trace with all of them.
        seconds: what checkpointing each unit costs.
        budget: bytes of tensors.

    Returns:
        Numbers of the chosen units and their cost in seconds; None if no set fits.
    """
    count = len(seconds)
    saving = [max(0, a - b) for a, b in zip(keeping.kept, checkpointing.kept, strict=True)]
    quantum = max(1, -(-sum(saving) // (LEVELS - 1)))
    best = np.full(LEVELS, np.inf)
    best[0] = 0.0
    level = np.arange(LEVELS)
    choices = np.zeros((count, LEVELS), dtype=bool)
    before = 0
    for unit in range(count):
        made = np.full(LEVELS, np.inf)
        room = level * quantum + budget - before
        plain = np.where(room >= keeping.need[unit], best, np.inf)
        np.copyto(made, plain)
        if saving[unit] > 0:
            step = saving[unit] // quantum
            twice = np.where(room >= checkpointing.need[unit], best, np.inf) + seconds[unit]
            shifted = np.full(LEVELS, np.inf)
            shifted[step:] = twice[: LEVELS - step]
            choices[unit] = shifted < made
            made = np.minimum(made, shifted)
        best = made
        before += keeping.kept[unit]
    fits = level * quantum + budget - before >= max(keeping.need[count], checkpointing.need[count])
    best = np.where(fits, best, np.inf)
    at = int(best.argmin())
    if not np.isfinite(best[at]):
        return None
    cost, chosen = float(best[at]), []
    for unit in reversed(range(count)):
        if choices[unit, at]:
            chosen.append(unit)
            at -= saving[unit] // quantum
    return chosen[::-1], cost


# The device ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What a device offers to one run.

    Attributes:
        title: for people.
        total: bytes that may be used, the context included.
        context: bytes that are used beside torch's allocator.
        target: how kernels there allocate.
        speed: its roofline.
    """

    title: str
    total: int
    context: int
    target: Target
    speed: Speed

    def needed(self, least: int) -> int:
        """Bytes of the device for an allocator that needs `least`, with headroom."""
        if self.context == 0:
            return least
        return least + self.context + round(least * HEADROOM_SHARE) + HEADROOM

    @property
    def budget(self) -> int:
        """Bytes for tensors at most, if nothing were lost to fragments."""
        if self.context == 0:
            return self.total
        return max(0, round((self.total - self.context - HEADROOM) / (1 + HEADROOM_SHARE)))


def room_of(facts: DeviceFacts, *, budget: int | None = None) -> Room:
    """A card of the table, empty, or as much of it as `budget` bytes.

    A card shows a little less than its nominal memory (23.68 GiB of 24 on an RTX 4090).
    """
    own = round((facts.memory_bytes or 0) * 0.985)
    speed = Speed(facts.half_flops, facts.float32_flops, facts.bandwidth_bytes_s or 50e9)
    if facts.kind == "cpu":
        return Room(facts.title, budget or own, 0, CPU, speed)
    attention = CUDA.attention
    if facts.kind == "cuda" and facts.compute_capability and facts.compute_capability < (8, 0):
        attention = "efficient"  # flash attention began with Ampere
    elif not facts.has_fused_attention:
        attention = "math"
    total = min(budget, own) if budget else own
    return Room(facts.title, total, CONTEXT, replace(CUDA, attention=attention), speed)


# The plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A decision. `as_json` is `plan.json`."""

    device: str
    budget_bytes: int
    fits: bool
    micro_batch: int
    accumulation: int
    precision: str
    optimizer: str
    checkpointed_blocks: tuple[str, ...]
    blocks: int
    phases: dict[str, Phase]
    device_bytes: int
    relative_step_time: float
    notes: tuple[str, ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()
    moments: tuple[tuple[str, dict[str, int]], ...] = field(default=(), repr=False)
    """One step, for a picture: see `Costs.moments`."""

    @property
    def peak_phase(self) -> str:
        """Phase that needs most."""
        return max(self.phases, key=lambda name: int(self.phases[name]["least_bytes"]))

    @property
    def levers(self) -> list[str]:
        """What was done to make it fit, in words."""
        made = []
        if self.accumulation > 1:
            made.append(f"micro-batch {self.micro_batch} x {self.accumulation}")
        if self.checkpointed_blocks:
            made.append(f"{len(self.checkpointed_blocks)} of {self.blocks} blocks checkpointed")
        return made

    @property
    def words(self) -> str:
        """The plan in a line: "bf16, micro-batch 1 x 4, 34 of 86 blocks checkpointed"."""
        batch = f"micro-batch {self.micro_batch}" + (
            f" x {self.accumulation}" if self.accumulation > 1 else ""
        )
        blocks = (
            f"{len(self.checkpointed_blocks)} of {self.blocks} blocks checkpointed"
            if self.checkpointed_blocks
            else "nothing checkpointed"
        )
        return f"{self.precision}, {batch}, {blocks}"

    def as_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        phases = {
            name: {
                "peak_allocated_bytes": found["peak_allocated_bytes"],
                "peak_reserved_bytes": found["least_bytes"],
                "ledger": found["ledger"],
            }
            for name, found in self.phases.items()
        }
        return {
            "version": VERSION,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "phases": phases,
            "peak_phase": self.peak_phase,
            "device_bytes": self.device_bytes,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "precision": self.precision,
            "base_precision": self.precision,
            "optimizer": self.optimizer,
            "checkpointed_blocks": list(self.checkpointed_blocks),
            "blocks": self.blocks,
            "levers": self.levers,
            "relative_step_time": round(self.relative_step_time, 4),
            "notes": list(self.notes),
            "rejected": list(self.rejected),
        }


@dataclass
class Planner:
    """Plans one job for any number of devices; traces are made once.

    Attributes:
        job: what is trained.
        batch_size: samples per optimizer step on one device.
        micro_batch: pinned, or None.
        checkpointing: pinned to all (True) or none (False), or None.
        cache: folder of traces; None keeps them in memory only.
        say: takes progress lines.
    """

    job: Job
    batch_size: int
    micro_batch: int | None = None
    checkpointing: bool | None = None
    cache: Path | None = None
    say: Callable[[str], None] = lambda line: None
    _known: dict[str, Any] = field(default_factory=dict)

    def plan(self, name: str, room: Room) -> Plan:
        """The fastest plan that fits; if none does, the smallest, with `fits` False."""
        # A pinned micro-batch may be more than this process's share of the batch.
        sizes = [min(self.micro_batch, self.batch_size)] if self.micro_batch else divisors(self.batch_size)
        reference = self._time(room, sizes[0], (), self._costs(room.target, sizes[0], False))
        if not self.checkpointing:  # nothing is faster than the largest micro-batch with all kept
            plan = self._check(name, room, sizes[0], (), 1.0)
            if plan.device_bytes <= room.total:
                return plan
        budgets = dict.fromkeys(sizes, room.budget)
        rejected: list[dict[str, Any]] = []
        for _ in range(TRIES * len(sizes)):
            candidates = []
            for size in sizes:
                found = self._choose(room, size, budgets[size])
                if found is not None:
                    candidates.append((found[1], -size, found[0]))
            if not candidates:
                break
            seconds, size, chosen = min(candidates)
            plan = self._check(name, room, -size, chosen, seconds / reference)
            if plan.device_bytes <= room.total:
                others = [
                    self._rejected(room, -other, units, time / reference)
                    for time, other, units in sorted(candidates)
                    if other != size
                ]
                return replace(plan, rejected=(*rejected, *others)[:6])
            over = plan.device_bytes - room.total
            rejected.append(
                {
                    "levers": plan.levers,
                    "device_bytes": plan.device_bytes,
                    "relative_step_time": round(plan.relative_step_time, 4),
                    "why": f"{format_bytes(over)} too much in the phase {plan.peak_phase}",
                }
            )
            if plan.peak_phase not in ("step", "first_step"):
                break  # no arrangement of the step helps
            budgets[-size] -= max(round(over * 1.05), 16 * 2**20)
        smallest = self._check(name, room, sizes[-1], self._all(room, sizes[-1]), 0.0)
        units = self._all(room, sizes[-1])
        own = self._costs(room.target, sizes[-1], bool(units))
        ratio = self._time(room, sizes[-1], units, own) / reference
        fits = smallest.device_bytes <= room.total
        return replace(smallest, fits=fits, relative_step_time=ratio, rejected=tuple(rejected[:6]))

    def _accumulation(self, size: int) -> int:
        """Forwards per optimizer step; the last may be shorter."""
        return -(-self.batch_size // size)

    def _all(self, room: Room, size: int) -> tuple[str, ...]:
        return () if self.checkpointing is False else tuple(self._costs(room.target, size, True).units)

    def _choose(self, room: Room, size: int, budget: int) -> tuple[tuple[str, ...], float] | None:
        """The cheapest units to checkpoint at a micro-batch, and the seconds of an optimizer step."""
        keeping = self._costs(room.target, size, False)
        if self.checkpointing is False:
            fits = keeping.phases["step"]["peak_allocated_bytes"] <= budget
            return ((), self._time(room, size, (), keeping)) if fits else None
        checkpointing = self._costs(room.target, size, True)
        if self.checkpointing:
            fits = checkpointing.phases["step"]["peak_allocated_bytes"] <= budget
            chosen: tuple[str, ...] = tuple(keeping.units)
            return (chosen, self._time(room, size, chosen, keeping)) if fits else None
        found = choose_units(keeping, checkpointing, self._unit_seconds(room, keeping), budget)
        if found is None:
            return None
        names = tuple(keeping.units[number] for number in found[0])
        return names, self._time(room, size, names, keeping)

    def _unit_seconds(self, room: Room, keeping: Costs) -> list[float]:
        rows: list[list[Row]] = [[] for _ in keeping.units]
        for row in keeping.work:
            if row[0] == "forward" and row[1] % 2:
                rows[row[1] // 2].append(row)
        return [room.speed.seconds(found) / keeping.passes for found in rows]

    def _time(self, room: Room, size: int, chosen: Collection[str], keeping: Costs) -> float:
        """Predicted seconds of an optimizer step."""
        passes = [row for row in keeping.work if row[0] != "optimizer"]
        once = [row for row in keeping.work if row[0] == "optimizer"]
        twice = sum(
            seconds
            for name, seconds in zip(keeping.units, self._unit_seconds(room, keeping), strict=True)
            if name in chosen
        )
        one = room.speed.seconds(passes) / keeping.passes + twice
        return one * self._accumulation(size) + room.speed.seconds(once)

    def _check(self, name: str, room: Room, size: int, chosen: tuple[str, ...], ratio: float) -> Plan:
        """The plan as it would run, traced and replayed."""
        whole = self._costs(room.target, size, chosen)
        phases = {"encode": self._encode(room), **whole.phases}
        if self.job.preview is not None:
            held = whole.phases["save"]["ledger"]
            more = sum(held.get(part, 0) for part in (jobs.ADAPTER, jobs.STATE))
            phases["preview"] = self._preview(room.target, more)
        phases = {key: phases[key] for key in PHASES if key in phases}
        need = room.needed(max(int(found["least_bytes"]) for found in phases.values()))
        return Plan(
            device=name,
            budget_bytes=room.total,
            fits=need <= room.total,
            micro_batch=size,
            accumulation=self._accumulation(size),
            precision=self.job.precision,
            optimizer=self.job.optimizer,
            checkpointed_blocks=chosen,
            blocks=len(whole.units),
            phases=phases,
            device_bytes=need,
            relative_step_time=ratio,
            moments=tuple(whole.moments),
        )

    def _rejected(self, room: Room, size: int, units: tuple[str, ...], ratio: float) -> dict[str, Any]:
        accumulation = self._accumulation(size)
        return {
            "levers": [
                f"micro-batch {size} x {accumulation}",
                *([f"{len(units)} blocks checkpointed"] if units else []),
            ],
            "device_bytes": None,
            "relative_step_time": round(ratio, 4),
            "why": "slower",
        }

    # Traces, made once

    def _costs(self, target: Target, size: int, checkpointed: bool | tuple[str, ...]) -> Costs:
        if checkpointed == ():
            checkpointed = False

        def make() -> dict[str, Any]:
            self.say(f"tracing a step of micro-batch {size}")
            accumulation = self._accumulation(size)
            return asdict(
                costs(
                    jobs.trace_step(
                        self.job,
                        target,
                        micro_batch=size,
                        accumulation=accumulation,
                        checkpointed=checkpointed,
                    ),
                    target,
                    min(accumulation, 2),
                )
            )

        several = self.batch_size > size
        found = self._made(["step", asdict(target), size, several, checkpointed], make)
        return Costs(
            found["units"],
            found["kept"],
            found["need"],
            [tuple(row) for row in found["work"]],  # type: ignore[misc]
            found["passes"],
            found["phases"],
            [(phase, ledger) for phase, ledger in found["moments"]],
        )

    def _encode(self, room: Room) -> Phase:
        def make() -> Phase:
            return phase_of(jobs.trace_encode(self.job, room.target), ("encode",), room.target)

        return self._made(["encode", asdict(room.target)], make)

    def _preview(self, target: Target, held: int) -> Phase:
        def make() -> Phase:
            traced = jobs.trace_preview(self.job, target, held=held)
            return phase_of(traced, ("preview forward", "preview decode"), target)

        return self._made(["preview", asdict(target), held], make)

    def _made(self, what: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = _digest([what, _described(self.job)])
        if key not in self._known:
            file = self.cache / f"{key}.json" if self.cache else None
            if file and file.is_file():
                try:
                    self._known[key] = json.loads(file.read_text(encoding="utf-8"))
                except ValueError:
                    file.unlink()
            if key not in self._known:
                self._known[key] = make()
                if file:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(file, self._known[key])
        found: dict[str, Any] = self._known[key]
        return found


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def trace_cache() -> Path:
    """Where traces are kept between calls: `tunekit/traces` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunekit" / "traces"


def _described(job: Job) -> list[Any]:
    """Everything that can change a trace."""
    import diffusers
    import peft
    import torch
    import transformers

    import tunekit

    versions = [module.__version__ for module in (tunekit, torch, diffusers, peft, transformers)]
    family = job.blueprint
    parts = [[part.classes, dict(part.config), part.precision] for part in family.parts]
    adapter = job.adapter.model_dump(mode="json") if job.adapter else None
    own = [job.optimizer, job.precision, job.size, job.max_grad_norm, job.preview, job.guided]
    return [TRACES, versions, family.name, parts, list(family.tokens), adapter, own]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def refuse(plan: Plan, advice: str) -> DoesNotFit:
    """The error for a plan that does not fit."""
    missing = plan.device_bytes - plan.budget_bytes
    worst = plan.phases[plan.peak_phase]
    parts = ", ".join(
        f"{name} {format_bytes(size)}" for name, size in sorted(worst["ledger"].items(), key=lambda x: -x[1])
    )
    return DoesNotFit(
        f"it needs {format_bytes(plan.device_bytes)} in the phase {plan.peak_phase} even with {plan.words}"
        f" ({parts}), and {plan.device} has {format_bytes(plan.budget_bytes)}:"
        f" {format_bytes(missing)} are missing",
        hint=advice,
    )


def advice(planner: Planner, plan: Plan, room: Room, cards: Sequence[DeviceFacts]) -> str:
    """What to change when nothing fits: the one change that saves most, and the smallest card that would do.

    Args:
        planner: that made `plan`.
        cards: to choose from.
    """
    job, full = planner.job, planner.job.adapter is None
    changes: list[tuple[str, Planner]] = []

    def change(text: str, **fields: Any) -> None:
        changes.append((text, replace(planner, job=replace(job, **fields), _known={})))

    if planner.checkpointing is False or planner.micro_batch:
        changes.append(
            ("leave memory.gradient_checkpointing and memory.micro_batch to the planner",
             replace(planner, checkpointing=None, micro_batch=None))
        )  # fmt: skip
    if job.precision == "fp32" and room.context:
        change("memory.precision=bf16", precision="bf16")
    if full and job.optimizer == "adamw":
        change("train.optimizer=adamw8bit", optimizer="adamw8bit")
    if job.preview is not None and plan.peak_phase == "preview":
        change("no previews (preview.prompts=[])", preview=None)
    if min(job.size) >= 512:
        half = (job.size[0] // 2, job.size[1] // 2)
        change(f"data.resolution={half[0]}", size=half, preview=half if job.preview else None)
    tried = [(text, other.plan(plan.device, room)) for text, other in changes]
    lines = []
    if tried:
        text, best = min(tried, key=lambda item: item[1].device_bytes)
        enough = "would fit" if best.device_bytes <= room.total else "is still too much"
        lines.append(f"what helps most: {text} needs {format_bytes(best.device_bytes)}, which {enough}")
    for facts in sorted(cards, key=lambda card: card.memory_bytes or 0):
        if facts.kind == "cuda" and (facts.supports_bf16 or job.precision != "bf16"):
            larger = room_of(facts)
            if larger.total >= plan.device_bytes and planner.plan(facts.name, larger).fits:
                lines.append(f"smallest card that would do: {facts.title} ({facts.name})")
                break
    else:
        lines.append("no single card of the table would do")
    return "\n".join(lines)
