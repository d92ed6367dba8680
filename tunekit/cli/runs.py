"""Commands about runs: run, report, prune-folders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Config, Overrides

if TYPE_CHECKING:
    from rich.console import Console


def run(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option(min=1, help="one per GPU, or several on the CPU; with --nodes on each machine")
    ] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="machines of a Ray cluster that train together")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="the cluster; auto is the one that this machine is in"),
    ] = None,
) -> None:
    """Run a recipe, through accelerate. The same command again continues where it stopped."""
    from tunekit import workspace
    from tunekit.progress import console

    if nodes > 1 or cluster is not None:
        from tunekit.nodes import run_on

        raise typer.Exit(run_on(config, overrides or (), nodes, cluster or "auto", processes=processes))
    console().doing("checking the config, the pictures and this machine")
    try:
        _, code = workspace.launch(config, overrides or (), processes=processes)
    finally:
        console().doing(None)
    raise typer.Exit(code)


def report(
    run: Annotated[str, typer.Argument(help="run folder, or its name under runs/")], as_json: AsJson = False
) -> None:
    """Write a run's report.html and report.json again, and show the figures."""
    from tunekit import report as reports
    from tunekit import workspace

    folder = workspace.find_run(run)
    if as_json:
        screen.print_json(reports.load(folder))
        return
    page = reports.write(folder)
    content = reports.load(folder)
    console = screen.console()
    training = content["training"]
    if training:
        from tunekit.units import format_seconds

        state = "finished" if training["finished"] else "not finished"
        print(f"training {training['steps']} steps, {format_seconds(training['seconds'])}, {state}")
    if content["steps"]:
        _show_steps(console, content["steps"])
    print(f"final    {content['final'] or 'nothing yet'}\nreport   {page}")


def prune_folders(
    run: Annotated[str, typer.Argument(help="run folder, or its name under runs/")],
    dry: Annotated[bool, typer.Option("--dry-run", help="only show what would be removed")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the folders of passes that a run's present chain does not name any more."""
    from tunekit import workspace
    from tunekit.units import format_bytes

    found = workspace.prune_folders(run, dry=dry)
    if as_json:
        rows = [{"folder": str(i.path), "size_bytes": i.size_bytes, "user": i.user} for i in found]
        screen.print_json({"version": 1, "removed": not dry, "folders": rows})
        return
    verb = "would remove" if dry else "removed"
    for item in found:
        what = f"kept, for {item.user} uses it" if item.user else verb
        print(f"{what}: {item.path} ({format_bytes(item.size_bytes)})")
    freed = sum(item.size_bytes for item in found if not item.user)
    print(f"{verb} {sum(not item.user for item in found)} folders, {format_bytes(freed)}")


def verify_files(
    folder: Annotated[Path, typer.Argument(help="run, artifact, or a folder of runs")],
    accept: Annotated[
        bool, typer.Option("--accept", help="models that are others are taken as they are from now on")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read all files that tunekit wrote, and compare the models with what was written."""
    from tunekit import workspace

    found = workspace.verify_files(folder, accept=accept)
    wrong = [row for row in found if row.problem]
    if as_json:
        screen.print_json({"version": 1, "files": [asdict(row) for row in found]})
    else:
        for row in wrong:
            print(f"{row.place}: {row.problem}")
        print(f"{len(found)} looked at, {len(wrong) or 'none'} damaged" if found else "nothing to look at")
    raise typer.Exit(1 if wrong else 0)


def _show_steps(console: Console, steps: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from tunekit.passes.base import describe_metrics
    from tunekit.units import format_seconds

    rows = []
    for step in steps:
        style = "red" if step["metrics"].get("slower") else ""
        figures = Text(describe_metrics(step["metrics"]), style)
        rows.append((step["artifact"], format_seconds(step["seconds"]), figures))
    screen.show_table(console, ("folder", "seconds", "figures"), rows, words=True)
