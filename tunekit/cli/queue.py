"""The commands `tunekit queue ...`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.cli import screen
from tunekit.cli.options import (
    AsJson,
    AtOnce,
    Cluster,
    Config,
    Devices,
    Overrides,
    Runs,
    at_once_of,
    names_of,
    not_both,
)

if TYPE_CHECKING:
    from tunekit.jobs import Job

queue = typer.Typer(no_args_is_help=True, help="Runs that wait for their turn, in files under runs/.queue.")

Jobs = Annotated[list[str] | None, typer.Argument(metavar="JOB ...", help="number, or the name of its run")]


@queue.command()
def add(
    config: Config,
    overrides: Overrides = None,
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="the highest comes first")] = 0,
    first: Annotated[bool, typer.Option("--first", help="before all of its priority")] = False,
    processes: Annotated[int, typer.Option(min=1, help="as for tunekit run")] = 1,
    as_json: AsJson = False,
) -> None:
    """Add a run to the queue of its folder of runs. `tunekit queue start` works on it."""
    from tunekit.config import load
    from tunekit.jobs import Queue
    from tunekit.quiet import report_warnings
    from tunekit.worker import submit

    own = Queue.of(load(config, overrides or ()).config.runs)
    job, loaded = submit(own, config, overrides or (), processes=processes, priority=priority, first=first)
    report_warnings(loaded.warnings)
    if as_json:
        screen.print_json(job.model_dump(mode="json"))
        return
    print(f"job {job.id}: {loaded.config.run_dir} (in {own.folder})")


@queue.command("list")
def list_(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Show the jobs in their order: those that run, those that wait, and what became of the others."""
    from tunekit.jobs import Queue

    own = Queue.of(runs)
    jobs, damaged = own.jobs(), own.damaged()
    if as_json:
        wrong = [{"place": error.where, "message": error.message} for error in damaged]
        screen.print_json(
            {"version": 1, "jobs": [job.model_dump(mode="json") for job in jobs], "damaged": wrong}
        )
        return
    console = screen.console()
    states = ("running", "waiting", "stopped", "failed", "done")
    rows = []
    for job in sorted(jobs, key=lambda job: states.index(job.state)):
        state = "stopping" if job.stopping else job.state
        about = ", ".join(text for text in (job.on, _when(job), job.note) if text)
        rows.append((str(job.id), state, str(job.priority or "-"), job.name, about))
    if rows:
        screen.show_table(console, ("job", "state", "prio", "run", ""), rows, words=True)
    else:
        print(f"no jobs in {own.folder}")
    for error in damaged:
        screen.say(console, str(error), "red")


def _when(job: Job) -> str:
    """How long ago what happened last."""
    from tunekit.units import format_seconds

    if job.state == "done":
        return ""  # its note says how long it took
    since = (job.began if job.state == "running" else job.ended) or job.added
    return f"{format_seconds(max(0.0, time.time() - since))} {'long' if job.state == 'running' else 'ago'}"


@queue.command()
def start(
    jobs: Jobs = None,
    runs: Runs = Path("runs"),
    at_once: AtOnce = "1",
    devices: Devices = None,
    cluster: Cluster = None,
    keep: Annotated[bool, typer.Option("--keep", help="wait for more jobs when all are done")] = False,
    only: Annotated[
        bool, typer.Option("--no-work", help="only let the given jobs wait again, for another worker")
    ] = False,
) -> None:
    """Work on the queue until nothing waits. Jobs that are named wait again first.

    Ctrl-C lets what runs checkpoint, and puts it back; the same command goes on.
    """
    from tunekit import worker
    from tunekit.jobs import Queue

    not_both(cluster, devices)
    own = Queue.of(runs)
    for name in jobs or ():
        own.start(own.find(name).id)
    if only:
        return
    limit = at_once_of(at_once)
    with ExitStack() as stack:
        if cluster is None:
            wanted = {job.device for job in own.jobs() if job.state == "waiting"}
            busy = worker.Worker(own, worker.devices(names_of(devices), wanted=wanted), limit)
        else:
            from tunekit import cluster as clusters

            nodes = stack.enter_context(clusters.cluster(cluster, runs, clusters.inputs(own)))
            busy = clusters.ClusterWorker.on(nodes, own, limit)
        for line in worker.unserved(own, busy.devices):
            screen.say(screen.console(stderr=True), line, "yellow")
        busy.say = lambda line: print(line, flush=True)
        busy.work(keep=keep)
    states = list(busy.ended.values())
    if not states:
        print(f"nothing waits in {own.folder}")
    if "failed" in states:
        raise typer.Exit(1)


@queue.command()
def stop(
    jobs: Jobs = None,
    every: Annotated[bool, typer.Option("--all", help="all jobs")] = False,
    now: Annotated[bool, typer.Option("--now", help="without a checkpoint")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Stop jobs: one that runs checkpoints and ends, one that waits is passed over from now on."""
    from tunekit.jobs import Queue

    own = Queue.of(runs)
    chosen = [job for job in own.jobs() if job.is_open] if every else [own.find(name) for name in jobs or ()]
    _some(chosen or every)
    for job in chosen:
        after = own.stop(job.id, now=now)
        print(f"job {job.id} ({job.name}): {'is asked to end' if after.stopping else after.state}")


@queue.command()
def move(
    job: Annotated[str, typer.Argument(help="number, or the name of its run")],
    before: Annotated[str | None, typer.Option(help="the job that it shall come before")] = None,
    first: Annotated[bool, typer.Option("--first", help="before all that wait")] = False,
    last: Annotated[bool, typer.Option("--last", help="behind all that wait")] = False,
    priority: Annotated[int | None, typer.Option(min=-1000, max=1000, help="the highest comes first")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Give a job that waits another place."""
    from tunekit.errors import ConfigError
    from tunekit.jobs import Queue

    own = Queue.of(runs)
    if sum((before is not None, first, last, priority is not None)) != 1:
        raise ConfigError("say where: one of --before, --first, --last, --priority", where="command line")
    number = own.find(job).id
    target = own.find(before).id if before is not None else None
    if target == number:
        raise ConfigError("a job cannot come before itself", where="--before")
    own.move(number, before=target, first=first, last=last, priority=priority)
    order = [str(other.id) for other in own.jobs() if other.state == "waiting"]
    print(f"waiting, in this order: {', '.join(order) or 'none'}")


@queue.command()
def remove(
    jobs: Jobs = None,
    finished: Annotated[bool, typer.Option("--done", help="all that are done")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Take jobs and their logs out of the queue. Run folders stay."""
    from tunekit.jobs import Queue

    own = Queue.of(runs)
    chosen = [job.id for job in own.jobs() if job.state == "done"] if finished else []
    for name in jobs or ():
        damaged = name.isdigit() and any(error.where == str(own.file(int(name))) for error in own.damaged())
        chosen.append(int(name) if damaged else own.find(name).id)
    _some(chosen or finished)
    for number in chosen:
        own.remove(number)
    print(f"removed: {', '.join(map(str, chosen)) or 'none'}")


@queue.command()
def log(
    job: Annotated[str, typer.Argument(help="number, or the name of its run")], runs: Runs = Path("runs")
) -> None:
    """Print what a job's process said, of all its lives."""
    from tunekit.errors import ArtifactError
    from tunekit.jobs import Queue

    own = Queue.of(runs)
    found = own.find(job)
    file = own.log(found.id)
    if not file.is_file():
        raise ArtifactError(f"job {found.id} has not begun", where=str(file))
    print(file.read_text(encoding="utf-8", errors="replace"), end="")


def _some(given: object) -> None:
    from tunekit.errors import ConfigError

    if not given:
        raise ConfigError("say which jobs", where="command line", hint="tunekit queue list shows them")
