"""Commands that draw pictures: generate, bench."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunekit.cli import screen
from tunekit.cli.options import AsJson, Guidance, ModelBase, Side, Steps, Variant

if TYPE_CHECKING:
    from tunekit.config import SamplingConfig


def sampling_of(
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


def generate(
    artifact: Annotated[
        str,
        typer.Argument(
            help='run (or its name), adapter, any artifact, diffusers folder, hub id, or "builtin/..."'
        ),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="may be given several times")],
    negative: Annotated[str | None, typer.Option(help="what not to draw")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="of the first picture; the next ones count up")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Side = None,
    width: Side = None,
    out: Annotated[Path, typer.Option(help="folder, or a .png file for one picture or the grid")] = Path(
        "generated"
    ),
    scale: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="strengths of the adapter to draw with: 0,0.5,1")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="all side by side in one more file, strengths as columns")
    ] = False,
    tiled: Annotated[
        bool, typer.Option("--tiled", help="decode large pictures in tiles: less memory")
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="adapter to put on the artifact")] = None,
    family: Annotated[str | None, typer.Option(help="if the artifact does not say it")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu, mps")] = "auto",
    provider: Annotated[
        str | None,
        typer.Option("--provider", "--backend", help="for ONNX: cpu, cuda, directml, openvino, ..."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16, for torch and OpenVINO")] = None,
    base: ModelBase = None,
    variant: Variant = None,
) -> None:
    """Draw pictures with a run, an adapter, any artifact of a chain, a diffusers folder or a hub id."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tunekit import workspace

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = screen.console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # the paths may go into a file
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", visible=False)
        sampling = sampling_of(steps, guidance, height, width, negative)
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
            base=base,
            variant=variant,
            tiled=tiled,
            scales=strengths_of(scale, "--scale"),
            grid=grid,
            say=lambda line: progress.console.print(line, style="yellow"),
            on_step=lambda title, done, total: progress.update(
                task, description=title, completed=done, total=total, visible=True
            ),
        ):
            print(path)


def strengths_of(text: str | None, option: str) -> list[float]:
    """Strengths of an adapter, as an option has them.

    Raises:
        ConfigError: something else than a few numbers.
    """
    from tunekit.errors import ConfigError

    scales = []
    for part in text.split(",") if text is not None else ():
        try:
            scales.append(float(part))
        except ValueError:
            scales.append(math.nan)
        if not abs(scales[-1]) <= 10:
            raise ConfigError(
                f'"{part}" is no strength of an adapter',
                where=option,
                hint="numbers from -10 to 10 with commas between them, such as 0,0.5,1",
            )
    return list(dict.fromkeys(scales))


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
        str | None,
        typer.Option("--provider", "--backend", help="for ONNX: cpu, cuda, directml, openvino, ..."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts in turns: latency, size and peak memory, and the ratios to the first."""
    from tunekit import workspace
    from tunekit.artifacts import open_artifact
    from tunekit.passes.benchmark import PROMPT, Settings, compare

    sources = [workspace.find_model(artifact) for artifact in artifacts]
    opened = [open_artifact(source, family=family).in_variant(variant) for source in sources]
    console = screen.console(stderr=True)
    settings = Settings(
        prompts=tuple(prompt or [PROMPT]),
        sampling=sampling_of(steps, guidance, height, width),
        repeats=repeats,
        device=device,
        provider=provider,
        threads=threads,
        memory=memory,
    )
    found = compare(opened, settings, say=lambda line: console.print(line, style="dim"))
    if as_json:
        screen.print_json(found)
        return
    from rich.text import Text

    from tunekit.passes.base import format_metric

    shown = ("denoiser_ms_p50", "denoiser_ms_p95", "picture_ms_p50", "size_bytes", "peak_memory_bytes")
    columns = ("", "denoiser p50", "p95", "picture p50", "size", "peak memory", "speed", "of its size")
    rows: list[tuple[str | Text, ...]] = []
    for name, row in zip(artifacts, found["artifacts"], strict=True):
        cells = ["-" if row[key] is None else format_metric(key, row[key]) for key in shown]
        if "speedup" in row:
            speed = Text(f"{row['speedup']:.2f}x" + (" SLOWER" if row["slower"] else ""))
            speed.style = "red" if row["slower"] else "green"
            size = "-" if row["size_ratio"] is None else f"{row['size_ratio']:.2f}x"
        else:
            speed, size = Text("1x"), "1x"
        rows.append((f"{name}\n{row['title']}", *cells, speed, size))
    screen.show_table(screen.console(), columns, rows)
