"""The command plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Config, Overrides

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunekit.memory.plan import Plan


def plan(
    config: Config,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help='a card such as rtx-3060, "all", or what answers here: auto, cuda:1')
    ] = None,
    budget: Annotated[str | None, typer.Option(help='memory that may be used: "8 GiB"')] = None,
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
    for varied in planning.sweeps(overrides or [], sweep or []):
        found = workspace.plan(
            config,
            *varied,
            device=device,
            budget=budget,
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
    for varied, found in plans:
        out.print(f"\n{config} {' '.join(varied)}".rstrip(), style="bold")
        if len(found) == 1:
            _show_plan(out, found[0])
            continue
        shared = [note for note in found[0].notes if all(note in made.notes for made in found)]
        for note in shared:
            out.print(note, style="yellow")
        out.print(_plans_table(found, shared))
    raise typer.Exit(code)


def _plans_table(plans: Sequence[Plan], known: Sequence[str]) -> Table:
    from rich.text import Text

    from tunekit.units import format_bytes

    table = screen.table("card", "fits", "needs", "of", "step time", "plan")
    for made in plans:
        fits = Text("yes", "green") if made.fits else Text("no", "red")
        time = f"x{made.relative_step_time:.2f}" if made.fits else "-"
        table.add_row(
            made.device,
            fits,
            format_bytes(made.device_bytes),
            format_bytes(made.budget_bytes),
            time,
            "; ".join([made.words, *(note for note in made.notes if note not in known)]),
        )
    return table


def _show_plan(console: Console, made: Plan) -> None:
    from tunekit.units import format_bytes

    console.print(f"{made.device}: {made.words}")
    for note in made.notes:
        console.print(note, style="yellow")
    console.print(
        f"needs {format_bytes(made.device_bytes)} of {format_bytes(made.budget_bytes)} in the phase"
        f" {made.peak_phase.replace('_', ' ')}, {format_bytes(made.context_bytes)} for the context and"
        f" {format_bytes(made.headroom_bytes)} of headroom included; step time x{made.relative_step_time:.2f}"
        " of the same job with all the memory it wants"
    )
    if made.host_bytes:
        console.print(f"and {format_bytes(made.host_bytes)} of page-locked host memory", style="yellow")
    if made.approximates:
        console.print(f"{' and '.join(made.approximates)}: changes a little what is learned", style="yellow")
    names = list(dict.fromkeys(name for found in made.phases.values() for name in found["ledger"]))
    table = screen.table("", *(phase.replace("_", " ") for phase in made.phases))
    for name in names:
        sizes = (found["ledger"].get(name) for found in made.phases.values())
        table.add_row(name, *("-" if size is None else format_bytes(size) for size in sizes))
    for key, label in (("peak_allocated_bytes", "allocated"), ("least_bytes", "reserved")):
        table.add_row(label, *(format_bytes(found[key]) for found in made.phases.values()), style="bold")
    console.print(table)
    for other in made.rejected:
        levers = ", ".join(other["levers"]) or "nothing checkpointed"
        console.print(f"rejected: {levers} (x{other['relative_step_time']:.2f}): {other['why']}", style="dim")
