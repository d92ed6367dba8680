"""`tunekit plan`: from a config to plans for a card, for what is here, or for every card of the table.

`settle` does the same for a run, and writes the plan into its config.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunekit import hardware, optimizers
from tunekit.artifacts import Artifact, RunFolder, write_json
from tunekit.config import TRACKERS, Loaded, TrainingRunConfig
from tunekit.errors import (
    ArtifactError,
    ConfigError,
    DeviceError,
    OutOfMemory,
    TunekitError,
    is_out_of_memory,
    missing,
)
from tunekit.kept import Kept
from tunekit.units import format_bytes, parse_budget

if TYPE_CHECKING:
    from torch import nn

    from tunekit.config import AdapterConfig
    from tunekit.memory.job import Job
    from tunekit.memory.levers import Fitted, Levers
    from tunekit.memory.plan import Plan
    from tunekit.memory.planner import After, Planner
    from tunekit.memory.room import Room
    from tunekit.training.run import Processes

C = TypeVar("C", bound=TrainingRunConfig)
SHRINK, ATTEMPTS = 0.85, 3
"""When memory runs out in spite of a plan: the next may need this share of it, and so often."""
DATA = {"path": True, "cache": True, "validation": True}
"""Keys of `data:` that a plan does not follow from."""
MARGIN = 0.05
"""Share of the memory that a plan should leave; where it leaves less, the next one is said too."""
DISPLAY = 2**30
"""Bytes that a desktop and a browser usually take of the card that they are shown by."""
HERE = ("auto", "cpu", "cuda", "xpu", "mps")


def sweeps(overrides: Sequence[str], swept: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the swept values, as overrides.

    Args:
        overrides: `a.b=c`; with `swept`, a list such as `a.b=c,d` among them is swept too.
        swept: `a.b=c,d`.

    Raises:
        ConfigError: a sweep without values.
    """
    axes: list[list[str]] = []
    fixed: list[str] = []
    for text in (*swept, *overrides):
        key, equals, values = text.partition("=")
        if text in swept and (not equals or not values):
            raise ConfigError(f'"{text}" sweeps nothing', where="--sweep", hint="write a.b=first,second")
        if swept and "," in values and values[0] not in "[{\"'":
            axes.append([f"{key}={value}" for value in values.split(",")])
        else:
            fixed.append(text)
    for chosen in itertools.product(*axes):
        yield [*fixed, *chosen]


def plan_config(
    loaded: Loaded,
    *,
    device: str | None = None,
    budget: str | None = None,
    display: bool = False,
    cards: Collection[str] = (),
    devices: int = 1,
    strict: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Plans a training config.

    Args:
        loaded: the config.
        device: a card, "all", or a device that answers here; None is a nameless card of `budget`.
        budget: bytes that may be used, "8 GiB".
        display: whether a display is on the card, which takes `DISPLAY` of it.
        cards: of "all", names of those to plan for; default all.
        devices: how many such train together; the plan is of one of them. Each needs a sample of the batch
            at least: where train.batch_size is less, it is taken to be as many as there are devices.
        strict: whether a plan for one card that does not fit is an error.
        say: takes progress lines.

    Returns:
        One plan per card; with "all", those that do not fit too.

    Raises:
        ConfigError: a recipe that trains nothing, or a budget that is none.
        DeviceError: an unknown card, or one that lacks what the config asks for.
        DoesNotFit: the one card that was asked for does not do; says what would help.
    """
    config = loaded.config
    if not isinstance(config, TrainingRunConfig):
        raise ConfigError(
            f"the recipe {config.recipe} trains nothing, so there is no plan to make",
            where=loaded.where("recipe"),
        )
    size = parse_budget(budget) if budget is not None else None
    config = _for_all(config, devices)
    if device is None or device.partition(":")[0] in HERE:
        name = device or f"a card of {budget}"
        place = _here(config, device, size)
        return [_planned(config, place, name, say, processes=devices, strict=strict, roomy=strict)]
    if device != "all":
        try:
            facts = hardware.find(device, where="--device")
        except DeviceError as error:
            other = 'for any other card say how much memory it has: --budget "10 GiB" without --device'
            error.hint = f"{error.hint}\n{other}"
            raise
        _refuse_what_it_lacks(config, facts, loaded)
        return [_known(config, facts, size, say, strict=strict, display=display, processes=devices)]
    machine = hardware.machine_memory()[0]
    chosen = [hardware.find(name) for name in cards] if cards else hardware.TABLE.values()
    return [
        _known(
            config,
            replace(facts, memory_bytes=facts.memory_bytes or machine),
            size,
            say,
            display=display,
            processes=devices,
        )
        for facts in chosen
    ]


def _for_all(config: C, devices: int) -> C:
    """A config with a sample for each device at least."""
    if config.train.batch_size >= devices:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": devices})})


def unmet(loaded: Loaded, *, processes: int = 1, local: int | None = None) -> list[TunekitError]:
    """What this machine lacks for a config: its device, arithmetic and packages. Nothing is loaded for it.

    Each problem names its key and the line. What the memory is enough for is `plan_config`'s.

    Args:
        processes: that the run is to have.
        local: those of them that are on this machine; None is all.
    """
    config = loaded.config
    here = processes if local is None else local
    memory = getattr(config, "memory", None)
    if memory is None:
        return []
    found: list[TunekitError] = []

    def note(error: TunekitError | None, key: str) -> None:
        if error is not None:
            error.key, error.where = key, loaded.where(key)
            found.append(error)

    device = None
    try:
        device = hardware.probe(memory.device)
        kind = device.torch_device.partition(":")[0]
        if here > 1 and kind in {"cuda", "xpu"}:
            hardware.probe(f"{kind}:{here - 1}")
    except DeviceError as error:
        note(error, "memory.device")
    if not isinstance(config, TrainingRunConfig):
        return found
    train = config.train
    if device is not None:
        note(hardware.without_precision(device, memory.precision), "memory.precision")
        note(hardware.without_packing(device, memory.base_precision), "memory.base_precision")
        facts = hardware.resembling(device)
        if facts is not None:
            for key, lacking in _lacking(config, facts):
                note(lacking, key)
    if memory.base_precision == "nf4":
        note(missing("bitsandbytes", extra="quant", why="nf4 needs"), "memory.base_precision")
    note(optimizers.absent(train.optimizer), "train.optimizer")
    for name in train.trackers:
        note(missing(name, extra=TRACKERS[name], why="it needs"), "train.trackers")
    for key, wrong in _too_many(config, processes):
        note(wrong, key)
    return found


def _too_many(config: TrainingRunConfig, processes: int) -> Iterator[tuple[str, ConfigError]]:
    """What a config cannot do in as many processes."""
    if processes > 1 and config.memory.optimizer_in_backward:
        yield (
            "memory.optimizer_in_backward",
            ConfigError(
                f"works in one process, and there are {processes}",
                hint="gradients of all processes are summed before an update; leave it out",
            ),
        )
    if processes > config.train.batch_size:
        yield (
            "train.batch_size",
            ConfigError(
                f"{config.train.batch_size} is too little for {processes} processes",
                hint=f"set it to {processes} or more, or start fewer processes",
            ),
        )


def settle(config: C, processes: Processes | None = None) -> tuple[C, Plan | None]:
    """What a run does on the device it is on: a config with nothing left to be decided, and the plan.

    Precision and optimizer are made definite; where `memory.budget` asks for it, the rest of `memory:` is
    planned for what is free. A run that was begun keeps what it was planned with as far as it changes what is
    learned. The first process decides for all of them, by the device that has the least free, so that they
    never differ.

    Args:
        processes: of the run; one alone if not given.

    Raises:
        DeviceError: the device is not there.
        DoesNotFit: before anything is loaded; on all processes.
    """
    from tunekit.training.run import Processes

    group = processes or Processes()
    if config.memory.budget is not None:
        hardware.forget()  # what an attempt before kept would not count as free
    found = hardware.probe(config.memory.device)
    host = None if found.kind == "cpu" else hardware.probe("cpu").free_bytes
    devices, hosts, beside = zip(*group.gather((found, host, group.local)), strict=True)
    group = replace(group, local=max(beside))
    least = replace(
        min(devices, key=lambda device: device.free_bytes),
        supports_bf16=all(device.supports_bf16 for device in devices),
    )
    known = [size for size in hosts if size is not None]
    free_on_host = min(known) if known else None
    update, optimizer, plan = group.decide(lambda: _decide(config, least, free_on_host, group))
    memory = config.memory.model_copy(update=update)
    train = config.train.model_copy(update={"optimizer": optimizer})
    return config.model_copy(update={"memory": memory, "train": train}), plan


def settle_encoding(config: C, *, sharers: int = 1) -> C:
    """What `settle` says of how pictures and captions are encoded, on the device that this process is on.

    Where else a training would need more memory than there is does not matter here.

    Args:
        sharers: processes that encode on this device.

    Raises:
        DeviceError: the device is not there.
    """
    memory, update = config.memory, {}
    if memory.budget is None:
        return config
    begun = _begun(config.run_dir)
    if begun and memory.encode_precision is None:
        update["encode_precision"] = (begun.get("memory") or {}).get("encode_precision") or "fp32"
    hardware.forget()
    found = hardware.probe(memory.device)
    host = None if found.kind == "cpu" else hardware.probe("cpu").free_bytes
    asked = config.model_copy(update={"memory": memory.model_copy(update=update)})
    budget = found.free_bytes if memory.budget == "auto" else parse_budget(memory.budget)
    place = _place(asked, found, host, min(budget, found.free_bytes // sharers))
    planner, room, _ = _planner(asked, place, 1, lambda line: None)
    return config.model_copy(update={"memory": memory.model_copy(update=planner.encoding(room))})


def _decide(
    config: TrainingRunConfig, device: hardware.Device, host_bytes: int | None, group: Processes
) -> tuple[dict[str, Any], str, Plan | None]:
    """What `settle` puts under `memory:`, the optimizer, and the plan."""
    memory, train = config.memory, config.train
    precision = memory.precision
    if precision == "auto":
        precision = hardware.best_precision(device.kind, device.supports_bf16)
    optimizer = optimizers.find(train.optimizer).name
    kept: dict[str, Any] = {"precision": precision}
    if group.count == 1 and memory.sharding is not None:
        kept["sharding"] = "none"  # a run may go on in another number of processes
    elif memory.sharding == "full" and precision == "fp16" and config.adapter is None:
        raise ConfigError(
            f"memory.sharding=full does not go with fp16, which is what {device.title} has, where all weights"
            " are trained",
            hint="set memory.precision=fp32, or memory.sharding=none",
        )
    begun = _begun(config.run_dir)
    if begun and memory.budget is not None:
        if train.optimizer == optimizers.AUTO:
            optimizer = begun["optimizer"]
        kept["optimizer_in_backward"] = begun["optimizer_in_backward"]
        if memory.base_precision is None:
            packed = begun["base_precision"] != begun["precision"]
            kept["base_precision"] = begun["base_precision"] if packed else "same"
        if memory.encode_precision is None:
            before = begun.get("memory")
            kept["encode_precision"] = (before or {}).get("encode_precision") or "fp32"
    if memory.budget is None or _is_trained(config):
        return kept, optimizer, None
    pinned = train.model_copy(update={"optimizer": optimizer})
    asked = pinned if begun or train.optimizer != optimizers.AUTO else train
    open_config = config.model_copy(update={"memory": memory.model_copy(update=kept), "train": asked})
    budget = None if memory.budget == "auto" else parse_budget(memory.budget)
    # It may have run out before there was a checkpoint.
    ran_out = _begun(config.run_dir, always=True).get("ran_out", ())
    lost = min((int(one["budget_bytes"]) for one in ran_out), default=None)
    if lost is not None:
        budget = min(budget or lost, lost)
    place = _place(open_config, device, host_bytes, budget, group.local)
    made = _planned(open_config, place, place.title, lambda line: None, processes=group.count)
    return {**kept, **made.memory()}, made.optimizer, made


def ran_out(config: TrainingRunConfig, error: BaseException) -> OutOfMemory | None:
    """What to raise where memory ran out while a run trained in spite of its plan; None for other errors.

    The next plan shall ask for less, which is noted in plan.json. The error's `replan` says whether to start
    again at once (`memory.on_oom=replan`).
    """
    if isinstance(error, OutOfMemory):
        short = error
    elif is_out_of_memory(error):
        text = str(error).strip().partition("\n")[0]
        short = OutOfMemory(f"memory ran out ({text})", hint="memory.budget=auto plans a run that fits")
    else:
        return None
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # others may wait for this process
    plan = _begun(config.run_dir, always=True)
    if config.memory.budget is not None and plan and alone:
        known = plan.get("ran_out", [])
        less = {"budget_bytes": round(int(plan["device_bytes"]) * SHRINK), "why": short.message}
        write_json(config.run_dir / "plan.json", {**plan, "ran_out": [*known, less]})
        short.replan = config.memory.on_oom == "replan" and len(known) < ATTEMPTS
    return short


def _begun(run_dir: Path, *, always: bool = False) -> dict[str, Any]:
    """The plan.json of a run that has learned something already; empty without."""
    from tunekit.records import PlanRecord, read_plain

    run = RunFolder(run_dir)
    if not always and not run.begun():
        return {}
    try:
        content = read_plain(run_dir / "plan.json", PlanRecord)
    except (FileNotFoundError, ArtifactError):  # a file beside the run, which goes on without
        return {}
    decided = ("optimizer", "optimizer_in_backward", "precision", "base_precision")
    return content if all(content.get(key) is not None for key in decided) else {}


def _is_trained(config: TrainingRunConfig) -> bool:
    """Whether the run has nothing left to train, so that only its passes follow."""
    path = RunFolder(config.run_dir).trained()
    if path is None:
        return False
    step = Artifact.load(path).step
    return step is not None and int(step.details.get("step", 0)) >= config.train.max_steps


@dataclass(frozen=True)
class _Place:
    """Where a job shall fit, before torch is imported.

    Attributes:
        title: for people.
        facts: a card of the table, or the nearest to what is here.
        total: bytes that may be used, None for all of the card.
        precision: what arithmetic it can.
        is_here: not a card of the table, but a device that answers.
        on_cpu, host_bytes, why_less: see `room.Room`.
    """

    title: str
    facts: hardware.DeviceFacts
    total: int | None
    precision: str
    is_here: bool = False
    on_cpu: bool = False
    host_bytes: int | None = None
    why_less: str = ""
    notes: tuple[str, ...] = ()


def _known(
    config: TrainingRunConfig,
    facts: hardware.DeviceFacts,
    budget: int | None,
    say: Callable[[str], None],
    *,
    strict: bool = False,
    display: bool = False,
    processes: int = 1,
) -> Plan:
    """The plan for a card of the table; the second time without importing torch."""
    precision, notes = config.memory.precision, []
    if display and facts.kind != "cpu" and facts.memory_bytes:
        own = round(facts.memory_bytes * hardware.SHOWN) - DISPLAY
        budget = min(budget or own, own)
        notes.append(f"{format_bytes(DISPLAY)} are left to the display")
    usable = hardware.best_precision(facts.kind, facts.supports_bf16)
    if precision == "auto":
        precision = usable
    elif precision == "bf16" and not facts.supports_bf16:
        precision = usable
        notes.append(f"no bf16 there: needs memory.precision={usable}")
    elif precision == "fp16" and usable == "fp32":
        precision = usable
        notes.append("no fp16 training there: needs memory.precision=fp32")
    place = _Place(facts.title, facts, budget, precision, notes=tuple(notes))
    return _planned(config, place, facts.name, say, processes=processes, strict=strict, roomy=strict)


def _planned(
    config: TrainingRunConfig,
    place: _Place,
    name: str,
    say: Callable[[str], None],
    *,
    processes: int = 1,
    strict: bool = True,
    roomy: bool = False,
) -> Plan:
    """A plan, made once.

    Args:
        roomy: look for the plan that leaves more, where this one leaves little.

    Raises:
        DoesNotFit: with `strict`.
    """
    from tunekit.memory.plan import Plan, refuse

    kept, key = Kept.of("plans"), _digest(config, place, name, processes, roomy)
    known = kept.read(key)
    if known is not None:
        made = Plan.load(known)
        if made.fits or not strict:
            return made
    from tunekit.memory.advice import advice

    planner, room, notes = _planner(config, place, processes, say)
    made = planner.plan(name, room)
    tight = [_with_a_margin(planner, made, room)] if roomy and made.fits and made.margin < MARGIN else []
    made = replace(made, notes=(*place.notes, *notes, *made.notes, *tight))
    if made.fits or not strict:
        if not place.is_here:  # what is free here is different each time
            kept.write(key, made.dump())
        return made
    hint = advice(planner, made, room, list(hardware.TABLE.values()))
    absent = _without_bitsandbytes(place)
    raise refuse(made, f"{hint}\n{absent.message}" if absent else hint, room.why_less)


def _without_bitsandbytes(place: _Place) -> TunekitError | None:
    """What is to be said where it is not installed, on a device that answers: no plan may need it then."""
    if not place.is_here or "bitsandbytes" in place.facts.lacks:
        return None
    return missing("bitsandbytes", extra="quant", why="nf4 and 8-bit optimizer state, not looked at, need")


def _with_a_margin(planner: Planner, made: Plan, room: Room) -> str:
    """What a plan with more left over would be, for people whose card has a little less than was thought."""
    said = f"only {made.margin:.1%} of the memory is left over"
    wanted = round(room.total * (1 - MARGIN))
    other = planner.plan(made.device, replace(room, total=wanted))
    if not other.fits:
        return f"{said}, and nothing leaves {MARGIN:.0%}"
    return (
        f"{said}; the next plan needs {format_bytes(other.device_bytes)}, step time"
        f' x{other.relative_step_time:.2f} ({other.words}): --budget "{wanted / 2**30:.1f} GiB"'
    )


def _digest(config: TrainingRunConfig, place: _Place, name: str, processes: int, roomy: bool = False) -> str:
    """Of all that a plan follows from: the config, the files of a local model, the device, and the code."""
    from tunekit.memory.plan import code, versions

    parts: list[Any] = [
        config.model_dump(
            mode="json", exclude={"name": True, "runs": True, "seed": True, "optimize": True, "data": DATA}
        ),
        asdict(place),
        name,
        processes,
        roomy,
        _taught(config),
        versions(),
        code(),
    ]
    opened = config.model.opened
    places = [place.path for place in (opened, opened.rest) if place is not None and place.path is not None]
    for model in places:
        # How weights are stored decides what reading them takes.
        weights = sorted(model.glob("*/*.safetensors")) if model.is_dir() else [model]
        parts += [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in weights]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for source in (file for model in places for file in sorted(model.glob("*/*config.json"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _refuse_what_it_lacks(config: TrainingRunConfig, facts: hardware.DeviceFacts, loaded: Loaded) -> None:
    """Errors for what was set and the card cannot do."""
    for key, error in _lacking(config, facts):
        error.where = loaded.where(key)
        raise error


def _lacking(config: TrainingRunConfig, facts: hardware.DeviceFacts) -> Iterator[tuple[str, DeviceError]]:
    """What was set that needs what a card lacks."""
    needs = []
    if config.memory.base_precision == "nf4":
        needs.append(("memory.base_precision", "nf4", "bitsandbytes"))
    if config.memory.base_precision == "fp8":
        needs.append(("memory.base_precision", "fp8", "float8"))
    if optimizers.find(config.train.optimizer).extra:
        needs.append(("train.optimizer", config.train.optimizer, "bitsandbytes"))
    for key, what, needed in needs:
        if needed in facts.lacks:
            message = f"{what} needs {needed}, which does not run on {facts.title}"
            yield key, DeviceError(message, hint="leave it out; int8 and adafactor run everywhere", key=key)


def _here(config: TrainingRunConfig, device: str | None, budget: int | None) -> _Place:
    """The device that answers here; None is a nameless card."""
    if device is None:
        facts = replace(hardware.find("rtx-3060"), title="a card", memory_bytes=budget)
        asked = config.memory.precision
        return _Place("a card", facts, budget, "bf16" if asked == "auto" else asked)
    found = hardware.probe(device)
    host = None if found.kind == "cpu" else hardware.probe("cpu").free_bytes
    return _place(config, found, host, budget)


def _place(
    config: TrainingRunConfig,
    found: hardware.Device,
    host_bytes: int | None,
    budget: int | None,
    sharers: int = 1,
) -> _Place:
    """A device that answers.

    Args:
        host_bytes: free in the memory of the host; None where that is the device's own.
        budget: bytes that may be used; None is all that is free.
        sharers: processes on one machine, which share its processor's memory.
    """
    facts = hardware.resembling(found) or replace(
        hardware.find("cpu"),
        kind=found.kind,
        title=found.title,
        supports_bf16=found.supports_bf16,
        compute_capability=None if found.supports_bf16 or found.kind != "cuda" else (7, 5),
    )
    precision = config.memory.precision
    if precision == "auto":
        precision = hardware.best_precision(found.kind, found.supports_bf16)
    total = min(budget, found.free_bytes) if budget else found.free_bytes
    on_cpu = found.kind == "cpu"
    if on_cpu:
        total //= sharers
    return _Place(found.title, facts, total, precision, True, on_cpu, host_bytes, found.note)


def _planner(
    config: TrainingRunConfig, place: _Place, processes: int, say: Callable[[str], None]
) -> tuple[Planner, Room, tuple[str, ...]]:
    from tunekit.memory.job import job_of
    from tunekit.memory.planner import Planner
    from tunekit.memory.room import room_of

    data = getattr(config, "data")  # noqa: B009 - each training recipe declares its own
    job = job_of(config, data, place.precision)
    rows = 2 if getattr(data, "class_prompt", None) else 1  # a class picture comes with each
    memory = config.memory
    if processes > 1 and memory.optimizer_in_backward is None:
        memory = memory.model_copy(update={"optimizer_in_backward": False})
    planner = Planner(
        job,
        batch_size=-(-config.train.batch_size * rows // processes),
        memory=memory,
        may_change_optimizer=config.train.optimizer == optimizers.AUTO,
        processes=processes,
        after=_afterwards(config, job),
        cache=Kept.of("traces"),
        say=say,
    )
    room = room_of(place.facts, budget=place.total, real=place.is_here)
    room = replace(room, title=place.title, host_bytes=place.host_bytes, why_less=place.why_less)
    if _without_bitsandbytes(place):
        room = replace(room, lacks=(*room.lacks, "bitsandbytes"))
    notes = []
    facts = job.sizes.family.facts
    if job.sizes.assumed:
        notes.append(f"the sizes of {facts.default_source} are assumed: {config.model.source} is not here")
    if not facts.runs:
        notes.append(f"{job.sizes.title} can be planned, not run yet")
    return planner, room, tuple(notes)


def _taught(config: TrainingRunConfig) -> list[Any]:
    """The passes of the chain that train."""
    kinds = ("heal", "distill")
    return [
        item
        for item in config.optimize
        if any(kind in ([item] if isinstance(item, str) else item) for kind in kinds)
    ]


def _afterwards(config: TrainingRunConfig, job: Job) -> list[After]:
    """What the chain's passes train: a model of the base's size, as if nothing had been pruned.

    Raises:
        ChainError: their settings are wrong.
    """
    items = _taught(config)
    if not items:
        return []
    from tunekit.config import TrainConfig
    from tunekit.memory.job import Job, bytes_of
    from tunekit.memory.planner import After
    from tunekit.passes.base import parse_chain

    # Models are read whole, in float32, before their denoisers leave for the device.
    read = sum(bytes_of(*part.build().parameters()) for part in job.sizes.networks)
    found = []
    for step in parse_chain(items):
        if step.kind == "distill" and not job.sizes.family.facts.runs:
            continue  # nobody knows its sampler
        one = _healing(step, job) if step.kind == "heal" else _distilling(step, config, job)
        taught = Job(
            job.sizes,
            one.adapter,
            optimizers.find(one.step.optimizer).name,
            one.step.precision,
            job.size,
            TrainConfig(max_steps=1, lr=1.0).max_grad_norm,
            mixed=job.mixed,
            make_task=one.make,
            task=one.name,
        )
        found.append(After(step.kind, taught, one.levers, one.step.batch_size, one.models * read))
    return found


@dataclass(frozen=True)
class _Taught:
    """A pass that trains.

    Attributes:
        step: reads optimizer, precision and batch_size.
        adapter: what it trains; None is all weights.
        make: its task.
        name: of the task.
        levers: how its memory is arranged.
        models: whole ones that it reads.
    """

    step: Any
    adapter: AdapterConfig | None
    make: Callable[[Fitted], Any]
    name: str
    levers: Levers
    models: int


def _healing(step: Any, job: Job) -> _Taught:
    """All weights or an adapter, beside a teacher of the size."""
    from tunekit.training.distill import Distillation

    sizes, weight, decay = job.sizes, step.feature_weight, step.ema

    def make(fitted: Fitted) -> Distillation:
        teacher: nn.Module = sizes.denoiser.build()
        return Distillation(fitted, sizes.family, teacher, job.learned(), weight, decay=decay)

    name = f"distillation {weight}{' mean' if decay else ''}"
    return _Taught(step, step.adapter, make, name, step.levers, 2)


def _distilling(step: Any, config: TrainingRunConfig, job: Job) -> _Taught:
    """An adapter, without which its network is the teacher; or all weights, beside a teacher of the size."""
    import torch

    from tunekit.diffusion.sampling import sampler
    from tunekit.training.consistency import Guidance, Teacher

    sizes, family, objective = job.sizes, job.sizes.family, job.learned()
    sampling = config.preview.sampling.over(family.facts.sampling)
    guidance = (sampling.guidance or 0.0) if step.guidance is None else step.guidance
    stand_in = sizes.pipeline()
    asked = Guidance.of(family, stand_in, guidance, sizes.encoded(1))
    learned = step.learned(family, stand_in, sampling.model_copy(update={"guidance": guidance}))
    latents = torch.zeros(1, *family.latent_shape(sizes.configs, *job.size))
    way = step.way(family, sampler(stand_in.scheduler, learned), learned, latents, objective)

    def make(fitted: Fitted) -> Any:
        own: nn.Module | None = None if step.adapter else sizes.denoiser.build()
        return step.task(fitted, family, Teacher(asked, own), learned, objective, way)

    name = f"{step.method} {asked.scale is not None} {step.ema > 0}"
    return _Taught(step, step.adapter, make, name, step.levers, 1)
