"""`tunekit plan`: from a config to plans for a card, for what is here, or for every card of the table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import hardware
from tunekit.artifacts import write_json, write_text
from tunekit.config import Loaded, MemoryConfig, TrainingRunConfig
from tunekit.errors import ConfigError
from tunekit.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from tunekit.memory.planner import Plan, Planner, Room

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
    say: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Plans a training config.

    Args:
        loaded: the config.
        device: a card, "all", or a device that answers here; None is a nameless card of `budget`.
        budget: bytes that may be used, "8 GiB".
        say: takes progress lines.

    Returns:
        One plan per card; with "all", those that do not fit too.

    Raises:
        ConfigError: a recipe that trains nothing, or a budget that is none.
        DeviceError: an unknown card.
        DoesNotFit: the one card that was asked for does not do; says what would help.
    """
    from tunekit.memory.planner import advice, refuse

    config = loaded.config
    if not isinstance(config, TrainingRunConfig):
        raise ConfigError(
            f"the recipe {config.recipe} trains nothing, so there is no plan to make",
            where=loaded.where("recipe"),
        )
    size = parse_bytes(budget) if budget is not None else None
    if device == "all":
        plans = []
        for facts in hardware.TABLE.values():
            if facts.memory_bytes is None:
                continue
            planner, room, notes = _for_card(config, facts, size, say)
            plans.append(replace(planner.plan(facts.name, room), notes=notes))
        return plans
    if device is None or device.partition(":")[0] in HERE:
        planner, room, notes = _here(config, device, size, say)
        name = device or f"a card of {budget}"
    else:
        facts = hardware.find(device, where="--device")
        planner, room, notes = _for_card(config, facts, size, say)
        name = facts.name
    made = replace(planner.plan(name, room), notes=notes)
    if not made.fits:
        raise refuse(made, advice(planner, made, room, list(hardware.TABLE.values())))
    return [made]


def plan_run(
    config: TrainingRunConfig, folder: Path | None, processes: int, say: Callable[[str], None]
) -> MemoryConfig:
    """Plans a run for the device it is on, where `memory.budget` asks for it.

    Args:
        folder: of the run, for plan.json; None on processes that do not write.
        processes: that share the batch and, on the CPU, the memory.

    Returns:
        The memory section with micro_batch and gradient_checkpointing decided.

    Raises:
        DoesNotFit: before anything is loaded.
    """
    memory = config.memory
    if memory.budget is None:
        return memory
    from tunekit.memory.picture import draw
    from tunekit.memory.planner import advice, refuse

    budget = None if memory.budget == "auto" else parse_bytes(memory.budget)
    planner, room, _ = _here(config, memory.device, budget, lambda line: None)
    if room.context == 0:
        room = replace(room, total=room.total // processes)
    planner = replace(planner, batch_size=-(-planner.batch_size // processes))
    made = planner.plan(room.title, room)
    if not made.fits:
        raise refuse(made, advice(planner, made, room, list(hardware.TABLE.values())))
    say(
        f"plan: {made.words}; needs {format_bytes(made.device_bytes)} of {format_bytes(made.budget_bytes)}"
        f" (most in the phase {made.peak_phase}), step time x{made.relative_step_time:.2f}"
    )
    if folder is not None:
        write_json(folder / "plan.json", made.as_json())
        write_text(folder / "plan.svg", draw(made))
    blocks = list(made.checkpointed_blocks)
    return memory.model_copy(update={"micro_batch": made.micro_batch, "gradient_checkpointing": blocks})


def _for_card(
    config: TrainingRunConfig, facts: hardware.DeviceFacts, budget: int | None, say: Callable[[str], None]
) -> tuple[Planner, Room, tuple[str, ...]]:
    from tunekit.memory.planner import room_of

    precision, notes = config.memory.precision, []
    if precision == "bf16" and not facts.supports_bf16:
        precision = "fp16" if facts.kind == "cuda" else "fp32"
        notes.append(f"no bf16 there: needs memory.precision={precision}")
    elif precision == "fp16" and facts.kind in ("cpu", "mps"):
        precision = "fp32"
        notes.append("no fp16 training there: needs memory.precision=fp32")
    planner, more = _planner(config, precision, say)
    return planner, room_of(facts, budget=budget), (*notes, *more)


def _here(
    config: TrainingRunConfig, device: str | None, budget: int | None, say: Callable[[str], None]
) -> tuple[Planner, Room, tuple[str, ...]]:
    from tunekit.memory.planner import CONTEXT, Room, Speed, room_of
    from tunekit.memory.trace import CPU, CUDA

    planner, notes = _planner(config, config.memory.precision, say)
    if device is None:
        facts = replace(hardware.find("rtx-3060"), title="a card", memory_bytes=budget)
        return planner, replace(room_of(facts), total=budget or 0), notes
    found = hardware.probe(device)
    known = next((card for card in hardware.TABLE.values() if card.title in found.title), None)
    speed = (
        Speed(known.half_flops, known.float32_flops, known.bandwidth_bytes_s or 50e9)
        if known
        else Speed(1e12, 0.5e12, 50e9)
    )
    total = min(budget, found.free_bytes) if budget else found.free_bytes
    on_cpu = found.kind == "cpu"
    return planner, Room(found.title, total, 0 if on_cpu else CONTEXT, CPU if on_cpu else CUDA, speed), notes


def _planner(
    config: TrainingRunConfig, precision: str, say: Callable[[str], None]
) -> tuple[Planner, tuple[str, ...]]:
    from tunekit.memory.job import job_of
    from tunekit.memory.planner import Planner, trace_cache
    from tunekit.registry import FAMILIES

    data = getattr(config, "data")  # noqa: B009 - each training recipe declares its own
    job = job_of(config.model, data, config.adapter, config.train, config.preview, precision)
    rows = 2 if getattr(data, "class_prompt", None) else 1  # a class picture comes with each
    memory = config.memory
    planner = Planner(
        job,
        batch_size=config.train.batch_size * rows,
        micro_batch=memory.micro_batch,
        checkpointing=True if memory.gradient_checkpointing is True else None,
        cache=trace_cache(),
        say=say,
    )
    notes = []
    if job.blueprint.assumed:
        notes.append(
            f"the sizes of {job.blueprint.default_source} are assumed: {config.model.source} is not here"
        )
    if config.model.family not in FAMILIES.names():
        notes.append(f"{job.blueprint.title} can be planned, not run yet")
    return planner, tuple(notes)
