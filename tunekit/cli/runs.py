"""Commands about runs: run, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Config, Overrides

if TYPE_CHECKING:
    from rich.console import Console


def run(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="one per GPU, or several on the CPU")] = 1,
) -> None:
    """Run a recipe, through accelerate. The same command again continues where it stopped."""
    from tunekit import workspace

    _, code = workspace.launch(config, overrides or (), processes=processes)
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
