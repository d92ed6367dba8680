"""Stores weights in 8 or 4 bits and, for ONNX, computes in 8."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.artifacts import PICTURES, RECORD, write_json
from tunekit.config import Count, Names, no_effect
from tunekit.errors import ArtifactError, ChainError, output_errors, require
from tunekit.passes.base import DISTINCT, SAMPLING, Context, Outcome, Pass, Start, formats
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric, Value
from tunekit.passes.models import around
from tunekit.passes.paths import under, unmatched
from tunekit.passes.providers import lacks

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.data.calibration import Call
    from tunekit.families.family import Family
    from tunekit.passes.onnx_int8 import Feeds, Graph
    from tunekit.runtime import Runtime

GRAPH = "model.onnx"
VAES = ("vae_encoder", "vae_decoder")
"""Graphs of the autoencoder."""
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
        "packed": "finds a model that is quantized already, by {giver}; leave one of the two out",
        "fp16": "comes after {giver}, whose graphs are in fp16, and int8 is made of fp32; write"
        " `export_onnx: {{dtype: fp32}}` before it",
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
    keep: Annotated[Names, DISTINCT] | None = None
    """Paths in the denoiser that are not computed in few bits, such as `up_blocks.-1` (the last one); null
    means what the family knows to be sensitive, such as its first and last layer and the time embedding."""
    components: Annotated[Names, DISTINCT] | None = Field(None, min_length=1)
    """Folders to quantize; null means the denoiser of a torch model, the denoiser and the VAE of an ONNX one.
    The text encoders stay floats: they are small, and most of what int8 costs is lost in them (pictures of
    builtin/emoji-64, weight_only: 40.5 dB, and 27.4 with the text encoder). Others than the denoiser are
    quantized weight_only: they run once per picture."""
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

    @classmethod
    def options(cls, target: str) -> Sequence[Sequence[Any]]:
        """Small files, then products in int8 where the target has them."""
        if target == "torch":
            return [[{cls.kind: {"scheme": scheme}}] for scheme in ("int8", "int4")]
        modes = ("weight_only", "static") if target in ("cpu", "openvino") else ("weight_only",)
        return [[{cls.kind: {"mode": mode}}] for mode in modes]

    def gives(self) -> frozenset[str]:
        """Weights in few bits, and what is computed in uint8."""
        uint8 = self.mode == "dynamic" or (self.mode == "static" and self.activations == "uint8")
        return frozenset({"changed", "packed", "uint8"} if uint8 else {"changed", "packed"})

    def reads(self, context: Context) -> frozenset[str]:
        """What ranges and errors are measured on."""
        return frozenset({"seed", "prompts", "data", *SAMPLING})

    def formerly(self, format: str) -> dict[str, Any] | None:
        """All components of an ONNX model were quantized where none was named, the text encoders too."""
        return None if format == "onnx" and self.components is None else super().formerly(format)

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds what this format cannot have."""
        if format == "onnx" and self.scheme != "int8":
            return f"has scheme {self.scheme}, which is for torch; an ONNX model takes int8"
        if format == "torch" and self.mode != "weight_only":
            return f"has mode {self.mode}, which is for ONNX; put it behind export_onnx"
        if self.scheme == "nf4":
            return lacks("bitsandbytes", extra="quant")
        return lacks("onnx", "onnxruntime", extra="onnx") if format == "onnx" else None

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds paths and components that the model does not have."""
        if self.keep and start.modules and (wrong := unmatched(self.keep, start.modules)):
            return f"has a wrong keep: {wrong}"
        if not self.components or not start.family:
            return None
        from tunekit import families

        facts = families.planned(start.family).facts
        arriving = formats(start.format, earlier)[-1]
        if arriving == "torch" and self.components != [facts.denoiser_name]:
            return (
                f"has components {', '.join(self.components)}, and of a torch model only the"
                f" {facts.denoiser_name} can be quantized"
            )
        if arriving == "onnx" and start.format != "onnx":
            known = [*(part.name for part in facts.encoders), facts.denoiser_name, *VAES]
            if absent := [name for name in self.components if name not in known]:
                return f"finds no component {', '.join(absent)} to quantize; there are {', '.join(known)}"
        if self.mode != "weight_only" and facts.denoiser_name not in self.components:
            return (
                f"has mode {self.mode}, which has no effect on {', '.join(self.components)}: only the"
                f" {facts.denoiser_name} is computed in int8"
            )
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Quantizes, and compares the denoiser with what it was.

        Raises:
            MissingPackageError: nf4 without bitsandbytes, or ONNX without onnx and onnxruntime.
            ArtifactError: a component that is not there, or that nothing can be done with.
            ChainError: `keep` names what is not there.
            ModelError: a file of weights is missing or damaged.
            NonFiniteError: the model gives values that are not finite while ranges are measured.
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
        self._check_keep([path for path, _ in denoiser.named_modules() if path], artifact.source)
        pipeline = around(whole, {name: denoiser})
        runtime = torch_runtime(family, pipeline, artifact=artifact, device=device)
        calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
        wanted = [runtime.denoise(*call) for call in calls]
        kept = self._sensitive(family)
        done = layers.quantize(denoiser, self.scheme, group=self.group, keep=kept)
        if not done:
            raise _nothing(name, "they are quantized already, or keep names them all", artifact.source)
        error = _error([runtime.denoise(*call) for call in calls], wanted)
        context.save(pipeline, artifact)
        return Outcome(metrics={"quantized_layers": len(done), **_fidelity(error)}, details={"kept": kept})

    # ONNX
    # -----------------------------------------------------------------------------------------------------

    def _onnx(self, artifact: Artifact, context: Context, family: Family) -> Outcome:
        require("onnx", extra="onnx", why="quantizing an ONNX model needs")
        require("onnxruntime", extra="onnx", why="quantizing an ONNX model needs")
        from tunekit.passes.onnx_int8 import Graph

        folder, name = Path(artifact.source), family.facts.denoiser_name
        there = sorted(path.parent.name for path in folder.glob(f"*/{GRAPH}"))
        encoders = [encoder.name for encoder in family.facts.encoders]
        chosen = self.components or [component for component in there if component not in encoders]
        if missing := sorted(set(chosen) - set(there)):
            raise ArtifactError(
                f"there is no component {', '.join(missing)} to quantize",
                where=artifact.source,
                hint=f"there are {', '.join(there)}",
            )
        for component in chosen:  # one after the other: a graph holds its weights
            graph = Graph(folder / component / GRAPH)
            if not graph.layers():
                raise _nothing(component, graph.types(), str(folder / component))
            if component == name:
                self._check_keep(graph.modules(name), artifact.source)
        del graph
        _copy(folder, context.folder, without=chosen)
        # On the processor and in floats, whatever is to run the result.
        with dataclasses.replace(context, device="cpu").running(artifact, provider="cpu") as runtime:
            if self.mode == "static":
                calls = context.calls(runtime, count=self.samples + TESTED_CALLS)
            else:
                calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
            tested, seen = _apart(calls, TESTED_CALLS)
            feeds = _feeds(runtime, tested, context.prompts, chosen)
            measured = _denoiser_feeds(runtime, seen) if self.mode == "static" else []
        table = []
        for component in chosen:
            context.say(component)
            graph = Graph(folder / component / GRAPH)
            if component == name:
                keep = self._sensitive(family)
                row = self._graph(graph, context, mode=self.mode, keep=keep, calls=measured)
            else:
                row = self._graph(graph, context, mode="weight_only")
            del graph
            made = context.folder / component / GRAPH
            error = _graph_error(made, folder / component / GRAPH, feeds[component])
            table.append({**row, "relative_error": error})
        errors = {row["component"]: row["relative_error"] for row in table}
        metrics: dict[str, Value] = {
            "quantized_layers": sum(row["layers"] for row in table),
            "int8_computed_layers": sum(row["computed"] for row in table),
            **_fidelity(errors.get(name, max(errors.values()))),
            **{f"relative_error_{component}": error for component, error in errors.items()},
        }
        return Outcome(metrics=metrics, details={"components": table})

    def _check_keep(self, modules: Sequence[str], source: str) -> None:
        """Raises where `keep` names no module: it would protect nothing."""
        if wrong := unmatched(self.keep or (), modules):
            raise ChainError(f"quantize has a wrong keep: {wrong}", where=source)

    def _graph(
        self,
        graph: Graph,
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
        from tunekit.passes.onnx_int8 import measure_ranges
        from tunekit.runtime.onnx_files import weight_bytes

        path, component = graph.path, graph.path.parent.name
        target = context.folder / component
        found = graph.layers()
        kept, rest = [], found
        if mode != "weight_only":
            paths = [layer.path.removeprefix(f"{component}.") for layer in found]
            kept = [layer for layer, own in zip(found, paths, strict=True) if under(own, keep, paths)]
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
        if mode != "weight_only" and not computed:
            raise ArtifactError(
                f"nothing of the {component} would be computed in int8 with mode {mode}: of its"
                f" {len(found)} layers {len(kept)} are kept, and the others are not made for it",
                where=str(path),
                hint="keep less, or take another mode",
            )
        graph.save(target / GRAPH)
        note = {"scheme": self.scheme, "mode": mode}
        _note(target / "config.json", note | ({"activations": self.activations} if mode == "static" else {}))
        return {
            "component": component,
            "mode": mode,
            "layers": len(found),
            "computed": computed,
            "size_bytes": weight_bytes(target / GRAPH),
            "size_bytes_before": weight_bytes(path),
        }


def _nothing(component: str, why: str, where: str) -> ArtifactError:
    """A success with nothing done is none."""
    return ArtifactError(
        f"the {component} has no weights that could be quantized: {why}",
        where=where,
        hint="int8 is made of float32: take the model from before it was quantized, export it with"
        " `export_onnx: {dtype: fp32}`, or name other components",
    )


def _copy(source: Path, target: Path, *, without: Sequence[str]) -> None:
    """Copies a model's files, except its record and the graphs, with their weights, that are written anew.

    Args:
        without: components whose graphs are.
    """
    import shutil

    from tunekit.runtime.onnx_files import external_files

    left = {f"{component}/{GRAPH}" for component in without}
    for component in without:
        left |= {f"{component}/{name}" for name in external_files(source / component / GRAPH)}
    with output_errors(target):
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            if path.is_dir() or name == RECORD or name.startswith(f"{PICTURES}/") or name in left:
                continue
            if any(part.startswith(".") for part in name.split("/")):
                continue  # leftovers, and what other programs keep: no part of the model
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _note(config: Path, what: dict[str, str]) -> None:
    """Says in a component's config.json how it is quantized; runtimes choose their options by it."""
    content = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {**content, "quantization": what})


# Calls that the model itself makes -------------------------------------------------------------------------


class _Listening:
    """A graph that notes what it is fed; with `silent` it runs nothing."""

    def __init__(self, graph: Any, *, silent: bool = False) -> None:
        self.graph, self.silent = graph, silent
        self.inputs, self.max_rows, self.unbatched = graph.inputs, graph.max_rows, graph.unbatched
        self.feeds: list[Feeds] = []

    def run(self, given: Feeds) -> Feeds:
        import numpy as np

        self.feeds.append(given)
        if self.silent:  # a denoiser gives what has the shape of its first input
            return {"nothing": np.zeros_like(next(iter(given.values())), dtype=np.float32)}
        made: Feeds = self.graph.run(given)
        return made


@contextmanager
def _listening(module: Any, *, silent: bool = False) -> Iterator[list[Feeds]]:
    """What a graph is fed while the block runs."""
    graph = module.graph
    module.graph = listener = _Listening(graph, silent=silent)
    try:
        yield listener.feeds
    finally:
        module.graph = graph


def _denoiser_feeds(runtime: Runtime, calls: Sequence[Call]) -> list[Feeds]:
    """What the denoiser's graph is fed for these calls."""
    with _listening(runtime.family.denoiser(runtime.pipeline), silent=True) as feeds:
        for call in calls:
            runtime.denoise(*call)
    return feeds


def _feeds(
    runtime: Runtime, calls: Sequence[Call], prompts: Sequence[str], chosen: Sequence[str]
) -> dict[str, list[Feeds]]:
    """What each graph is fed, by component.

    The denoiser for these calls, the text encoders for the run's prompts, and the VAE for the call that is
    nearest to a picture.
    """
    facts, pipeline = runtime.family.facts, runtime.pipeline
    found = {facts.denoiser_name: _denoiser_feeds(runtime, calls)}
    for encoder in facts.encoders:
        if encoder.name in chosen:
            with _listening(getattr(pipeline, encoder.name)) as found[encoder.name]:
                runtime.encode_prompt(["", *prompts][:TESTED_CALLS])
    if set(VAES) & set(chosen):
        latents = min(calls, key=lambda call: float(call[1].max()))[0]
        with _listening(pipeline.vae.decoder) as found["vae_decoder"]:
            pixels = runtime.decode(latents)
        if "vae_encoder" in chosen:
            with _listening(pipeline.vae.encoder) as found["vae_encoder"]:
                runtime.encode_image(pixels * 2 - 1)
    return found


def _apart(calls: Sequence[Call], count: int) -> tuple[list[Call], list[Call]]:
    """`count` calls evenly out of all, and the others."""
    chosen = {index * len(calls) // count for index in range(min(count, len(calls)))}
    return (
        [call for index, call in enumerate(calls) if index in chosen],
        [call for index, call in enumerate(calls) if index not in chosen],
    )


def _graph_error(path: Path, reference: Path, calls: Sequence[Feeds]) -> float:
    """Relative error of the worst output of a graph, over all calls."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    outputs: list[list[list[Tensor]]] = []
    for file in (path, reference):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        answers = [session.run(None, feeds) for feeds in calls]
        outputs.append([[torch.from_numpy(a).float() for a in one] for one in zip(*answers, strict=True)])
    errors = [_error(*pair) for pair in zip(*outputs, strict=True)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _error(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    import torch

    from tunekit.diffusion.metrics import relative_error

    return relative_error(torch.cat([t.flatten() for t in made]), torch.cat([t.flatten() for t in wanted]))


def _fidelity(error: float) -> dict[str, Value]:
    return {"relative_error": error, "sqnr_db": -20 * math.log10(max(1e-9, error))}


PASS = Quantize
