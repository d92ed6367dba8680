"""How to train a job on a device: the fastest way that fits, decided before a weight is loaded.

1. The training step is traced with no unit checkpointed, with all of them, and with all of them but their
   attentions (`step.trace_step`); that gives for each unit what it keeps, what it needs while it runs, and
   how long running it twice takes.
2. For each micro-batch, `choose_units` finds the cheapest choice for every unit that fits: exactly, by
   dynamic programming.
3. The fastest plan by the roofline of the device is traced as it would run, replayed through the allocator,
   and believed only then; otherwise the budget is tightened by what was missing, and 2 repeats.

What changes nothing that is learned is tried first: micro-batch, accumulation, checkpointing, an optimizer in
the backward pass, weights in host memory. Only then come packed base weights and 8-bit optimizer state.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from tunekit.config import CLASS_BATCH, MemoryConfig
from tunekit.config.memory import Scale
from tunekit.errors import ConfigError
from tunekit.kept import Kept
from tunekit.memory.choose import choose_units
from tunekit.memory.costs import Costs, Row, costs, phase_of
from tunekit.memory.decided import Levers, named
from tunekit.memory.host import FILES, Base, Waiting, base_of, on_host
from tunekit.memory.job import ADAPTER, MASTERS, STATE, TRAINED, WEIGHTS, Job
from tunekit.memory.phases import DEVICE, HOST, LAYERS, trace_class_pictures, trace_encode, trace_preview
from tunekit.memory.plan import PHASES, Phase, Plan, code, measures, versions
from tunekit.memory.room import DEVICE_LINK, DISPATCH_SECONDS, HOST_LINK, Room
from tunekit.memory.sharding import Traffic, traffic
from tunekit.memory.step import splits, trace_step
from tunekit.memory.trace import ACTIVATIONS, Target
from tunekit.networks import collected_once
from tunekit.optimizers import find
from tunekit.units import format_bytes

TRIES = 6
LEAST_STEP = 32 * 2**20
"""Bytes by which the budget is tightened at least, when a plan did not fit; twice as many each time."""
AWAY = 32
"""Numbers of units, evenly spread up to all, whose weights are tried on the host."""
PATIENCE = 2.0
"""Weights in host memory come after approximations where they make a step longer than this."""
REJECTED = 6
HOPELESS = ("load", "class_pictures", "encode", "heal", "distill")
"""Phases that nothing which is chosen for the denoiser makes smaller."""


@dataclass(frozen=True, order=True)
class Way:
    """What is the same for all units.

    Attributes:
        rank: how far it is from exact: 0 is; 1 int8 base or 8-bit optimizer state; 2 nf4 base.
        base_precision: "same", "int8" or "nf4"; "fp8" where it is set: int8 takes as much and rounds less.
        optimizer: a row of `optimizers`.
        optimizer_in_backward: whether parameters are updated during the backward pass.
        sharded: whether weights are split over the processes.
    """

    rank: int
    base_precision: str
    optimizer: str
    optimizer_in_backward: bool
    sharded: bool = False


class _Pair(NamedTuple):
    """What is searched over: a way, a micro-batch, and how many units' weights are on the host."""

    way: Way
    micro_batch: int
    away: int


@dataclass(frozen=True)
class After:
    """A training that follows the run's own and has settings of its own: it is predicted, not arranged.

    Attributes:
        phase: what the plan calls it.
        job: what is trained then, and for what.
        levers: its own.
        batch_size: samples per optimizer step.
        host_bytes: of the host's memory that it takes.
    """

    phase: str
    job: Job
    levers: Levers
    batch_size: int
    host_bytes: int


@dataclass
class _Candidate:
    """A choice for every unit, as it is estimated before it is traced.

    Attributes:
        seconds: of an optimizer step.
        least: bytes that the allocator needs, where that is known; else 0.
    """

    seconds: float
    way: Way
    levers: Levers
    least: int


@dataclass
class _Search:
    """What was looked at on the way to a plan.

    Attributes:
        name: of the device.
        seconds: of a step of the unconstrained job.
        rejected: what the plan shows of it.
        tried: plans that did not fit.
    """

    name: str
    room: Room
    seconds: float
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tried: list[Plan] = field(default_factory=list)


@dataclass
class Planner:
    """Plans one job for any number of devices; traces are made once.

    Attributes:
        job: what is trained.
        batch_size: samples per optimizer step on one device.
        memory: what of it is decided already.
        may_change_optimizer: whether 8-bit optimizer state may be chosen.
        processes: that train together, each on a device like this one.
        after: what is trained afterwards; looked at on devices with a memory of their own.
        cache: of traces; None keeps them in memory only.
        say: takes progress lines.
    """

    job: Job
    batch_size: int
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(budget="auto"))
    may_change_optimizer: bool = False
    processes: int = 1
    after: Sequence[After] = ()
    cache: Kept | None = None
    say: Callable[[str], None] = lambda line: None
    _known: dict[str, Any] = field(default_factory=dict)

    def plan(self, name: str, room: Room) -> Plan:
        """The fastest plan that fits; if none does, the smallest, with `fits` False."""
        tiers = self._ways(room)
        first = tiers[0][0]
        free = self._levers(first, self._sizes(first)[0])
        search = _Search(name, room, self._time(room, first, free))
        if not self.memory.gradient_checkpointing and not self.memory.offload:
            plan = self._check(name, room, first, free, 1.0)
            if plan.fits:  # nothing is faster than the largest micro-batch with all kept
                return plan
            search.tried.append(plan)
            if _hopeless(plan):
                return plan
        found = [self._best(search, tiers)]
        if self.memory.approximate == "if_faster":
            found.append(self._best(search, [[way for ways in tiers for way in ways]]))
        fitting = [plan for plan in found if plan is not None]
        plan = min(fitting, key=lambda plan: plan.relative_step_time, default=None) or min(
            (*search.tried, self.least(name, room, search.seconds)), key=lambda plan: plan.device_bytes
        )
        return replace(plan, rejected=tuple(search.rejected[-REJECTED:]))

    def _best(self, search: _Search, tiers: Sequence[Sequence[Way]]) -> Plan | None:
        """The first plan that fits, tier by tier; those that take more than `PATIENCE` come last.

        Of a tier, weights that stay whole come first.
        """
        late: list[Plan] = []
        room = search.room
        for ways in tiers:
            for split in (False, True):  # what sending costs is assumed: whole weights first
                pairs = [
                    _Pair(way, size, 0)
                    for way in ways
                    if way.sharded is split and self._can_fit(room, way)
                    for size in self._sizes(way)
                ]
                if self.memory.offload is True:
                    pairs = []
                found = self._search(search, pairs)
                if found is not None:
                    search.rejected += [_rejected(plan, "slower, though exact") for plan in late]
                    return found
            if search.tried and _hopeless(search.tried[-1]):
                break
            pairs = [
                _Pair(way, size, count)
                for way in ways
                if self._may_offload(room) and not way.sharded
                for size in self._sizes(way)
                for count in counts(len(self._costs(room.target, way, self._levers(way, size)).units), AWAY)
            ]
            found = self._search(replace(search, rejected=[]), pairs)
            if found is not None:
                if found.relative_step_time <= PATIENCE or self.memory.offload:
                    return found
                late.append(found)
        return late[0] if late else None

    def least(self, name: str, room: Room, seconds: float = 0.0) -> Plan:
        """The plan that needs least, whatever it costs.

        Args:
            seconds: of a step of the unconstrained job, to which its time is told if it fits; with 0 it is
                not looked at, and 0.
        """
        tiers = self._ways(room)
        ends = dict.fromkeys([tiers[-1][-1], *[way for way in tiers[0][-1:] if way.sharded]])
        found = [self._least(name, room, way, seconds) for way in ends]
        return min(found, key=lambda plan: plan.device_bytes)

    def _least(self, name: str, room: Room, way: Way, seconds: float) -> Plan:
        """The arrangement of a way that needs least."""
        size = self._sizes(way)[-1]
        every = self.memory.gradient_checkpointing is not False
        levers = self._levers(way, size, gradient_checkpointing=every)
        plan = self._check(name, room, way, levers, 0.0)
        away = self._may_offload(room) and not way.sharded
        if every and away and not plan.fits and not _hopeless(plan):
            units = plan.levers.gradient_checkpointing
            levers = replace(levers, gradient_checkpointing=units, offload=units)
            plan = self._check(name, room, way, levers, 0.0)
        if plan.fits and seconds:
            plan = replace(plan, relative_step_time=self._time(room, way, plan.levers) / seconds)
        return plan

    def _ways(self, room: Room) -> list[list[Way]]:
        """What may be chosen, the exact ways first; those of one rank together."""
        memory, adapter = self.memory, self.job.adapter is not None
        allowed = memory.approximate != "never"
        has_nf4 = "bitsandbytes" not in room.lacks
        bases: list[str] = [memory.base_precision or "same"]
        if memory.base_precision is None and adapter and allowed:
            bases += ["int8", *(["nf4"] if has_nf4 else [])]
        optimizers = [self.job.optimizer]
        if self.may_change_optimizer and not adapter and allowed and has_nf4:
            optimizers.append("adamw8bit")  # an adapter's state is small, and the 8-bit kernels are slower
        backward = [bool(memory.optimizer_in_backward)]
        free = not adapter and self.job.max_grad_norm is None and self.job.precision != "fp16"
        if memory.optimizer_in_backward is None and free:
            backward.append(True)
        rank = {"same": 0, "int8": 1, "nf4": 2}
        ways = [
            Way(
                0 if base == memory.base_precision else rank[base] + (optimizer != self.job.optimizer),
                base,
                optimizer,
                late,
                split,
            )
            for base in bases
            for optimizer in optimizers
            for late in backward
            for split in self._splits(base, optimizer, late=late)
        ]
        if not ways:
            raise ConfigError(
                "full splits float weights; all of them are trained with adamw, in fp32 or bf16, and updated"
                f" after the backward pass, but here is {self.job.optimizer}, {self.job.precision},"
                f" base_precision={memory.base_precision or 'same'}",
                where="memory.sharding",
                hint="set memory.sharding to none",
            )
        return [[way for way in ways if way.rank == one] for one in sorted({way.rank for way in ways})]

    def _splits(self, base: str, optimizer: str, *, late: bool) -> list[bool]:
        """Whether weights are split over the processes, as far as that can be chosen."""
        memory = self.memory
        if self.processes == 1 or memory.sharding == "none":
            return [False]
        able = base == "same" and not late and not memory.offload
        if self.job.adapter is None:
            able = able and find(optimizer).by_element and self.job.precision != "fp16"
        if memory.sharding == "full":
            return [True] if able else []
        return [False, True] if able else [False]

    def _sizes(self, way: Way) -> list[int]:
        """Micro-batches, largest first."""
        if self.memory.micro_batch:
            # A pinned micro-batch may be more than this process's share of the batch.
            return [min(self.memory.micro_batch, self.batch_size)]
        return [self.batch_size] if way.optimizer_in_backward else cuts(self.batch_size)

    def _levers(self, way: Way, micro_batch: int, **units: Any) -> Levers:
        """Those of a way.

        Args:
            units: levers that name units.
        """
        return Levers(
            precision=self.job.precision,
            base_precision=way.base_precision,
            micro_batch=micro_batch,
            optimizer_in_backward=way.optimizer_in_backward,
            sharding="full" if way.sharded else "none",
            **units,
        )

    def _search(self, search: _Search, pairs: Sequence[_Pair]) -> Plan | None:
        """The fastest plan that fits, of what is searched over."""
        room = search.room
        budgets = dict.fromkeys(pairs, room.budget)
        tighter = dict.fromkeys(pairs, LEAST_STEP)
        chosen: dict[_Pair, _Candidate | None] = {}
        for _ in range(TRIES * len(pairs)):
            for one in pairs:
                if one not in chosen:
                    chosen[one] = self._choose(room, one, budgets[one])
            candidates = {one: found for one, found in chosen.items() if found is not None}
            if not candidates:
                return None
            pair = min(
                candidates, key=lambda one: (candidates[one].seconds, one.way, one.away, -one.micro_batch)
            )
            best = candidates[pair]
            plan = self._check(search.name, room, best.way, best.levers, best.seconds / search.seconds)
            if plan.fits:
                kinds = {(pair.way, pair.micro_batch, pair.away > 0): best}
                for one in sorted(candidates, key=lambda one: candidates[one].seconds):
                    kinds.setdefault((one.way, one.micro_batch, one.away > 0), candidates[one])
                search.rejected += [
                    self._slower(room, found, found.seconds / search.seconds)
                    for found in [*kinds.values()][1 : REJECTED + 1]
                ]
                return plan
            search.tried.append(plan)
            over = plan.device_bytes - room.total
            why = f"{format_bytes(over)} too much in the phase {plan.peak_phase}"
            search.rejected.append(_rejected(plan, why))
            if _hopeless(plan):
                return None
            if plan.peak_phase == "preview":
                # Other checkpoints do not make it smaller; another base does, and more on the host.
                same = (pair.way.base_precision, pair.way.optimizer)
                for one in pairs:
                    if (one.way.base_precision, one.way.optimizer) == same and one.away <= pair.away:
                        budgets[one] = 0
                        chosen.pop(one, None)
            less = max(round(over * 1.05), tighter[pair])
            # What the estimate missed here it misses in its neighbours too: as much of the host, or about.
            for one in pairs:
                near = abs(one.away - pair.away) <= pair.away // 8
                if (one.way, one.micro_batch) == (pair.way, pair.micro_batch) and near:
                    budgets[one] -= less
                    chosen.pop(one, None)
            tighter[pair] *= 2
        return None

    def _can_fit(self, room: Room, way: Way) -> bool:
        """Whether the smallest arrangement does; if not, no other has to be traced."""
        every = self.memory.gradient_checkpointing is not False
        levers = self._levers(way, self._sizes(way)[-1], gradient_checkpointing=every)
        least = self._costs(room.target, way, levers)
        return bool(least.phases["step"]["peak_allocated_bytes"] <= room.budget)

    def _choose(self, room: Room, pair: _Pair, budget: int) -> _Candidate | None:
        """The cheapest units to checkpoint, with the weights of a share of the units on the host."""
        way = pair.way
        free = self._levers(way, pair.micro_batch)
        keeping = self._costs(room.target, way, free)
        weights = [keeping.weights[unit] for unit in keeping.units]
        away = pair.away
        moved = _spread(len(weights), away)
        hosted = sum(weights[index] for index in moved)
        if room.host_bytes is not None and hosted > room.host_bytes:
            return None
        if away:
            budget += hosted - 2 * max(weights)  # two visit at a time
        host = tuple(keeping.units[index] for index in moved)
        fits = keeping.phases["step"]["peak_allocated_bytes"] <= budget

        def candidate(levers: Levers, least: int) -> _Candidate:
            return _Candidate(self._time(room, way, levers), way, levers, least)

        pinned = self.memory.gradient_checkpointing
        if pinned is False or (pinned is None and fits and not away):
            return candidate(free, keeping.phases["step"]["least_bytes"]) if fits else None
        states = [replace(free, gradient_checkpointing=True, offload=host)]
        if self.memory.keep_attention is not False:
            states.append(replace(states[0], keep_attention=True))
        if self.memory.keep_attention:
            states = states[1:]
        if pinned:
            for levers in reversed(states):  # the faster first
                costs = self._costs(room.target, way, replace(levers, offload=False))
                if costs.phases["step"]["peak_allocated_bytes"] <= budget:
                    return candidate(levers, 0 if away else costs.phases["step"]["least_bytes"])
            return None
        others = []
        for levers in states:
            costs = self._costs(room.target, way, replace(levers, offload=False))
            others.append((costs, self._unit_seconds(room, keeping, costs, levers)))
        # A unit whose weights come and go cannot keep what it computed with them.
        saving = {i for i in moved if any(costs.kept[i] < keeping.kept[i] for costs, _ in others)}
        need = [2**62 if index in saving else size for index, size in enumerate(keeping.need)]
        found = choose_units(replace(keeping, need=need), others, budget)
        if found is None:
            return None
        chosen, _ = found
        twice = [name for index, name in enumerate(keeping.units) if chosen[index] or index in moved]
        kept = [name for name, number in zip(keeping.units, chosen, strict=True) if number == len(states)]
        attention = tuple(kept) if states[-1].keep_attention else ()
        levers = replace(free, gradient_checkpointing=tuple(twice), keep_attention=attention, offload=host)
        return candidate(levers, 0)

    def _may_offload(self, room: Room) -> bool:
        allowed = self.memory.offload is None or self.memory.offload is True
        return allowed and self.job.adapter is not None and room.has_host and room.context > 0

    def _accumulation(self, micro_batch: int) -> int:
        """Forwards per optimizer step; the last may be shorter."""
        return -(-self.batch_size // micro_batch)

    def _unit_seconds(self, room: Room, keeping: Costs, other: Costs, levers: Levers) -> list[float]:
        """What each unit takes longer in a forward and backward pass than in the trace that keeps all."""
        slow = DISPATCH_SECONDS if levers.keep_attention else 0.0

        def per_unit(costs: Costs) -> list[float]:
            rows: list[list[Row]] = [[] for _ in costs.units]
            for row in costs.work:
                if row[0] in ("forward", "backward") and row[1] % 2:
                    rows[row[1] // 2].append(row)
            return [room.speed.seconds(found) / costs.passes for found in rows]

        operators: Counter[int] = Counter()
        for phase, place, *_, times in keeping.work:
            if phase == "forward" and place % 2:
                operators[place // 2] += times
        return [
            max(0.0, after - before) + slow * 2 * operators[unit] / keeping.passes
            for unit, (before, after) in enumerate(zip(per_unit(keeping), per_unit(other), strict=True))
        ]

    def _time(self, room: Room, way: Way, levers: Levers) -> float:
        """Predicted seconds of an optimizer step."""
        size = _size(levers)
        keeping = self._costs(room.target, way, self._levers(way, size))
        passes = [row for row in keeping.work if row[0] != "optimizer"]
        once = [row for row in keeping.work if row[0] == "optimizer"]
        more = 0.0
        twice = named(levers.gradient_checkpointing, keeping.units)
        attention = named(levers.keep_attention, keeping.units) & twice
        for kept, chosen in ((False, twice - attention), (True, attention)):
            if chosen:
                state = self._levers(way, size, gradient_checkpointing=True, keep_attention=kept)
                costs = self._costs(room.target, way, state)
                seconds = self._unit_seconds(room, keeping, costs, state)
                more += sum(one for name, one in zip(keeping.units, seconds, strict=True) if name in chosen)
        one = room.speed.seconds(passes) / keeping.passes + more
        if levers.offload:
            # A unit's weights visit twice, meanwhile others compute.
            visits = 2 * sum(keeping.weights[name] for name in named(levers.offload, keeping.units))
            one = max(one, visits / HOST_LINK)
        sent = self._traffic(keeping, way, size)
        one = max(one, (sent.all_gather + sent.reduce_scatter) / sent.forwards / DEVICE_LINK)
        whole = one * self._accumulation(size) + room.speed.seconds(once)
        return max(whole, sent.all_reduce / DEVICE_LINK)

    def _traffic(self, known: Costs, way: Way, micro_batch: int) -> Traffic:
        """What a step sends, by the ledger of a trace."""
        ledger, count = known.phases["save"]["ledger"], self.processes
        learned, forwards = learned_bytes(ledger), self._accumulation(micro_batch)
        if not way.sharded:
            return traffic(processes=count, whole_learned=learned, forwards=forwards)
        if self.job.adapter is None:
            whole = learned * count
            return traffic(processes=count, split=whole, split_learned=whole, forwards=forwards)
        base = ledger.get(WEIGHTS, 0) * count
        return traffic(processes=count, split=base, whole_learned=learned, forwards=forwards)

    def _check(self, name: str, room: Room, way: Way, levers: Levers, ratio: float) -> Plan:
        """The plan as it would run, traced and replayed."""
        whole = self._costs(room.target, way, levers)
        levers, around = self._around(room, levers.among(whole.units), whole)
        phases = {**around, **whole.phases}
        locked = sum(whole.weights[unit] for unit in named(levers.offload, whole.units))
        hosted = self._hosted(levers, Waiting(locked, whole.paged, whole.saving))
        for key, found in phases.items():
            in_host = found["peak_allocated_bytes"] if room.target.name == "cpu" else hosted[key]
            phases[key] = {**found, "host_bytes": in_host}
        phases |= self._afterwards(room)
        phases = {key: phases[key] for key in PHASES if key in phases}
        least = max(int(found["least_bytes"]) for found in phases.values())
        need = room.needed(least)
        return Plan(
            device=name,
            budget_bytes=room.total,
            fits=need <= room.total,
            levers=levers,
            accumulation=self._accumulation(_size(levers)),
            optimizer=way.optimizer,
            blocks=len(whole.units),
            phases=phases,
            device_bytes=need,
            context_bytes=room.context,
            headroom_bytes=need - least - room.context,
            host_bytes=locked,
            relative_step_time=ratio,
            notes=_too_much_for_the_host(room, phases),
            processes=self.processes,
            traffic=self._traffic(whole, way, _size(levers)).as_json(),
            moments=tuple(whole.moments),
        )

    def _around(self, room: Room, levers: Levers, whole: Costs) -> tuple[Levers, dict[str, Phase]]:
        """The phases beside the steps, and the levers with what was chosen for those."""
        phases = {"load": self._load(room, levers)}
        captions, precision, phases["encode"] = self._encode(room, levers)
        levers = replace(levers, encode_on_host=captions == HOST, encode_by_layer=captions == LAYERS)
        levers = replace(levers, encode_precision=precision)
        levers = replace(levers, vae_tiling=bool(self.memory.vae_tiling))
        if self.job.class_pictures is not None:
            count, phases["class_pictures"] = self._class_pictures(room, captions)
            levers = replace(levers, class_batch=count)
        if self.job.preview is not None:
            ledger = whole.phases["save"]["ledger"]
            held = sum(ledger.get(part, 0) for part in (MASTERS, STATE))
            tiled, phases["preview"] = self._preview(room, levers, held)
            if room.target.name == "cpu" and self.job.judge_bytes:
                phases["preview"] = _beside(phases["preview"], "CLIP", self.job.judge_bytes)
            levers = replace(levers, vae_tiling=tiled)
        return levers, phases

    def _slower(self, room: Room, found: _Candidate, ratio: float) -> dict[str, Any]:
        size = _size(found.levers)
        units = self._costs(room.target, found.way, self._levers(found.way, size)).units
        scale = Scale(len(units), self._accumulation(size))
        return {
            "levers": measures(found.levers.among(units), found.way.optimizer, scale),
            "device_bytes": room.needed(found.least) if found.least else None,
            "relative_step_time": round(ratio, 4),
            "why": "not faster",
        }

    # Traces, made once

    def _costs(self, target: Target, way: Way, levers: Levers) -> Costs:
        """Of a step; what has nothing to do with it must be left out of the levers."""
        levers = Levers.of(levers.section())
        size = _size(levers)
        job = self._shared(replace(self.job, optimizer=way.optimizer), levers)

        def traced(rows: tuple[int, ...]) -> Costs:
            def make() -> dict[str, Any]:
                base = "" if levers.base_precision == "same" else f", {levers.base_precision} base"
                self.say(f"tracing a step of {' + '.join(map(str, rows))} samples{base}")
                return asdict(costs(trace_step(job, target, levers, rows=rows), target, len(rows)))

            return Costs.load(self._made(["step", asdict(target), rows, asdict(levers)], make, job))

        first, *others = splits(self.batch_size, size, mixed=job.mixed)
        whole = traced(first)
        one = whole.phases["step"]["ledger"].get(ACTIVATIONS, 0) / size
        if learned_bytes(whole.phases["save"]["ledger"]) < one / 2:
            return whole  # all gradients take less than what one sample more does
        phases = dict(whole.phases)
        for rows in others:
            for name, found in traced(rows).phases.items():
                phases[name] = max(phases[name], found, key=lambda phase: int(phase["least_bytes"]))
        return replace(whole, phases=phases)

    def _shared(self, job: Job, levers: Levers) -> Job:
        """A job as the processes share it; where nothing is split, how many they are does not matter."""
        if levers.sharding == "full":
            return replace(job, processes=self.processes)
        return replace(job, processes=min(self.processes, 2) if job.adapter is None else 1)

    def _load(self, room: Room, levers: Levers) -> Phase:
        """The phase in which the base is read; on a device of its own memory it takes none of that."""
        if room.target.name != "cpu":
            return {"peak_allocated_bytes": 0, "least_bytes": 0, "ledger": {}}
        size, ledger = self._base(levers).load()
        # The system takes pages of mapped files back where memory is short.
        least = size - ledger.get(FILES, 0)
        return {"peak_allocated_bytes": size, "least_bytes": least, "ledger": ledger}

    def _hosted(self, levers: Levers, waiting: Waiting) -> dict[str, int]:
        """Bytes of the host in each phase, where the device has a memory of its own."""
        previews, stay = self.job.preview is not None, levers.encode_on_host or levers.encode_by_layer
        found = on_host(self._base(levers), waiting, previews=previews, captions=stay)
        return {**found, "preview": found["preview"] + self.job.judge_bytes}

    def _base(self, levers: Levers) -> Base:
        plain = Levers(self.job.precision, levers.base_precision)

        def make() -> dict[str, Any]:
            return asdict(base_of(self.job, plain))

        return Base(**self._made(["base", asdict(plain)], make, self.job))

    def _afterwards(self, room: Room) -> dict[str, Phase]:
        """The phases of what is trained afterwards; of several of one name, the one that needs most."""
        phases: dict[str, Phase] = {}
        cases = [
            (after, rows)
            for after in self.after
            if room.target.name != "cpu"
            for rows in splits(after.batch_size, _size(after.levers), mixed=after.job.mixed)
        ]
        for after, rows in cases:

            def make(after: After = after, rows: tuple[int, ...] = rows) -> Phase:
                self.say(f"tracing a step of {after.phase}")
                traced = trace_step(after.job, room.target, after.levers, rows=rows).trace
                return phase_of(traced, traced.phases()[1:], room.target)

            key = ["after", asdict(room.target), asdict(after.levers), rows]
            found = {**self._made(key, make, after.job), "host_bytes": after.host_bytes}
            known = phases.get(after.phase)
            if known is None or found["least_bytes"] > known["least_bytes"]:
                phases[after.phase] = found
        return phases

    def encoding(self, room: Room) -> dict[str, Any]:
        """What a plan for the room puts under `memory:` about how pictures and captions are encoded."""
        captions, precision, _ = self._encode(room, Levers(self.job.precision))
        return {
            "encode_on_host": captions == HOST,
            "encode_by_layer": captions == LAYERS,
            "encode_precision": precision,
        }

    def _encode(self, room: Room, levers: Levers) -> tuple[str, str, Phase]:
        """Where captions are encoded (`PLACES`), in which precision pictures are, and the phase."""
        memory, own_memory = self.memory, bool(room.context)
        plain = Levers(self.job.precision)
        if room.target.name == "cpu" and self.job.packs:  # elsewhere the denoiser is not there
            plain = replace(plain, base_precision=levers.base_precision)
        places = [HOST] if memory.encode_on_host else [LAYERS] if memory.encode_by_layer else [DEVICE]
        if places == [DEVICE] and own_memory and room.has_host:
            places += [LAYERS] if memory.encode_by_layer is None else []
            places += [HOST] if memory.encode_on_host is None else []
        precisions = [memory.encode_precision or "fp32"]
        if memory.encode_precision is None and memory.approximate != "never" and "bf16" not in room.lacks:
            precisions.append("bf16")
        found: list[tuple[str, str, Phase]] = []
        for precision, captions in itertools.product(precisions, places):
            used = replace(plain, encode_precision=precision)

            def make(captions: str = captions, used: Levers = used) -> Phase:
                traced = trace_encode(self.job, room.target, used, captions=captions)
                return phase_of(traced, ("encode",), room.target)

            phase = self._made(["encode", asdict(room.target), asdict(used), captions], make, self.job)
            found.append((captions, precision, phase))
            if room.needed(phase["least_bytes"]) <= room.total:
                return found[-1]
        return min(found, key=lambda one: int(one[2]["least_bytes"]))

    def _class_pictures(self, room: Room, captions: str) -> tuple[int, Phase]:
        """How many class pictures are drawn at once, and the phase."""
        pinned = self.memory.class_batch
        for batch in [pinned] if pinned else divisors(CLASS_BATCH):

            def make(batch: int = batch) -> Phase:
                traced = trace_class_pictures(self.job, room.target, batch, captions=captions)
                return phase_of(traced, ("class pictures",), room.target)

            found = self._made(["class pictures", asdict(room.target), batch, captions], make, self.job)
            if room.needed(found["least_bytes"]) <= room.total:
                break
        return batch, found

    def _preview(self, room: Room, levers: Levers, held: int) -> tuple[bool, Phase]:
        """Whether previews are decoded in tiles, and the phase."""
        plain = Levers(self.job.precision, levers.base_precision, sharding=levers.sharding)
        job = self._shared(self.job, levers)
        if levers.offload:
            plain = replace(plain, gradient_checkpointing=levers.offload, offload=levers.offload)

        def phase(tiled: bool) -> Phase:
            def make() -> Phase:
                traced = trace_preview(job, room.target, plain, held=held, tiled=tiled)
                return phase_of(traced, ("preview forward", "preview decode"), room.target)

            return self._made(["preview", asdict(room.target), asdict(plain), held, tiled], make, job)

        if self.memory.vae_tiling is not None:
            return self.memory.vae_tiling, phase(self.memory.vae_tiling)
        found = phase(tiled=False)
        if room.needed(found["least_bytes"]) <= room.total:
            return False, found
        return True, phase(tiled=True)

    def _made(self, what: list[Any], make: Callable[[], dict[str, Any]], job: Job) -> dict[str, Any]:
        key = digest([what, code(), versions(), job.described()])
        if key not in self._known:
            kept = self.cache.read(key) if self.cache else None
            if kept is None:
                with collected_once():
                    self._known[key] = make()
            else:
                self._known[key] = kept
            if kept is None and self.cache:
                self.cache.write(key, self._known[key])
        found: dict[str, Any] = self._known[key]
        return found


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def cuts(number: int) -> list[int]:
    """Sizes of the larger parts into which samples can be cut evenly, largest first: 61, 31, 21, 13 ... 1.

    Of sizes that are nearly the same one is enough: what they cost differs by launches alone.
    """
    sizes = [number]
    for parts in range(2, number + 1):
        size = -(-number // parts)
        if size <= 0.8 * sizes[-1]:
            sizes.append(size)
    return sizes


def counts(most: int, tried: int) -> list[int]:
    """Whole numbers up to `most`, evenly spread: all, or about as many as are to be tried."""
    step = -(-most // tried)
    return list(range(most, 0, -step))[::-1]


def learned_bytes(at_rest: Mapping[str, int]) -> int:
    """What the gradients of all that is trained take, by the ledger of what is there between two steps."""
    return next((at_rest[name] for name in (MASTERS, TRAINED, ADAPTER) if name in at_rest), 0)


def _too_much_for_the_host(room: Room, phases: Mapping[str, Phase]) -> tuple[str, ...]:
    """What to be told of the host's memory."""
    most = max(phases, key=lambda name: int(phases[name]["host_bytes"]))
    size = int(phases[most]["host_bytes"])
    if room.host_bytes is None or size <= room.host_bytes:
        return ()
    told, free = most.replace("_", " "), format_bytes(room.host_bytes)
    return (f"the phase {told} takes {format_bytes(size)} of the host's memory, and {free} are free",)


def _beside(phase: Phase, name: str, size: int) -> Phase:
    """A phase on the CPU with something more in its memory."""
    sizes = {key: phase[key] + size for key in ("peak_allocated_bytes", "least_bytes")}
    return {**phase, **sizes, "ledger": {**phase["ledger"], name: size}}


def _hopeless(plan: Plan) -> bool:
    """Whether nothing that is chosen for the denoiser can help."""
    return not plan.fits and plan.peak_phase in HOPELESS


def _size(levers: Levers) -> int:
    assert levers.micro_batch is not None
    return levers.micro_batch


def _spread(number: int, count: int) -> list[int]:
    """`count` of the first `number` integers, evenly spread: others compute while one's weights come."""
    return sorted({index * number // count for index in range(count)})


def _rejected(plan: Plan, why: str) -> dict[str, Any]:
    return {
        "levers": plan.measures,
        "device_bytes": plan.device_bytes,
        "relative_step_time": round(plan.relative_step_time, 4),
        "why": why,
    }


def digest(value: Any) -> str:
    """Of any JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]
