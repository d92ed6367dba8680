"""The command sweep."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, AtOnce, Cluster, Devices, Overrides, at_once_of, names_of, not_both

if TYPE_CHECKING:
    from tunekit.cluster import ClusterWorker
    from tunekit.sweep.engine import Sweep, Trial


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.yaml",
            help="sweep file: config, over, metric, ...; or the name of a ready-made one (tunekit ls)",
        ),
    ],
    overrides: Overrides = None,
    at_once: AtOnce = "auto",
    devices: Devices = None,
    cluster: Cluster = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="check it and show the trials; begin none")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a config over many values, and say which was best. The same command continues where it stopped.

    Overrides are for every trial.
    """
    from tunekit import worker as workers
    from tunekit.sweep.engine import Sweep

    not_both(cluster, devices)
    err = screen.console(stderr=True)
    made = Sweep.open(file, overrides or (), say=lambda line: err.print(line, soft_wrap=True))
    if not dry:
        limit = at_once_of(at_once)
        with ExitStack() as stack:
            if cluster is None:
                served = workers.devices(names_of(devices), wanted=made.devices)
                worker = workers.Worker(made.queue, served, limit, made.name)
            else:
                worker = _on_cluster(made, cluster, limit, stack)
            _ready(made)
            worker.say = lambda line: err.print(line, style="dim", soft_wrap=True)
            made.run(worker)
    if as_json:
        screen.print_json(made.record().model_dump(mode="json"))
    else:
        _show(made, dry=dry)
    if not dry and any(trial.state == "failed" for trial in made.trials):
        raise typer.Exit(1)


def _on_cluster(made: Sweep, address: str, at_once: int | None, stack: ExitStack) -> ClusterWorker:
    from tunekit import cluster as clusters
    from tunekit.preconditions import reads

    found = {path: key for trial in made.trials for key, path in reads(trial.loaded).items()}
    nodes = stack.enter_context(clusters.cluster(address, made.runs, found))
    return clusters.ClusterWorker.on(nodes, made.queue, at_once, made.name)


def _ready(made: Sweep) -> None:
    """What keeps a run from being launched keeps all of them."""
    from tunekit import workspace

    waiting = next((trial for trial in made.trials if trial.state == "waiting"), None)
    if waiting is not None:
        workspace.ready(waiting.loaded)


def _show(made: Sweep, *, dry: bool) -> None:
    from tunekit.sweep.space import short_keys, value_text

    console = screen.console()
    short = short_keys([axis.key for axis in made.axes])
    keys = [axis.key for axis in made.axes]
    rows = [
        (trial.run, *(value_text(trial.values[key]) for key in keys), *_figures(made, trial))
        for trial in (made.trials if dry else made.ranked())
    ]
    titles = [short[key] if len(keys) > 2 else key.rpartition(".")[2] for key in keys]
    screen.show_table(console, ("run", *titles, made.figure.name, "step", "time", "state"), rows)
    if dry:
        screen.say(console, f"\n{len(rows)} trials; {made.folder / 'sweep.json'} will say what they came to")
        return
    for trial in made.trials:
        if trial.state == "failed":
            screen.say(console, f"{trial.run} failed: {trial.note}", "red")
    best = made.best
    if best is not None:
        told = ", ".join(f"{key}={best.values[key]}" for key in keys)
        screen.say(console, f"\nbest    {best.loaded.config.run_dir}: {told}")
    screen.say(console, f"results {made.folder / 'sweep.json'}")


def _figures(made: Sweep, trial: Trial) -> tuple[Any, ...]:
    from tunekit.passes.metrics import format_metric
    from tunekit.units import format_seconds

    value, step = trial.reading.value(trial.stopped)
    shown = "-"
    if value is not None:
        shown = f"{value:.5f}" if made.figure.curve else format_metric(made.figure.name, value)
    seconds = trial.reading.seconds
    state = "stopped early" if trial.state == "stopped" else trial.state
    return shown, str(step or "-"), format_seconds(seconds) if seconds else "-", state
