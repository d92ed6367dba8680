"""Stores weights in 8 or 4 bits and, for ONNX, computes in 8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.artifacts import PICTURES, RECORD, write_json
from tunekit.config import SamplingConfig, no_effect
from tunekit.errors import ArtifactError, output_errors, require
from tunekit.passes.base import Context, Outcome, Pass
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric, Value
from tunekit.passes.models import around

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.families.family import Conditioning, Family
    from tunekit.passes.onnx_int8 import Feeds, Layer
    from tunekit.runtime import Runtime

    Call = tuple[Tensor, Tensor, Conditioning]

GRAPH = "model.onnx"
DRAWN_TOGETHER = 4
TESTED_CALLS = 8
"""Calls of the denoiser that the error is measured on; ranges are measured on others."""
PROBE_STEPS = 8

KEPT_IN_4_BITS = ("conv_in", "conv_out", "time_embedding")
KEPT_IN_8_BITS = ("conv_in", "conv_out", "time_embedding")


class Quantize(Pass):
    """Stores weights as int8, int4 or nf4; with ONNX, can compute in int8 too.

    Torch: weights are packed and unpacked for each use, so a model takes less memory and is no faster. ONNX:
    `weight_only` makes the file small and computes in floats; `dynamic` computes matrix products in int8;
    `static` convolutions too, with ranges measured on pictures that the model draws from the run's own
    prompts.
    """

    kind: ClassVar[str] = "quantize"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx"})
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "finds a model that is quantized already, by {giver}; leave one of the two out"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        SIZE,
        RELATIVE_ERROR,
        Metric("sqnr_db", "signal to noise", "dB", lower_is_better=False),
        Metric("quantized_layers", "quantized layers", "count"),
        Metric("int8_computed_layers", "layers computed in int8", "count"),
    )

    scheme: Literal["int8", "int4", "nf4"] = "int8"
    """int8: a scale per output channel; int4: a scale per `group`; nf4: bitsandbytes' 4-bit normal float."""
    mode: Literal["weight_only", "dynamic", "static"] = "weight_only"
    """What is computed in int8; more than weight_only is for ONNX."""
    activations: Literal["uint8", "int8"] = "uint8"
    """Of mode static. uint8 is for processors (onnxruntime, OpenVINO); int8 is what TensorRT takes."""
    reduce_range: bool = False
    """Weights in 7 bits, for processors without VNNI: their sums overflow in modes dynamic and static."""
    group: int = Field(32, ge=8, multiple_of=2)
    """Weights per scale of int4."""
    keep: list[str] | None = None
    """Paths in the denoiser that are not computed in few bits, such as `up_blocks.-1` (the last one); null
    means what is known to be sensitive: its first and last convolution and the time embedding."""
    components: list[str] | None = None
    """Folders to quantize; null means the denoiser of a torch model, all of an ONNX one. Others than the
    denoiser are quantized weight_only: they run once per picture."""
    samples: int = Field(32, ge=1)
    """Calls of the denoiser that ranges are measured on."""

    @model_validator(mode="after")
    def _effects(self) -> Quantize:
        if self.mode != "static":
            no_effect(self, ("activations", "samples"), "mode is not static")
        if self.mode == "weight_only":
            no_effect(self, ("reduce_range",), "mode is weight_only")
        if self.scheme != "int4":
            no_effect(self, ("group",), "scheme is not int4")
        return self

    def gives(self) -> frozenset[str]:
        """Weights in few bits."""
        return frozenset({"changed", "packed"})

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds what this format cannot have."""
        if format == "onnx" and self.scheme != "int8":
            return f"has scheme {self.scheme}, which is for torch; an ONNX model takes int8"
        if format == "torch" and self.mode != "weight_only":
            return f"has mode {self.mode}, which is for ONNX; put it behind export_onnx"
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Quantizes, and compares the denoiser with what it was.

        Raises:
            MissingPackageError: nf4 without bitsandbytes, or ONNX without onnx and onnxruntime.
            ArtifactError: a component that is not there.
        """
        from tunekit import families

        if self.scheme == "nf4":
            require("bitsandbytes", extra="quant", why="scheme nf4 needs")
        family = families.get(context.family)
        run = self._torch if artifact.format == "torch" else self._onnx
        return run(artifact, context, family)

    # Torch
    # ----------------------------------------------------------------------------------------------------

    def _torch(self, artifact: Artifact, context: Context, family: Family) -> Outcome:
        import copy

        from tunekit import hardware, layers
        from tunekit.runtime import torch_runtime

        name = family.facts.denoiser_name
        if self.components not in (None, [name]):
            raise ArtifactError(
                f"of a torch model only the {name} can be quantized, not {', '.join(self.components or [])}",
                where=artifact.source,
                hint=f"leave components out, or write components: [{name}]",
            )
        whole, device = context.open(artifact), hardware.probe(context.device).torch_device
        denoiser = copy.deepcopy(family.denoiser(whole))
        pipeline = around(whole, {name: denoiser})
        runtime = torch_runtime(family, pipeline, artifact=artifact, device=device)
        sampling = context.sampling_of(artifact).over(runtime.sampling)
        few = sampling.model_copy(update={"steps": min(sampling.steps or PROBE_STEPS, PROBE_STEPS)})
        calls = list(_calls(runtime, few, context.seed, prompts=_prompts(context)[:DRAWN_TOGETHER]))
        wanted = [runtime.denoise(*call) for call in calls]
        kept = (
            self.keep
            if self.keep is not None
            else list(KEPT_IN_8_BITS if self.scheme == "int8" else KEPT_IN_4_BITS)
        )
        done = layers.quantize(denoiser, self.scheme, group=self.group, keep=kept)
        error = _error([runtime.denoise(*call) for call in calls], wanted)
        context.save(pipeline, artifact)
        return Outcome(metrics={"quantized_layers": len(done), **_fidelity(error)}, details={"kept": kept})

    # ONNX
    # -----------------------------------------------------------------------------------------------------

    def _onnx(self, artifact: Artifact, context: Context, family: Family) -> Outcome:
        require("onnx", extra="onnx", why="quantizing an ONNX model needs")
        require("onnxruntime", extra="onnx", why="quantizing an ONNX model needs")
        folder = Path(artifact.source)
        there = sorted(path.parent.name for path in folder.glob(f"*/{GRAPH}"))
        chosen = there if self.components is None else self.components
        if missing := sorted(set(chosen) - set(there)):
            raise ArtifactError(
                f"there is no component {', '.join(missing)} to quantize",
                where=artifact.source,
                hint=f"there are {', '.join(there)}",
            )
        name = family.facts.denoiser_name
        _copy(folder, context.folder, without=[f"{component}/{GRAPH}" for component in chosen])
        calls = _recorded(
            artifact, context, family, self.samples + TESTED_CALLS if self.mode == "static" else TESTED_CALLS
        )
        tested, seen = _apart(calls, TESTED_CALLS)
        table = []
        for component in chosen:
            is_denoiser = component == name
            table.append(
                self._graph(folder, context, component, seen if is_denoiser else [], computes=is_denoiser)
            )
        error = _graph_error(context.folder / name / GRAPH, folder / name / GRAPH, tested)
        metrics: dict[str, Value] = {
            "quantized_layers": sum(row["layers"] for row in table),
            "int8_computed_layers": sum(row["computed"] for row in table),
            **_fidelity(error),
        }
        return Outcome(metrics=metrics, details={"components": table})

    def _graph(
        self, source: Path, context: Context, component: str, calls: Sequence[Feeds], *, computes: bool
    ) -> dict[str, Any]:
        """Quantizes one graph; returns a row for the report."""
        from tunekit.passes.onnx_int8 import Graph, measure_ranges

        context.say(component)
        path, mode = source / component / GRAPH, self.mode if computes else "weight_only"
        graph = Graph(path)
        found = graph.layers()
        kept, rest = [], found
        if mode != "weight_only":
            kept = [layer for layer in found if self._kept(layer, found, component)]
            rest = [layer for layer in found if layer not in kept]
        signed, bits = self.activations == "int8", 7 if self.reduce_range else 8
        # Weights that stay floats in the computation: onnxruntime would unpack the standard form in each call
        # as soon as the graph computes in int8; TensorRT reads no other.
        fold = self.mode != "weight_only" and not signed
        graph.store(kept, fold=fold)
        if mode == "static":
            ranges = measure_ranges(path, rest, calls, signed=signed)
            computed = graph.compute_static(rest, ranges, signed=signed, bits=bits)
        elif mode == "dynamic":
            computed = graph.compute_dynamic(rest, bits=bits)
        else:
            computed = 0
            graph.store(rest, fold=fold)
        graph.save(context.folder / component / GRAPH)
        _note(context.folder / component / "config.json", {"scheme": self.scheme, "mode": mode})
        return {
            "component": component,
            "mode": mode,
            "layers": len(found),
            "computed": computed,
            "size_bytes": (context.folder / component / GRAPH).stat().st_size,
            "size_bytes_before": path.stat().st_size,
        }

    def _kept(self, layer: Layer, found: Sequence[Layer], component: str) -> bool:
        paths = [other.path.removeprefix(f"{component}.") for other in found]
        own = layer.path.removeprefix(f"{component}.")
        names = KEPT_IN_8_BITS if self.keep is None else self.keep
        return any(
            own == name or own.startswith(f"{name}.") for name in (_resolve(path, paths) for path in names)
        )


def _resolve(path: str, names: Sequence[str]) -> str:
    """Writes a negative index as what it counts to: `up_blocks.-1` is `up_blocks.3` if that is the last."""
    parts: list[str] = []
    for part in path.split("."):
        if part.startswith("-"):
            below = [name.split(".")[len(parts)] for name in names if name.split(".")[: len(parts)] == parts]
            part = str(max((int(index) for index in below if index.isdigit()), default=-1) + 1 + int(part))
        parts.append(part)
    return ".".join(parts)


def _copy(source: Path, target: Path, *, without: Sequence[str]) -> None:
    """Copies a model's files, except its record and the graphs (and their weights) that are written anew."""
    import shutil

    with output_errors(target):
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            if path.is_dir() or name == RECORD or name.startswith(f"{PICTURES}/"):
                continue
            if any(name in (graph, f"{graph}_data") for graph in without):
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _note(config: Path, what: dict[str, str]) -> None:
    """Says in a component's config.json how it is quantized; runtimes choose their options by it."""
    content = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {**content, "quantization": what})


# Calls that the model itself makes -------------------------------------------------------------------------


def _prompts(context: Context) -> list[str]:
    """What the model is used for: the run's prompts, then the captions it was trained on."""
    prompts = list(context.prompts)
    if context.data is not None:
        from tunekit.data.images import scan_data

        prompts += [sample.caption for sample in scan_data(context.data).samples]
    return list(dict.fromkeys(prompts)) or [""]


def _calls(runtime: Runtime, sampling: SamplingConfig, seed: int, prompts: Sequence[str]) -> Iterator[Call]:
    """Draws one batch of latents and yields the denoiser's inputs of every step, guidance pairs included."""
    from tunekit.diffusion.sampling import initial_latents, sample

    shape = runtime.latent_shape(*runtime.size(sampling))
    seeds = [seed + index for index in range(len(prompts))]
    negative = [sampling.negative_prompt or ""] * len(prompts)
    calls: list[Call] = []

    def denoise(rows: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        calls.append((rows, times, conditioning))
        return runtime.denoise(rows, times, conditioning)

    sample(
        denoise,
        runtime.scheduler,
        initial_latents(seeds, shape),
        runtime.conditioning(list(prompts), sampling),
        runtime.conditioning(negative, sampling) if sampling.guided else None,
        sampling,
        begin=runtime.family.begin,
        seeds=seeds,
    )
    yield from calls


def _recorded(artifact: Artifact, context: Context, family: Family, count: int) -> list[Feeds]:
    """What the denoiser's graph is fed while the model draws: `count` calls, spread over all timesteps."""
    from tunekit.runtime import open_runtime

    runtime = open_runtime(artifact, device="cpu", provider="cpu")
    sampling = context.sampling_of(artifact).over(runtime.sampling)
    module: Any = family.denoiser(runtime.pipeline)
    feeds: list[Feeds] = []

    class Recorder:
        def __init__(self, graph: Any) -> None:
            self.graph, self.inputs, self.max_rows = graph, graph.inputs, graph.max_rows
            self.unbatched = graph.unbatched

        def run(self, given: Feeds) -> Feeds:
            feeds.append(given)
            outputs: Feeds = self.graph.run(given)
            return outputs

    module.graph = Recorder(module.graph)
    prompts = _prompts(context)
    drawn = 0
    while len(feeds) < count:
        batch = [prompts[(drawn + index) % len(prompts)] for index in range(DRAWN_TOGETHER)]
        for _ in _calls(runtime, sampling, context.seed + drawn, batch):
            pass
        drawn += DRAWN_TOGETHER
    runtime.close()
    return [feeds[index * len(feeds) // count] for index in range(count)]


def _apart(calls: Sequence[Feeds], count: int) -> tuple[list[Feeds], list[Feeds]]:
    """`count` calls evenly out of all, and the others."""
    chosen = {index * len(calls) // count for index in range(min(count, len(calls)))}
    return (
        [call for index, call in enumerate(calls) if index in chosen],
        [call for index, call in enumerate(calls) if index not in chosen],
    )


def _graph_error(path: Path, reference: Path, calls: Sequence[Feeds]) -> float:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    outputs: list[list[Tensor]] = []
    for file in (path, reference):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        outputs.append([torch.from_numpy(session.run(None, feeds)[0]).float() for feeds in calls])
    return _error(*outputs)


def _error(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    import torch

    from tunekit.diffusion.metrics import relative_error

    return relative_error(torch.cat([t.flatten() for t in made]), torch.cat([t.flatten() for t in wanted]))


def _fidelity(error: float) -> dict[str, Value]:
    import math

    return {"relative_error": error, "sqnr_db": -20 * math.log10(max(error, 1e-9))}


PASS = Quantize
