"""The `tunekit` command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.errors import TunekitError

# Everything else is imported where it is used, so that `tunekit --help` and its like answer at once.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunekit.config import SamplingConfig
    from tunekit.memory.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a ready-made config (tunekit ls)")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c ...", help="values that replace the config's")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps; default: the model's own")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="classifier-free guidance; default: the model's own")
]
Side = Annotated[int | None, typer.Option(help="pixels; default: the model's own")]
Runs = Annotated[Path, typer.Option("--runs", help="folder of all runs")]


def main() -> None:
    """Runs the command; a TunekitError becomes one message and its exit code."""
    from tunekit.quiet import DEBUG, quiet_libraries, report_error

    arguments = sys.argv[1:]
    if "--debug" in arguments:  # wherever it stands
        arguments.remove("--debug")
        os.environ[DEBUG] = "1"
    quiet_libraries()
    try:
        app(arguments, prog_name="tunekit")
    except TunekitError as error:
        if os.environ.get(DEBUG):
            raise
        report_error(error)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        import tunekit

        print(f"tunekit {tunekit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks (of any command)")] = False,
) -> None:
    """From a handful of pictures to a small, fast, verified diffusion model, with one YAML."""
    # main() has read --debug already.


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)  # a path may hold [brackets]


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# ls ---------------------------------------------------------------------------------------------------------


@app.command("ls")
def ls(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """What there is: configs, recipes, families, passes, bundled models and pictures, runs."""
    from tunekit import workspace

    found = workspace.inventory()
    states = workspace.runs(runs)
    if as_json:
        _print_json({**found, "runs": [asdict(state) for state in states]})
        return
    console = _console()
    for title, entries in found.items():
        table = _table("name", "what")
        for name, about in entries.items():
            table.add_row(name, about.removesuffix("."))
        _heading(console, title)
        console.print(table)
    table = _table("folder", "state", "final")
    for state in states:
        table.add_row(state.run, state.state, state.final or "-")
    _heading(console, f"runs in {runs}")
    console.print(table if states else " none")


# show, check, run -------------------------------------------------------------------------------------------


@app.command("show")
def show(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of this config")] = False,
) -> None:
    """Print a config as it will be used: with what it extends, the overrides and all defaults."""
    from tunekit.config import dump_yaml, load, load_schema

    if schema:
        _print_json(load_schema(config, overrides or ()).model_json_schema())
        return
    loaded = load(config, overrides or ())
    if as_json:
        _print_json(loaded.config.model_dump(mode="json"))
    else:
        print(dump_yaml(loaded.config), end="")


@app.command("check")
def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look at a config, its passes and every picture, and list all that is wrong. Starts nothing."""
    from tunekit import workspace
    from tunekit.config import load

    if as_json:
        examination = workspace.check(config, overrides or ())
        _print_json(examination.as_json())
        raise typer.Exit(2 if examination.problems else 0)
    loaded = load(config, overrides or ())
    found = workspace.examine(loaded)
    table = _table("what", "found")
    for name, fact in found.facts.items():
        table.add_row(name, str(fact))
    console = _console()
    console.print(str(loaded.path), style="bold")
    console.print(table)
    if found.errors:
        raise TunekitError("\n".join(map(str, found.errors)))
    console.print("all is well", style="green")


@app.command("run")
def run(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="one per GPU, or several on the CPU")] = 1,
) -> None:
    """Run a recipe, through accelerate. The same command again continues where it stopped."""
    from tunekit import workspace

    _, code = workspace.launch(config, overrides or (), processes=processes)
    raise typer.Exit(code)


# plan -------------------------------------------------------------------------------------------------------


@app.command("plan")
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

    console = _console(stderr=True)
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
        _print_json(flat[0] if len(flat) == 1 else flat)
        raise typer.Exit(code)
    out = _console()
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

    table = _table("card", "fits", "needs", "of", "step time", "plan")
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
    table = _table("", *(phase.replace("_", " ") for phase in made.phases))
    for name in names:
        sizes = (found["ledger"].get(name) for found in made.phases.values())
        table.add_row(name, *("-" if size is None else format_bytes(size) for size in sizes))
    for key, label in (("peak_allocated_bytes", "allocated"), ("least_bytes", "reserved")):
        table.add_row(label, *(format_bytes(found[key]) for found in made.phases.values()), style="bold")
    console.print(table)
    for other in made.rejected:
        levers = ", ".join(other["levers"]) or "nothing checkpointed"
        console.print(f"rejected: {levers} (x{other['relative_step_time']:.2f}): {other['why']}", style="dim")


# generate, bench, report ------------------------------------------------------------------------------------


def _sampling(
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    negative: str | None = None,
) -> SamplingConfig:
    """Options as a section, with the messages of one.

    Raises:
        ConfigError: a size that no model draws.
    """
    from tunekit.config import SamplingConfig, validate

    given = {"steps": steps, "guidance": guidance, "height": height, "width": width}
    known = {key: value for key, value in {**given, "negative_prompt": negative}.items() if value is not None}
    return validate(SamplingConfig, known, lambda key: "command line")


@app.command("generate")
def generate(
    artifact: Annotated[
        str,
        typer.Argument(help='run folder, adapter, any artifact, diffusers folder, hub id, or "builtin/..."'),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="may be given several times")],
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the first picture; the next ones count up")] = 0,
    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one picture")] = Path("generated"),
    adapter: Annotated[str | None, typer.Option(help="adapter to put on the artifact")] = None,
    family: Annotated[str | None, typer.Option(help="if the artifact does not say it")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu, mps")] = "auto",
    provider: Annotated[
        str | None, typer.Option("--provider", "--backend", help="for ONNX: cpu, cuda, tensorrt, openvino")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16, for torch and OpenVINO")] = None,
) -> None:
    """Draw pictures with a run, an adapter, any artifact of a chain, a diffusers folder or a hub id."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunekit import workspace

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # the paths may go into a file
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", visible=False)
        sampling = _sampling(steps, guidance, height, width, negative)
        for path in workspace.draw(
            artifact,
            prompt,
            sampling,
            out=out,
            seed=seed,
            count=count,
            adapter=adapter,
            family=family,
            device=device,
            provider=provider,
            dtype=dtype,
            on_step=lambda title, done, total: progress.update(
                task, description=title, completed=done, total=total, visible=True
            ),
        ):
            print(path)


@app.command("bench")
def bench(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="as for generate; A is the baseline")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="taken in turn")] = None,
    steps: Steps = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; each draws a picture with every artifact")] = 5,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    family: Annotated[str | None, typer.Option(help="if the artifacts do not say it")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu, mps")] = "auto",
    provider: Annotated[
        str | None, typer.Option("--provider", "--backend", help="for ONNX: cpu, cuda, tensorrt, openvino")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts in turns: latency, size and peak memory, and the ratios to the first."""
    from tunekit.artifacts import open_artifact
    from tunekit.passes.benchmark import PROMPT, Settings, compare

    opened = [open_artifact(artifact, family=family) for artifact in artifacts]
    console = _console(stderr=True)
    settings = Settings(
        prompts=tuple(prompt or [PROMPT]),
        sampling=_sampling(steps, guidance, height, width),
        repeats=repeats,
        device=device,
        provider=provider,
        threads=threads,
        memory=memory,
    )
    found = compare(opened, settings, say=lambda line: console.print(line, style="dim"))
    if as_json:
        _print_json(found)
        return
    from rich.text import Text

    from tunekit.passes.base import format_metric

    shown = ("denoiser_ms_p50", "denoiser_ms_p95", "picture_ms_p50", "size_bytes", "peak_memory_bytes")
    table = _table("", "denoiser p50", "p95", "picture p50", "size", "peak memory", "speed", "size")
    for name, row in zip(artifacts, found["artifacts"], strict=True):
        cells = ["-" if row[key] is None else format_metric(key, row[key]) for key in shown]
        if "speedup" in row:
            speed = Text(f"{row['speedup']:.2f}x" + (" SLOWER" if row["slower"] else ""))
            speed.style = "red" if row["slower"] else "green"
            size = "-" if row["size_ratio"] is None else f"{row['size_ratio']:.2f}x"
        else:
            speed, size = Text("1x"), "1x"
        table.add_row(f"{name}\n{row['title']}", *cells, speed, size)
    _console().print(table)


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(help="run folder, or its name under runs/")], as_json: AsJson = False
) -> None:
    """Write a run's report.html and report.json again, and show the figures."""
    from tunekit import report as reports
    from tunekit import workspace

    folder = workspace.find_run(run)
    if as_json:
        _print_json(reports.load(folder))
        return
    page = reports.write(folder)
    content = reports.load(folder)
    console = _console()
    training = content["training"]
    if training:
        from tunekit.units import format_seconds

        state = "finished" if training["finished"] else "not finished"
        print(f"training {training['steps']} steps, {format_seconds(training['seconds'])}, {state}")
    if content["steps"]:
        console.print(_steps_table(content["steps"]))
    print(f"final    {content['final'] or 'nothing yet'}\nreport   {page}")


def _steps_table(steps: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    from tunekit.passes.base import describe_metrics
    from tunekit.units import format_seconds

    table = _table("folder", "seconds", "figures")
    for step in steps:
        slower = step["metrics"].get("slower")
        figures = Text(describe_metrics(step["metrics"]), style="red" if slower else "")
        table.add_row(step["artifact"], format_seconds(step["seconds"]), figures)
    return table


# doctor, cp -------------------------------------------------------------------------------------------------


@app.command("doctor")
def doctor(as_json: AsJson = False) -> None:
    """What is installed, which devices and providers answer, what is missing and how to install it."""
    from tunekit.doctor import examine
    from tunekit.units import format_bytes

    found = examine()
    incomplete = any(item["needed"] for item in found["missing"])
    if as_json:
        _print_json(found)
        raise typer.Exit(1 if incomplete else 0)
    from rich.text import Text

    def versions(packages: dict[str, str | None], style: str) -> Text:
        parts = [
            Text(f"{name} {number or 'missing'}", "" if number else style)
            for name, number in packages.items()
        ]
        return Text(", ").join(parts)

    console = _console()
    free = format_bytes(found["disk_free_bytes"])
    print(f"tunekit {found['version']}, Python {found['python']}, {free} free here")
    _heading(console, "packages")
    table = _table("for", "version")
    table.add_row("core", versions(found["packages"], "red"))
    for extra, packages in found["extras"].items():
        table.add_row(extra, versions(packages, "yellow"))
    console.print(table)
    _heading(console, "devices")
    table = _table("device", "what", "memory", "bf16")
    for device in found["devices"]:
        memory = f"{format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])} free"
        table.add_row(device["device"], device["title"], memory, "yes" if device["bf16"] else "no")
    console.print(table)
    _heading(console, "providers")
    table = _table("package", "answers")
    for package, answer in found["providers"].items():
        table.add_row(package, Text(answer, "yellow") if isinstance(answer, str) else ", ".join(answer))
    console.print(table)
    _heading(console, "bundled")
    console.print(" " + (", ".join(found["bundled"]) or "nothing"))
    if found["missing"]:
        _heading(console, "missing")
        for item in found["missing"]:  # a line to copy must not be folded into a column
            console.print(Text(f" {item['what']}", "red" if item["needed"] else "yellow"))
            print(f"   {item['install']}")
    else:
        console.print("\nnothing is missing", style="green")
    raise typer.Exit(1 if incomplete else 0)


@app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="config or recipe, as tunekit ls shows it")],
    dest: Annotated[Path, typer.Argument(help="file or folder to copy to")],
    force: Annotated[bool, typer.Option("--force", help="overwrite")] = False,
) -> None:
    """Copy a ready-made config or recipe, to make it your own."""
    from tunekit import workspace

    print(workspace.copy(name, dest, force=force))
