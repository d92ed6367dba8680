"""The command plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Config, Overrides
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tunekit.memory.plan import Plan

MOST_DEVICES = 4096


def plan(
    config: Config,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help='a card such as rtx-3060, "all", or what answers here: auto, cuda:1')
    ] = None,
    budget: Annotated[str | None, typer.Option(help='memory that may be used: "8 GiB"')] = None,
    display: Annotated[
        bool, typer.Option("--display", help="a display is on the card: leave it 1 GiB")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(metavar="1,2,8", help="so many of the device together: the plan of each one of them"),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="a.b=c,d", help="plan each of these values; repeatable")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="draw the memory of a step into this .svg or .html file")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a training's memory and find the fastest way that fits. No GPU, weights or network needed."""
    from tunekit import planning, workspace

    console = screen.console(stderr=True)
    plans = []
    counts = _counts(devices)
    if len(counts) > 1 and (sweep or device == "all" or (device is None and budget is None)):
        raise ConfigError(
            "several numbers of devices are planned for one card and one config",
            where="--devices",
            hint="add --device CARD or --budget, without --sweep; or give one number",
        )
    for varied in planning.sweeps(overrides or [], sweep or []):
        found = []
        for count in counts:
            found += workspace.plan(
                config,
                *varied,
                device=device,
                budget=budget,
                display=display,
                devices=count,
                strict=len(counts) == 1,
                say=lambda line: console.print(line, style="dim"),
            )
        plans.append((varied, found))
    if picture is not None:
        file = workspace.picture_plans([made for _, found in plans for made in found], picture)
        console.print(f"picture: {file}", style="dim")
    code = 0 if any(made.fits for _, found in plans for made in found) else 2
    if as_json:
        flat = [made.as_json() for _, found in plans for made in found]
        screen.print_json(flat[0] if len(flat) == 1 else flat)
        raise typer.Exit(code)
    out = screen.console()
    if sweep:
        _show_sweep(out, config, plans)
        raise typer.Exit(code)
    ((varied, found),) = plans
    out.print(f"\n{config} {' '.join(varied)}".rstrip(), style="bold")
    if len(found) == 1:
        _show_plan(out, found[0])
    elif len(counts) > 1:
        _show_counts(out, found)
    else:
        _show_cards(out, found)
    raise typer.Exit(code)


def _counts(text: str | None) -> list[int]:
    """Numbers of devices."""
    parts = (text or "1").split(",")
    if not all(part.strip().isdigit() and 0 < int(part) <= MOST_DEVICES for part in parts):
        raise ConfigError(
            f'"{text}" is no list of numbers from 1 to {MOST_DEVICES}',
            where="--devices",
            hint="write it as 1,2,8,64",
        )
    return [int(part) for part in parts]


def _show_counts(console: Console, plans: Sequence[Plan]) -> None:
    """A column for each number of devices: what each of them has in a step, and what it sends."""
    from tunekit.units import format_bytes

    first = plans[0]
    console.print(f"{first.device}, {format_bytes(first.budget_bytes)}")
    step = [made.phases["step"] for made in plans]
    names = list(dict.fromkeys(name for found in step for name in found["ledger"]))
    rows: list[list[str]] = [["fits", *("yes" if made.fits else "no" for made in plans)]]
    for name in names:
        sizes = (found["ledger"].get(name) for found in step)
        rows.append([name, *("-" if size is None else format_bytes(size) for size in sizes)])
    rows.append(["a step, allocated", *(format_bytes(found["peak_allocated_bytes"]) for found in step)])
    rows.append(["needs", *(format_bytes(made.device_bytes) for made in plans)])
    rows.append(["most in the phase", *(made.peak_phase.replace("_", " ") for made in plans)])
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        sent = [made.traffic.get(f"{name}_bytes", 0) for made in plans]
        if any(sent):
            rows.append(
                [f"{name.replace('_', '-')} per step", *(format_bytes(s) if s else "-" for s in sent)]
            )
    numbers = {text: str(n) for n, text in enumerate(dict.fromkeys(made.words for made in plans), start=1)}
    rows.append(["plan", *(numbers[made.words] for made in plans)])
    columns = ("of each device", *(f"{made.processes} device{'s'[: made.processes > 1]}" for made in plans))
    screen.show_table(console, columns, rows)
    console.print()
    screen.show_table(console, ("plan", ""), [(number, text) for text, number in numbers.items()], words=True)
    for note in dict.fromkeys(note for made in plans for note in made.notes):
        screen.say(console, note, "yellow")


def _show_sweep(console: Console, config: str, plans: Sequence[tuple[Sequence[str], Sequence[Plan]]]) -> None:
    """A row for each value that is tried; of all cards, a row for each card and a column for each value."""
    from tunekit.units import format_bytes

    shared = [text for text in plans[0][0] if all(text in varied for varied, _ in plans)]
    tried = [[re.sub(r"^[\w.]+\.", "", text) for text in varied if text not in shared] for varied, _ in plans]
    console.print(f"\n{config} {' '.join(shared)}".rstrip(), style="bold")
    if all(len(found) == 1 for _, found in plans):
        first = plans[0][1][0]
        shared_budget = len({made.budget_bytes for _, (made,) in plans}) == 1
        console.print(
            f"{first.device}, {format_bytes(first.budget_bytes)}" if shared_budget else first.device
        )
        titles = [", ".join(values) for values in tried]
        named = list(zip(titles, [found[0] for _, found in plans], strict=True))
        _show_plans(console, "", named, budgets=not shared_budget)
        return
    rows: list[list[str]] = []
    for made in zip(*(found for _, found in plans), strict=True):
        rows.append([made[0].device, *(_brief(plan) for plan in made)])
    screen.show_table(console, ("card", *("\n".join(values) for values in tried)), rows)
    told = (
        "needed memory, step time; no: does not fit. --device CARD shows the plans, and the RAM of the host"
    )
    screen.say(console, told, "dim")


def _show_cards(console: Console, plans: Sequence[Plan]) -> None:
    shared = [note for note in plans[0].notes if all(note in made.notes for made in plans)]
    for note in shared:
        screen.say(console, note, "yellow")
    _show_plans(console, "card", [(made.device, made) for made in plans], known=shared)


def _needs(made: Plan) -> str:
    from tunekit.units import format_bytes

    return format_bytes(made.device_bytes)


def _brief(made: Plan) -> str:
    """What a plan needs, in a cell."""
    return f"{_needs(made)} {_time(made)}" if made.fits else f"{_needs(made)} no"


def _ram(made: Plan) -> str:
    """Of the host, where that has a memory of its own."""
    from tunekit.units import format_bytes

    return format_bytes(made.ram_bytes) if made.context_bytes else "-"


def _time(made: Plan) -> str:
    return f"x{made.relative_step_time:.2f}" if made.fits else "-"


def _show_plans(
    console: Console,
    title: str,
    plans: Sequence[tuple[str, Plan]],
    known: Sequence[str] = (),
    *,
    budgets: bool = True,
) -> None:
    """A row for each plan; where their words are too long for that, they stand below, each once.

    Args:
        budgets: whether what each may take is shown.
    """
    from rich.text import Text

    from tunekit.units import format_bytes

    words = ["; ".join([made.words, *(n for n in made.notes if n not in known)]) for _, made in plans]
    columns = (title, "fits", "needs", *(["of"] if budgets else []), "RAM", "step time", "plan")

    def rows(last: Sequence[str]) -> list[tuple[str | Text, ...]]:
        fits = [Text("yes", "green") if made.fits else Text("no", "red") for _, made in plans]
        return [
            (
                *(name, fit, _needs(made)),
                *([format_bytes(made.budget_bytes)] if budgets else []),
                *(_ram(made), _time(made), text),
            )
            for (name, made), fit, text in zip(plans, fits, last, strict=True)
        ]

    if screen.fits(console, columns, rows(words)):
        screen.show_table(console, columns, rows(words))
        return
    numbers = {text: str(number) for number, text in enumerate(dict.fromkeys(words), start=1)}
    screen.show_table(console, columns, rows([numbers[text] for text in words]))
    console.print()
    screen.show_table(console, ("plan", ""), [(number, text) for text, number in numbers.items()], words=True)


def _show_plan(console: Console, made: Plan) -> None:
    from rich.text import Text

    from tunekit.units import format_bytes

    screen.say(console, f"{made.device}: {made.words}")
    for note in made.notes:
        screen.say(console, note, "yellow")
    screen.say(
        console,
        f"needs {format_bytes(made.device_bytes)} of {format_bytes(made.budget_bytes)} in the phase"
        f" {made.peak_phase.replace('_', ' ')}, {format_bytes(made.context_bytes)} for the context and"
        f" {format_bytes(made.headroom_bytes)} of headroom included; step time x{made.relative_step_time:.2f}"
        " of the same job with all the memory it wants",
    )
    if made.context_bytes:
        most, phase = format_bytes(made.ram_bytes), made.ram_phase.replace("_", " ")
        screen.say(console, f"and {most} of RAM, most in the phase {phase}")
    if made.processes > 1:
        sent, kinds = made.traffic, ("all_gather", "reduce_scatter", "all_reduce")
        told = [(kind.replace("_", "-"), sent[f"{kind}_bytes"]) for kind in kinds if sent[f"{kind}_bytes"]]
        parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in told)
        screen.say(console, f"each of {made.processes} devices needs that, and sends in a step: {parts}")
    if made.host_bytes:
        screen.say(console, f"{format_bytes(made.host_bytes)} of it page-locked while it trains", "yellow")
    if made.approximates:
        screen.say(console, f"{' and '.join(made.approximates)}: changes a little what is learned", "yellow")
    names = list(dict.fromkeys(name for found in made.phases.values() for name in found["ledger"]))
    rows: list[tuple[str | Text, ...]] = []
    for name in names:
        sizes = (found["ledger"].get(name) for found in made.phases.values())
        rows.append((name, *("-" if size is None else format_bytes(size) for size in sizes)))
    for key, label in (("peak_allocated_bytes", "allocated"), ("least_bytes", "reserved")):
        sizes = (found[key] for found in made.phases.values())
        rows.append((Text(label, "bold"), *(Text(format_bytes(size), "bold") for size in sizes)))
    columns = ("", *(phase.replace("_", " ") for phase in made.phases))
    screen.show_table(console, columns, rows)
    for other in made.rejected:
        levers = ", ".join(other["levers"]) or "nothing checkpointed"
        text = f"rejected: {levers} (x{other['relative_step_time']:.2f}): {other['why']}"
        screen.say(console, text, "dim")
