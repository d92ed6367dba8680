"""How fast, how large, and against what: models measured in turns, in one process, under the same conditions.

What the figures mean:

- `denoiser_ms_p50`, `denoiser_ms_p95`: one call of the denoiser at the picture's size on two rows (with and
  without the prompt, as guidance asks); milliseconds of wall time.
- `picture_ms_p50`, `picture_ms_p95`: one picture from prompt to pixels, text encoder and VAE included.
- `speedup`: how many times faster a whole picture is than with the baseline, each in its own steps. Each
  round measures all models one after the other and gives one ratio; this is their median, so that a busy
  moment of the machine counts on both sides.
- `slower`: the speed-up is below 1 by more than rounds usually differ (3 %).
- `size_bytes`: of the model's files; `size_ratio`: over the baseline's.
- `peak_memory_bytes`: by how much, at its peak, the memory of a fresh process grows while this model is
  opened and draws one picture; the process has loaded every library before and drawn with a tiny model. On
  the CPU it is the resident set, read every few milliseconds; on a GPU what torch's tensors hold (None for
  other runtimes there: nothing here counts their memory).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from tunekit import hardware
from tunekit.config import RuntimeConfig, SamplingConfig, SamplingSteps
from tunekit.errors import ConfigError, DeviceError
from tunekit.passes.base import SAMPLING, Context, Outcome, Pass
from tunekit.passes.metrics import SIZE, Metric, Tile
from tunekit.passes.providers import Provider, cannot_run, gpu_answers
from tunekit.resources import Source

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.runtime import Runtime

    Running = Callable[..., AbstractContextManager[Runtime]]

VERSION = 1
PROMPT = "a red apple"
CALLS = 4
"""Denoiser calls per round."""
NOISE = 0.03
"""Ratios closer to 1 than this are not called a difference."""


MEASURED = (
    Metric(
        "denoiser_ms_p50", "denoiser p50", "ms", lower_is_better=True, rank=20, column="denoiser step p50"
    ),
    Metric(
        "denoiser_ms_p95", "denoiser p95", "ms", lower_is_better=True, under="denoiser_ms_p50", small="p95 {}"
    ),
    Metric("picture_ms_p50", "picture p50", "ms", lower_is_better=True, rank=30, column="picture p50"),
    Metric(
        "picture_ms_p95", "picture p95", "ms", lower_is_better=True, under="picture_ms_p50", small="p95 {}"
    ),
    SIZE,
    Metric("peak_memory_bytes", "peak memory", "bytes", lower_is_better=True, rank=50, column="peak memory"),
)
"""Of each model by itself."""
STEPS = Metric("picture_steps", "steps of a picture", under="picture_ms_p50", small="{} steps")
_FASTER = "a picture, faster by"
COMPARED = (
    Metric(
        "speedup_first",
        "speedup on the first",
        "x",
        lower_is_better=False,
        rank=41,
        under="speedup",
        small="{} of fine-tuned",
        tile=Tile(
            _FASTER,
            (
                "{picture_ms_p50} a picture",
                "of {picture_steps} steps",
                "against the fine-tuned model in torch",
                "of {picture_steps_first} steps",
            ),
        ),
    ),
    Metric(
        "speedup",
        "speedup",
        "x",
        lower_is_better=False,
        rank=42,
        column="speed-up",
        tile=Tile(_FASTER, ("{picture_ms_p50} a picture", "against its parent")),
    ),
    Metric("picture_steps_first", "steps of the first model's picture"),
    Metric("slower", "slower", under="speedup"),
    Metric("size_ratio", "size ratio", "x", lower_is_better=True),
)
"""With a reference."""


class Benchmark(Pass):
    """Measures latency, peak memory and size beside the parent and the fine-tuned model, in turns."""

    kind: ClassVar[str] = "benchmark"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx", "openvino", "tensorrt"})
    looks: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (*MEASURED, STEPS, *COMPARED)

    steps: SamplingSteps | None = None
    """Sampling steps of a picture, for every model; null: each model's own."""
    repeats: int = Field(5, ge=1, le=10_000)
    """Rounds; each draws one picture with every model."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads, the same for every model; None: those that `tune_runtime` chose for a model, else as many
    as torch takes here."""
    provider: Provider | None = None
    """Runtime of ONNX models; None: the one that `tunekit generate` takes here."""
    memory: bool = True
    """Measure peak memory too, which starts one process per model."""

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Refuses a provider for a model that has none."""
        if self.provider and format != "onnx":
            return f"sets provider, which has no effect on a model in {format}: it runs ONNX files"
        if format == "tensorrt" and not gpu_answers():
            return (
                "would have to run TensorRT engines, but no NVIDIA GPU answers here; measure the ONNX model"
                " instead (put it before build_tensorrt), or run the chain where the card is"
            )
        if format == "openvino":
            return cannot_run(["openvino"])
        return cannot_run([self.provider] if self.provider else ())

    def reads(self, context: Context) -> frozenset[str]:
        """Whom it is measured beside, and what is drawn."""
        return frozenset({"seed", "prompts", "parent", "first", *SAMPLING})

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Measures the model, its parent and the first whole model of the chain."""
        parent, first = context.reference("parent"), context.reference("first")
        sides = {  # the same files may be two models, drawn otherwise
            _name(drawn): drawn
            for model in (parent, first, artifact)
            if model is not None
            for drawn in (replace(model, sampling=context.sampling_of(model)),)
        }
        settings = Settings(
            prompts=context.prompts or (PROMPT,),
            sampling=SamplingConfig(steps=self.steps),
            repeats=self.repeats,
            device=context.device,
            provider=self.provider,
            threads=self.threads,
            memory=self.memory,
            seed=context.seed,
        )
        result = compare(list(sides.values()), settings, context.say, context.running)
        figures = dict(zip(sides, result["artifacts"], strict=True))

        def found(model: Artifact) -> dict[str, Any]:
            row: dict[str, Any] = figures[_name(replace(model, sampling=context.sampling_of(model)))]
            return row

        own = found(artifact)
        metrics = _measured(own)
        for reference, suffix in ((parent, ""), (first, "_first")):
            if reference is not None:
                against = found(reference)
                metrics |= {f"{name}{suffix}": value for name, value in ratios(own, against).items()}
        if first is not None:
            metrics["picture_steps_first"] = found(first)["steps"]
        if parent is None:
            note = "no parent to compare with: the chain has only one whole model so far"
        else:
            word = "SLOWER" if metrics["slower"] else "speed-up"
            note = f"{word}: {metrics['speedup']:.2f}x its parent's speed ({_said(found(parent))})"
            if first is not None and found(first) is not found(parent):
                note += f", {metrics['speedup_first']:.2f}x the first model's ({_said(found(first))})"
            note += f", whole pictures, in {own['steps']} steps"
        context.say(note)
        if busy := result["settings"]["busy"]:
            note += f"; {busy}"
        others = {
            model.path.name: _measured(figures[name])
            for name, model in sides.items()
            if model.path is not None and figures[name] is not own
        }
        shown = ("title", "steps", *(metric.name for metric in MEASURED))
        table = [{name: row[name] for name in shown} for row in result["artifacts"]]
        return Outcome(
            metrics=metrics,
            details={"note": note, "settings": result["settings"], "artifacts": others, "models": table},
        )


def _name(model: Artifact) -> str:
    """Of a model among others; its sampling is whole."""
    return (
        f"{model.source} {model.sampling.model_dump_json() if model.sampling else ''} {model.runtime or ''}"
    )


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of one artifact of `compare`."""
    return {**{metric.name: row[metric.name] for metric in MEASURED}, STEPS.name: row["steps"]}


def _said(row: dict[str, Any]) -> str:
    return f"{row['title']}, {row['steps']} steps"


@dataclass(frozen=True)
class Settings:
    """How models are measured, the same for all.

    Attributes:
        prompts: taken in turn, one per round.
        sampling: how pictures are drawn; what it leaves open is each model's own.
        repeats: rounds.
        device: "auto", "cpu", "cuda:0".
        provider: of the ONNX models among them.
        threads: CPU threads; None: those that were chosen for a model, else as many as torch takes here.
        memory: whether to measure peak memory too.
        seed: of the first picture.
    """

    prompts: tuple[str, ...] = (PROMPT,)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    repeats: int = 5
    device: str = "auto"
    provider: str | None = None
    threads: int | None = None
    memory: bool = True
    seed: int = 0


def compare(
    artifacts: Sequence[Artifact | str | Path],
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda line: None,
    running: Running | None = None,
) -> dict[str, Any]:
    """Measures models in turns; the first is the baseline of the ratios.

    Args:
        artifacts: anything that `open_runtime` opens.
        settings: how.
        say: shows one line of progress.
        running: opens a model, where it is not read from disk.

    Returns:
        `{"version": 1, "settings": {...}, "artifacts": [...]}`; an artifact has `source`, `title`, the
        figures named at the top of this module, what it was drawn with (`steps`, `guidance`, `pixels`),
        `rounds_ms` (its pictures) and, from the second on, `speedup`, `slower` and `size_ratio` against the
        first.

    Raises:
        ConfigError: nothing to measure.
        DeviceError: the process that measures memory failed.
    """
    import torch

    from tunekit.artifacts import Artifact, open_artifact
    from tunekit.passes.verify import describe

    if not artifacts:
        raise ConfigError("nothing to measure: name at least one artifact")
    settings = settings or Settings()
    running = running or partial(_from_disk, device=settings.device)
    opened = [a if isinstance(a, Artifact) else open_artifact(a) for a in artifacts]
    before = torch.get_num_threads()
    threads = settings.threads or before
    found = busy()
    if found:
        say(found)
    sides = []
    try:
        with ExitStack() as stack:
            for artifact in opened:
                provider = settings.provider if artifact.format == "onnx" else None
                own = artifact.runtime if settings.threads is None else None
                taken = None if own and own.threads and own.machine == hardware.machine() else threads
                runtime = stack.enter_context(running(artifact, provider=provider, threads=taken))
                sampling = settings.sampling.over(runtime.sampling)
                title = describe(artifact, runtime)
                sides.append(_Side(artifact, runtime, title, provider, sampling, taken))
            with _collector_off():
                for number in range(-1, settings.repeats):
                    # Round -1 warms up. Nobody is always first: who follows finds the caches another left.
                    shift = number % len(sides)
                    for side in sides[shift:] + sides[:shift]:
                        side.measure(settings, number)
                    if number >= 0:
                        latest = ", ".join(f"{side.pictures[-1]:.0f} ms" for side in sides)
                        say(f"round {number + 1} of {settings.repeats}: a picture took {latest}")
    finally:
        torch.set_num_threads(before)
    gc.collect()
    rows = [_row(side, settings, threads) for side in sides]
    for row in rows[1:]:
        row |= ratios(row, rows[0])
    shared = {"repeats": settings.repeats, "threads": threads, "device": settings.device, "busy": found}
    return {"version": VERSION, "settings": shared, "artifacts": rows}


def _row(side: _Side, settings: Settings, threads: int) -> dict[str, Any]:
    """What was found about one model, before it is compared; its memory is measured here."""
    return {
        "source": side.artifact.source,
        "title": side.title,
        "steps": side.sampling.steps,
        "guidance": side.sampling.guidance,
        "pixels": [side.sampling.height, side.sampling.width],
        "denoiser_ms_p50": percentile(side.calls, 50),
        "denoiser_ms_p95": percentile(side.calls, 95),
        "picture_ms_p50": percentile(side.pictures, 50),
        "picture_ms_p95": percentile(side.pictures, 95),
        "size_bytes": side.artifact.size_bytes or None,
        "peak_memory_bytes": _peak_memory(side, settings, threads) if settings.memory else None,
        "rounds_ms": side.pictures,
    }


@contextmanager
def _from_disk(
    artifact: Artifact, *, device: str, provider: str | None, threads: int | None
) -> Iterator[Runtime]:
    from tunekit.runtime import open_runtime

    runtime = open_runtime(artifact, device=device, provider=provider, threads=threads)
    try:
        yield runtime
    finally:
        runtime.close()


def ratios(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """`speedup`, `slower` and `size_ratio` of one artifact of `compare` against another."""
    pairs = zip(row["rounds_ms"], baseline["rounds_ms"], strict=True)
    speedup = percentile([other / own for own, other in pairs], 50)
    sizes = (row["size_bytes"], baseline["size_bytes"])
    return {
        "speedup": speedup,
        "slower": speedup < 1 - NOISE,
        "size_ratio": sizes[0] / sizes[1] if all(sizes) else None,
    }


def busy() -> str | None:
    """What to say if others want the processors too: threads that wait for each other then lose most."""
    processors = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 0.75 * processors:
        return None
    return (
        f"this machine is busy (load {load:.1f} on {processors} processors); on an idle one ratios may differ"
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The `share`-th percentile, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


# Time ------------------------------------------------------------------------------------------------------


@dataclass
class _Side:
    artifact: Artifact
    runtime: Runtime
    title: str
    provider: str | None
    sampling: SamplingConfig
    """How it is drawn with; nothing of it is None but the scheduler."""
    threads: int | None
    """CPU threads; None: those that were chosen for it."""
    calls: list[float] = field(default_factory=list)
    """Milliseconds per denoiser call."""
    pictures: list[float] = field(default_factory=list)
    """Milliseconds per picture, one per round."""

    def measure(self, settings: Settings, number: int) -> None:
        """One round; round -1 is not kept, and the first call of each round brings the caches back."""
        import torch

        from tunekit.diffusion.sampling import initial_latents
        from tunekit.runtime import generate

        runtime, sampling = self.runtime, self.sampling
        shape = runtime.latent_shape(*runtime.size(sampling))
        latents = initial_latents([settings.seed, settings.seed + 1], shape)
        prompts = settings.prompts
        conditioning = runtime.conditioning([sampling.negative_prompt or "", prompts[0]], sampling)
        middle = torch.tensor(int(runtime.scheduler.config.num_train_timesteps) // 2)
        calls = []
        for _ in range(CALLS + 1):
            started = time.perf_counter()
            runtime.denoise(latents, middle, conditioning)
            calls.append((time.perf_counter() - started) * 1e3)
        drawn = max(number, 0)
        runtime.forget_prompts()  # a picture is timed with its text encoder
        started = time.perf_counter()
        generate(runtime, [prompts[drawn % len(prompts)]], sampling, seeds=[settings.seed + drawn])
        picture = (time.perf_counter() - started) * 1e3
        if number >= 0:
            self.calls += calls[1:]
            self.pictures.append(picture)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keeps the garbage collector out of the measured calls."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# Memory ----------------------------------------------------------------------------------------------------


def _peak_memory(side: _Side, settings: Settings, threads: int) -> int | None:
    """Asks a fresh process; see `_measure_memory`."""
    request = {
        "source": asdict(side.artifact.model_source),
        "artifact": side.artifact.source,
        "family": side.artifact.family,
        "provider": side.provider,
        "threads": side.threads,
        "torch_threads": threads,
        "runtime": side.artifact.runtime.model_dump(mode="json") if side.artifact.runtime else None,
        "device": settings.device,
        "prompt": settings.prompts[0],
        "sampling": side.sampling.model_dump(mode="json"),
    }
    import tunekit

    root = str(Path(tunekit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tunekit.passes.benchmark", json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DeviceError(
            f"its memory could not be measured: {reason}",
            where=side.title,
            hint="leave it out with memory: false",
        )
    peak = json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]
    return None if peak is None else int(peak)


def _measure_memory(request: dict[str, Any]) -> int | None:
    """Peak growth of this process's memory while a model is opened and draws one picture of two steps."""
    import torch

    from tunekit import families
    from tunekit.artifacts import open_artifact
    from tunekit.runtime import generate, open_runtime, torch_runtime

    torch.set_num_threads(request["torch_threads"])
    artifact = open_artifact(request["artifact"], family=request["family"] or None)
    tuned = RuntimeConfig(**request["runtime"]) if request["runtime"] else None
    artifact = replace(artifact, opened=Source(**request["source"]), runtime=tuned)
    family = families.get(artifact.family or families.detect(artifact.model_source))
    place = hardware.probe(request["device"])
    if place.kind != "cpu" and artifact.format != "torch":
        return None
    # Libraries load their parts when these are first used. A tiny model uses them all.
    tiny = torch_runtime(family, family.tiny(), device=place.torch_device, threads=request["torch_threads"])
    generate(tiny, ["warm up"], SamplingConfig(steps=1), seeds=[0])
    tiny.close()
    if artifact.format in ("onnx", "openvino"):
        by_openvino = "openvino" in (artifact.format, str(request["provider"]).partition("_")[0])
        __import__("openvino" if by_openvino else "onnxruntime")
    del tiny
    gc.collect()
    few = SamplingConfig(**{**request["sampling"], "steps": 2})
    with hardware.peak_memory(place.torch_device) as peak:
        runtime = open_runtime(
            artifact, device=request["device"], provider=request["provider"], threads=request["threads"]
        )
        generate(runtime, [request["prompt"]], few, seeds=[0])
    return peak.peak_bytes - peak.start_bytes


PASS = Benchmark

if __name__ == "__main__":
    print(json.dumps({"peak_memory_bytes": _measure_memory(json.loads(sys.argv[1]))}))
