"""The command compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunekit.cli import screen
from tunekit.cli.drawing import sampling_of, strengths_of
from tunekit.cli.options import AsJson, Guidance, Side, Steps


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="runs (or their names), adapter files, models")
    ],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="all adapters that a run kept (train.save_every), by step")
    ] = False,
    strengths: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="of adapters, as columns: 0.6,0.8,1")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "--prompts", "-p", help="repeatable; default: those of the previews"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="each prompt with each; default: the previews'")
    ] = None,
    final: Annotated[
        bool,
        typer.Option("--final", help="draw with the last model of a run's chain, not with what it trained"),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="of adapter files that do not name it: a model, or a run that has it")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="draw pictures")] = True,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu, mps")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16")] = None,
    out: Annotated[Path, typer.Option(help="folder; pictures that lie there are not drawn again")] = Path(
        "compare"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare runs: what differs, how they learned, and the same prompts and seeds drawn by each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunekit import workspace

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = screen.console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", visible=False)
        found = workspace.compare(
            runs,
            prompts=tuple(prompt or ()),
            seeds=_seeds(seeds),
            strengths=tuple(strengths_of(strengths, "--strengths")) or (1.0,),
            checkpoints=checkpoints,
            final=final,
            base=base,
            sampling=sampling_of(steps, guidance, height, width, negative),
            device=device,
            dtype=dtype,
            draws=pictures,
            out=out,
            say=lambda line: progress.console.print(line, style="yellow"),
            on_step=lambda title, done, total: progress.update(
                task, description=title, completed=done, total=total, visible=True
            ),
        )
    if as_json:
        screen.print_json(found)
        return
    out_console = screen.console()
    screen.show_table(
        out_console, ("run", "steps", "held-out loss", "best step", "took"), _rows(found["runs"])
    )
    if found["differs"]:
        names = list(next(iter(found["differs"].values())))
        rows = [(key, *(values[name] for name in names)) for key, values in found["differs"].items()]
        out_console.print()
        screen.show_table(out_console, ("differs", *names), rows)
    print(f"{len(found['pictures'])} pictures\npage     {out / 'compare.html'}")


def _rows(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    from tunekit.units import format_count, format_seconds

    def text(run: dict[str, Any], name: str, write: Any) -> str:
        value = run.get(name)
        return write(value) if value is not None else "-"

    return [
        (
            run["name"],
            text(run, "steps", format_count),
            text(run, "val_loss", "{:.4f}".format),
            text(run, "best_step", format_count),
            text(run, "seconds", format_seconds),
        )
        for run in runs
    ]


def _seeds(text: str | None) -> tuple[int, ...]:
    """Seeds as they are given.

    Raises:
        ConfigError: something else than whole numbers.
    """
    from tunekit.errors import ConfigError

    found = []
    for part in text.split(",") if text is not None else ():
        if not part.strip().isdecimal() or int(part) >= 2**63:
            raise ConfigError(
                f'"{part}" is no seed', where="--seeds", hint="whole numbers with commas: 0,1,2"
            )
        found.append(int(part))
    return tuple(dict.fromkeys(found))
