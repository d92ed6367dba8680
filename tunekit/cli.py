"""The `tunekit` command."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunekit.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    TunekitError,
    did_you_mean,
)

# Everything else is imported where it is used, so that `tunekit --help` and its like answer at once.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunekit.artifacts import Artifact
    from tunekit.config import Loaded
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


def _first_line(path: Path) -> str:
    """First line of a module's docstring, or of a YAML file's comment, without importing anything."""
    with path.open(encoding="utf-8") as file:
        head = file.read(400)
    match = re.match(r'\s*(?:"""|#\s*)(.+?)(?:"""|\n|$)', head)
    return match[1].strip() if match else ""


def _run_state(path: Path) -> dict[str, Any] | None:
    from tunekit.artifacts import RunFolder

    run = RunFolder(path)
    if not run.config.is_file():
        return None
    trained, passes = run.trained(), run.passes()
    checkpoints = sorted(run.checkpoints.glob("step-*"))
    final = passes[-1] if passes else trained
    state = "trained" if trained else f"at {checkpoints[-1].name}" if checkpoints else "begun"
    if passes:
        state = f"{len(passes)} {'pass' if len(passes) == 1 else 'passes'} done"
    return {"run": str(path), "state": state, "final": final.name if final else None}


@app.command("ls")
def ls(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """What there is: configs, recipes, families, passes, bundled models and pictures, runs."""
    from tunekit.config import config_names, find_config
    from tunekit.registry import FAMILIES, PASSES, Registry, recipe_names, recipe_path
    from tunekit.resources import PACKAGE, builtin_names

    def members(registry: Registry[Any]) -> dict[str, str]:
        files = {name: PACKAGE / registry.package.split(".")[1] / f"{name}.py" for name in registry.names()}
        return {name: _first_line(file) if file.is_file() else "plug-in" for name, file in files.items()}

    found: dict[str, dict[str, str]] = {
        "configs": {name: _first_line(find_config(name)) for name in config_names()},
        "recipes": {name: _first_line(recipe_path(name)) for name in recipe_names()},
        "families": members(FAMILIES),
        "passes": members(PASSES),
        "builtin": dict.fromkeys(builtin_names(), ""),
    }
    states = [state for path in sorted(runs.glob("*")) if (state := _run_state(path))]
    if as_json:
        _print_json({**found, "runs": states})
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
        table.add_row(state["run"], state["state"], state["final"] or "-")
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


def _model(loaded: Loaded) -> Artifact | None:
    """What `model.source` is; None for a recipe without a model.

    Raises:
        ArtifactError, ModelError: nothing there.
    """
    from tunekit.artifacts import open_artifact
    from tunekit.registry import FAMILIES

    model = getattr(loaded.config, "model", None)
    if model is None:
        return None
    if model.family not in FAMILIES.names():
        from tunekit import families

        try:
            families.get(model.family)
        except ConfigError as error:
            error.where = loaded.where("model.family")
            raise
    try:
        return open_artifact(model.source, family=model.family)
    except (ArtifactError, ModelError) as error:
        error.where = loaded.where("model.source")
        raise


def _chain(loaded: Loaded, model: Artifact | None) -> str:
    """Checks the passes of `optimize:` and describes them: "merge > export_onnx (onnx)".

    Raises:
        ChainError: unknown pass or key, or a wrong order.
    """
    from tunekit.passes.base import check_chain, parse_chain

    config = loaded.config
    passes = parse_chain(getattr(config, "optimize", []), loaded.chain_where)
    if not passes:
        return "none"
    if hasattr(config, "adapter"):  # trained first
        start = "adapter" if config.adapter else "torch"
    else:
        start = model.format if model else "torch"
    end = check_chain(passes, start, loaded.chain_where)
    return " > ".join(step.kind for step in passes) + f" ({end})"


@app.command("check")
def check(config: Config, overrides: Overrides = None) -> None:
    """Look at a config, its passes and every picture, and list all that is wrong. Starts nothing."""
    from tunekit.config import load

    loaded = load(config, overrides or ())
    problems: list[TunekitError] = []
    table = _table("what", "found")
    table.add_row("recipe", loaded.config.recipe)
    table.add_row("writes to", str(loaded.config.run_dir))
    model = None
    try:
        model = _model(loaded)
        if model is not None:
            on_hub = model.path is None and model.source != "tiny"
            kind = "on the hub: not looked at" if on_hub else model.format
            table.add_row("model", f"{loaded.config.model.source} ({kind})")
    except TunekitError as error:
        problems.append(error)
    try:
        table.add_row("passes", _chain(loaded, model))
    except TunekitError as error:
        problems.append(error)
    data = getattr(loaded.config, "data", None)
    if data is not None:
        from tunekit.data.images import scan_data

        scan = scan_data(data)
        table.add_row("pictures", str(len(scan.samples)))
        if scan.held_out:
            table.add_row("held out", str(len(scan.held_out)))
        if scan.prior:
            table.add_row("class pictures", str(len(scan.prior)))
        try:
            scan.check()
        except DataError as error:
            problems.append(error)
    console = _console()
    console.print(str(loaded.path), style="bold")
    console.print(table)
    if problems:
        raise TunekitError("\n".join(str(problem) for problem in problems))
    console.print("all is well", style="green")


@app.command("run")
def run(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="one per GPU, or several on the CPU")] = 1,
) -> None:
    """Run a recipe, through accelerate. The same command again continues where it stopped."""
    from tunekit.config import load
    from tunekit.launch import launch
    from tunekit.registry import recipe_path

    loaded = load(config, overrides or ())
    _chain(loaded, _model(loaded) if hasattr(loaded.config, "optimize") else None)
    memory = getattr(loaded.config, "memory", None)
    device = memory.device if memory else getattr(loaded.config, "device", "auto")
    if processes > 1:
        from tunekit import hardware

        kind = hardware.probe(device).torch_device.partition(":")[0]
        if kind in {"cuda", "xpu"}:
            hardware.probe(f"{kind}:{processes - 1}")  # says so if there are fewer
        device = kind
    recipe = recipe_path(loaded.config.recipe)
    code = launch(recipe, loaded.path, overrides or (), processes=processes, cpu=device == "cpu")
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
    from tunekit import planning
    from tunekit.config import load

    console = _console(stderr=True)
    plans = []
    for varied in planning.sweeps(overrides or [], sweep or []):
        loaded = load(config, varied, stand_in="(not needed)")
        found = planning.plan_config(
            loaded,
            device=device or ("all" if budget is None else None),
            budget=budget,
            say=lambda line: console.print(line, style="dim"),
        )
        plans.append((varied, found))
    if picture is not None:
        from tunekit.artifacts import write_text
        from tunekit.memory.picture import draw

        drawings = [draw(made) for _, found in plans for made in found]
        if picture.suffix == ".svg" and len(drawings) > 1:
            raise ConfigError(
                f"{len(drawings)} plans do not go into one .svg", where="--picture", hint="give an .html file"
            )
        console.print(f"picture: {write_text(picture, chr(10).join(drawings))}", style="dim")
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


@app.command("generate")
def generate(
    artifact: Annotated[
        str,
        typer.Argument(help='run folder, adapter, any artifact, diffusers folder, hub id, or "builtin/..."'),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="may be given several times")],
    negative: Annotated[str, typer.Option(help="what not to draw")] = "",
    seed: Annotated[int, typer.Option(min=0, help="of the first picture; the next ones count up")] = 0,
    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps")] = 30,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance")] = 7.5,
    height: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
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
    from tunekit.artifacts import open_artifact

    wanted = [(text, seed + index) for text in prompt for index in range(count)]
    if out.suffix.lower() == ".png" and len(wanted) > 1:
        raise ConfigError(
            f"{len(wanted)} pictures do not go into one file", where="--out", hint="give a folder"
        )
    opened = open_artifact(artifact, family=family)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunekit import runtime

    drawer = runtime.open_runtime(
        opened, family=family, device=device, provider=provider, adapter=adapter, dtype=dtype
    )
    facts = {
        "negative_prompt": negative,
        "steps": str(steps),
        "guidance": f"{guidance:g}",
        "source": artifact,
        "runtime": drawer.title,
    }
    batch = 4
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(drawer.title, total=steps * -(-len(wanted) // batch))
        for start in range(0, len(wanted), batch):
            group = wanted[start : start + batch]
            pictures = runtime.generate(
                drawer,
                [text for text, _ in group],
                seeds=[number for _, number in group],
                negative_prompt=negative,
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                on_step=lambda *_: progress.advance(task),
            )
            for (text, number), picture in zip(group, pictures, strict=True):
                path = _picture_path(out, text, number)
                _save_png(path, picture, {"prompt": text, "seed": str(number), **facts})
                print(path)
    drawer.close()


def _picture_path(out: Path, prompt: str, seed: int) -> Path:
    if out.suffix.lower() == ".png":
        return out
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    path, again = out / f"{slug}-{seed}.png", 1
    while path.exists():  # nothing that was drawn before is lost
        again += 1
        path = out / f"{slug}-{seed}-{again}.png"
    return path


def _save_png(path: Path, picture: Any, facts: dict[str, str]) -> None:
    """Writes a picture that says how it was made."""
    from PIL.PngImagePlugin import PngInfo

    import tunekit
    from tunekit.errors import output_errors

    info = PngInfo()
    for name, text in {**facts, "software": f"tunekit {tunekit.__version__}"}.items():
        info.add_text(name, text)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, pnginfo=info)


@app.command("bench")
def bench(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="as for generate; A is the baseline")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="taken in turn")] = None,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps of a picture")] = 30,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; each draws a picture with every artifact")] = 5,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance")] = 7.5,
    height: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
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
    from tunekit.passes.benchmark import PROMPT, compare

    opened = [open_artifact(artifact, family=family) for artifact in artifacts]
    console = _console(stderr=True)
    found = compare(
        opened,
        prompts=prompt or [PROMPT],
        steps=steps,
        repeats=repeats,
        guidance=guidance,
        height=height,
        width=width,
        device=device,
        provider=provider,
        threads=threads,
        memory=memory,
        say=lambda line: console.print(line, style="dim"),
    )
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


def _run_folder(name: str) -> Path:
    """A run by its folder, or by its name under `runs`."""
    path = Path(name)
    if path.is_dir():
        return path
    if (Path("runs") / name).is_dir():
        return Path("runs") / name
    near = [str(folder) for parent in (path.parent, Path("runs")) for folder in parent.glob("*")]
    raise ArtifactError(
        f'there is no run "{name}"', hint=did_you_mean(name, near) or "tunekit ls shows the runs"
    )


@app.command("report")
def report(
    run: Annotated[str, typer.Argument(help="run folder, or its name under runs/")], as_json: AsJson = False
) -> None:
    """Write a run's report.html and report.json again, and show the figures."""
    from tunekit import report as reports

    folder = _run_folder(run)
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
        table = _table("what", "install")
        for item in found["missing"]:
            table.add_row(Text(item["what"], "red" if item["needed"] else "yellow"), item["install"])
        console.print(table)
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
    from tunekit.artifacts import write_text
    from tunekit.config import config_names, find_config
    from tunekit.registry import recipe_names, recipe_path
    from tunekit.resources import configs_dir

    key = name.removesuffix(".yaml").removesuffix(".py")
    is_recipe = key in recipe_names() and (key not in config_names() or dest.suffix == ".py")
    if not is_recipe and key not in config_names():
        hint = did_you_mean(name, [*config_names(), *recipe_names()]) or "tunekit ls shows what there is"
        raise ConfigError(f'there is no config or recipe "{name}"', hint=hint)
    source = recipe_path(key) if is_recipe else find_config(configs_dir() / f"{key}.yaml")
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() and not force:
        raise OutputError(
            "is there already", where=str(target), hint="choose another name, or --force to overwrite"
        )
    text = source.read_text(encoding="utf-8")
    if not is_recipe:
        # What a copy extends it must still find from its new place: by name among the ready-made ones.
        def by_name(match: re.Match[str]) -> str:
            base = (source.parent / match[2]).resolve()
            return match[1] + base.relative_to(configs_dir().resolve()).as_posix()

        text = re.sub(r"(?m)^(extends:\s*)([^\s#]+)", by_name, text)
    print(write_text(target, text))
