"""Stores weights in 8 or 4 bits and, for ONNX, computes in 8."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.artifacts import PICTURES, RECORD, write_json
from tunekit.config import Count, Names, no_effect
from tunekit.errors import ArtifactError, output_errors, require
from tunekit.passes.base import Context, Outcome, Pass
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric, Value
from tunekit.passes.models import around

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.data.calibration import Call
    from tunekit.families.family import Family
    from tunekit.passes.onnx_int8 import Feeds
    from tunekit.runtime import Runtime

GRAPH = "model.onnx"
TESTED_CALLS = 8
"""Calls of the denoiser that the error is measured on; ranges are measured on others."""
PROBE_STEPS = 8
"""Sampling steps at most of the pictures that are drawn for these calls alone."""


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
    group: int = Field(32, ge=8, le=65_536, multiple_of=2)
    """Weights per scale of int4."""
    keep: Names | None = None
    """Paths in the denoiser that are not computed in few bits, such as `up_blocks.-1` (the last one); null
    means what the family knows to be sensitive, such as its first and last layer and the time embedding."""
    components: Names | None = None
    """Folders to quantize; null means the denoiser of a torch model, all of an ONNX one. Others than the
    denoiser are quantized weight_only: they run once per picture."""
    samples: Count = 32
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

    def _sensitive(self, family: Family) -> list[str]:
        return list(family.facts.denoiser.sensitive) if self.keep is None else self.keep

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
        calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
        wanted = [runtime.denoise(*call) for call in calls]
        kept = self._sensitive(family)
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
        # On the processor and in floats, whatever is to run the result.
        with dataclasses.replace(context, device="cpu").running(artifact, provider="cpu") as runtime:
            if self.mode == "static":
                calls = context.calls(runtime, count=self.samples + TESTED_CALLS)
            else:
                calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
            tested, seen = _apart(_feeds(runtime, calls), TESTED_CALLS)
        table = []
        for component in chosen:
            if component == name:
                keep = self._sensitive(family)
                row = self._graph(folder / component, context, mode=self.mode, keep=keep, calls=seen)
            else:
                row = self._graph(folder / component, context, mode="weight_only")
            table.append(row)
        error = _graph_error(context.folder / name / GRAPH, folder / name / GRAPH, tested)
        metrics: dict[str, Value] = {
            "quantized_layers": sum(row["layers"] for row in table),
            "int8_computed_layers": sum(row["computed"] for row in table),
            **_fidelity(error),
        }
        return Outcome(metrics=metrics, details={"components": table})

    def _graph(
        self,
        source: Path,
        context: Context,
        *,
        mode: str,
        keep: Sequence[str] = (),
        calls: Sequence[Feeds] = (),
    ) -> dict[str, Any]:
        """Quantizes one component's graph; returns a row for the report.

        Args:
            keep: paths of modules that compute in floats.
            calls: what ranges are measured on.
        """
        from tunekit.passes.onnx_int8 import Graph, measure_ranges

        component = source.name
        context.say(component)
        path, target = source / GRAPH, context.folder / component
        graph = Graph(path)
        found = graph.layers()
        kept, rest = [], found
        if mode != "weight_only":
            paths = [layer.path.removeprefix(f"{component}.") for layer in found]
            kept = [layer for layer, own in zip(found, paths, strict=True) if _under(own, keep, paths)]
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
        graph.save(target / GRAPH)
        _note(target / "config.json", {"scheme": self.scheme, "mode": mode})
        return {
            "component": component,
            "mode": mode,
            "layers": len(found),
            "computed": computed,
            "size_bytes": (target / GRAPH).stat().st_size,
            "size_bytes_before": path.stat().st_size,
        }


def _under(name: str, paths: Sequence[str], names: Sequence[str]) -> bool:
    """Whether layer `name` is one of `paths` or lies below one; `names` are those of all layers."""
    return any(
        name == path or name.startswith(f"{path}.") for path in (_resolve(path, names) for path in paths)
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


def _feeds(runtime: Runtime, calls: Sequence[Call]) -> list[Feeds]:
    """What the denoiser's graph is fed for these calls."""
    import numpy as np

    module: Any = runtime.family.denoiser(runtime.pipeline)
    graph = module.graph
    feeds: list[Feeds] = []

    class Recorder:
        """Takes what the graph would take, and runs nothing."""

        inputs, max_rows, unbatched = graph.inputs, graph.max_rows, graph.unbatched

        def run(self, given: Feeds) -> Feeds:
            feeds.append(given)
            return {"nothing": np.zeros(1, np.float32)}

    module.graph = Recorder()
    try:
        for call in calls:
            runtime.denoise(*call)
    finally:
        module.graph = graph
    return feeds


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
