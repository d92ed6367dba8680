"""How `quantize` makes an ONNX model: what is measured on which calls, and what stays in floats."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunekit.artifacts import PICTURES, RECORD, write_json
from tunekit.errors import ArtifactError, output_errors
from tunekit.passes.base import Context, Outcome
from tunekit.passes.fidelity import GARBAGE, PROBE_STEPS, TESTED_CALLS, VAES, error, fidelity, nothing
from tunekit.passes.onnx_int8 import (
    FLAVOURS,
    Array,
    Feeds,
    Flavour,
    Graph,
    Layer,
    Range,
    beyond,
    measure_ranges,
)
from tunekit.passes.onnx_probe import Cost, Probe, by_worth, measure_costs, sparing
from tunekit.passes.paths import under
from tunekit.passes.providers import everywhere, gpu_answers
from tunekit.runtime.onnx_files import external_files, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.artifacts import Artifact
    from tunekit.config import SamplingConfig
    from tunekit.data.calibration import Call
    from tunekit.families.family import Family
    from tunekit.passes.quantize import Quantize
    from tunekit.runtime import Runtime

GRAPH = "model.onnx"
SENSITIVITY = "sensitivity.json"
"""Beside the graph: what each layer costs."""
LOOKED_AT = 6
"""Steps of the picture that single layers are measured on."""
SPARED = 0.1
"""Share of the multiplications that stays in floats by itself. Of builtin/emoji-64's layers four hold nine
tenths of the error and a fiftieth of the work; what they leave of a tenth costs 4 % of the speed that a
twentieth has."""
LEAST = 0.002
"""Share of the squared error below which a layer is not worth it."""
PICTURES_DRAWN, MOST_STEPS = 4, 20
"""For `keep: {psnr: ...}`: as many as `verify` draws where nothing else is said, and with the same seeds."""
CONVOLUTIONAL = 0.1
"""Share of the weights that are in convolutions from which mode static is taken where none is asked for."""
MOST_HALVED = 2_000_000_000
"""Bytes of weights up to which a component that is not named is written anew: it is in memory then."""
HELD_OUT = 4
"""Calls, from the first step to the last, that ranges are held against: of other prompts and other noise."""
STRAYS = 0.25
"""Share of the ranges from which, where they do not hold for them, the model is refused."""
NOTED = 0.05
"""Share from which it is said. Of builtin/emoji-64 in its style, 0 to 1 % where ranges were measured on the
style's prompts, 2 to 3 % on the base's, and 8 % on prompts without sense."""


def quantize_graphs(
    how: Quantize,
    mode: Literal["weight_only", "dynamic", "static"],
    artifact: Artifact,
    context: Context,
    family: Family,
) -> Outcome:
    """Writes the model into `context.folder`, its chosen components quantized.

    Raises:
        ArtifactError: see `Quantize.run`.
    """
    folder, name = Path(artifact.source), family.facts.denoiser_name
    there = sorted(path.parent.name for path in folder.glob(f"*/{GRAPH}"))
    chosen = how.components or [name]
    if missing := sorted(set(chosen) - set(there)):
        raise ArtifactError(
            f"there is no component {', '.join(missing)} to quantize",
            where=artifact.source,
            hint=f"there are {', '.join(there)}",
        )
    for component in chosen:  # one after the other: a graph holds its weights
        graph = Graph(folder / component / GRAPH)
        if not graph.layers():
            raise nothing(component, graph.types(), str(folder / component))
        if component == name:
            how.check_keep(graph.modules(name), artifact.source)
            if mode == "static" and how.is_open and graph.convolutional() < CONVOLUTIONAL:
                mode = "dynamic"
                context.say(f"mode dynamic: the {name} has hardly a convolution")
    del graph
    others = [] if how.components else [other for other in there if other not in chosen]
    halved = [other for other in others if weight_bytes(folder / other / GRAPH) <= MOST_HALVED]
    _copy(folder, context.folder, without=[*chosen, *halved])
    static = mode == "static" and name in chosen
    with _floats(artifact, context) as runtime:
        if static:
            calls = context.calls(runtime, count=how.samples + TESTED_CALLS)
            unlike = context.calls(runtime, count=HELD_OUT, steps=PROBE_STEPS, others=True)
        else:
            calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
        tested, seen = _apart(calls, TESTED_CALLS)
        feeds = _feeds(runtime, tested, context.prompts, chosen)
        measured = _denoiser_feeds(runtime, seen) if static else []
        held_out = _denoiser_feeds(runtime, unlike) if static else []
    if unseen := _unseen(how.target):
        context.say(unseen)
    table: list[dict[str, Any]] = []
    details: dict[str, Any] = {"unseen": unseen} if unseen else {}
    metrics: dict[str, float] = {}
    for component in chosen:
        context.say(component)
        work = _Component(how, folder / component / GRAPH, context)
        if component != name:
            row = work.store()
        elif mode == "weight_only":
            row = work.store(how.sensitive(family))
        elif mode == "dynamic":
            row = work.dynamic(how.sensitive(family))
        else:
            row, found = work.static(how.sensitive(family), measured, held_out, artifact, family)
            details |= found
        errors = _errors(work.target / GRAPH, folder / component / GRAPH, feeds[component], how.target)
        _refuse_garbage(errors, component, how.target, artifact.source)
        metrics[f"relative_error_{component}"] = max(errors.values())
        table.append({**row, "relative_error": max(errors.values()), **_by_runtime(errors)})
    table += [_Component(how, folder / other / GRAPH, context).halve() for other in halved]
    shown = metrics.get(f"relative_error_{name}", max(metrics.values()))
    return Outcome(
        metrics={
            "quantized_layers": sum(row["layers"] for row in table),
            "int8_computed_layers": sum(row["computed"] for row in table),
            **fidelity(shown),
            **metrics,
        },
        details={"components": table, **details},
    )


@contextmanager
def _floats(artifact: Artifact, context: Context) -> Iterator[Runtime]:
    """The model as it comes in, on the processor and in floats, whatever is to run the result."""
    with dataclasses.replace(context, device="cpu").running(artifact, provider="cpu") as runtime:
        yield runtime


@dataclasses.dataclass
class _Component:
    """A graph on its way into the new folder.

    Attributes:
        path: of the float graph.
    """

    how: Quantize
    path: Path
    context: Context

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def target(self) -> Path:
        return self.context.folder / self.name

    @property
    def flavour(self) -> Flavour:
        return FLAVOURS["tensorrt" if self.how.activations == "int8" else self.how.target]

    @property
    def bits(self) -> int:
        return 7 if self.how.reduce_range else 8

    def store(self, keep: Sequence[str] = ()) -> dict[str, Any]:
        """Weights in int8, or those of matrix products in int4, computed with as floats."""
        graph = Graph(self.path)
        found = graph.layers()
        kept = self._named(found, keep)
        graph.halve(kept)
        rest = [layer for layer in found if layer not in kept]
        four = [layer for layer in rest if self.how.scheme == "int4" and layer.node.op_type == "MatMul"]
        graph.store([layer for layer in rest if layer not in four])
        if self.how.scheme == "int4" and not (four and graph.store_four(four, group=self.how.group)):
            raise ArtifactError(
                f"the {self.name} has no matrix products that could be stored in 4 bits",
                where=str(self.path),
                hint="take scheme int8, or keep less",
            )
        return self._save(graph, "weight_only", len(found), 0)

    def halve(self) -> dict[str, Any]:
        """Weights in float16, computed with as floats."""
        graph = Graph(self.path)
        graph.halve(graph.layers())
        return self._save(graph, "fp16", 0, 0)

    def dynamic(self, keep: Sequence[str]) -> dict[str, Any]:
        """Matrix products in int8."""
        graph = Graph(self.path)
        found = graph.layers()
        kept = self._named(found, keep)
        graph.halve(kept)
        computed = graph.compute_dynamic([layer for layer in found if layer not in kept], bits=self.bits)
        self._check(computed, found, kept, "dynamic")
        return self._save(graph, "dynamic", len(found), computed)

    def static(
        self,
        keep: Sequence[str],
        calls: Sequence[Feeds],
        held_out: Sequence[Feeds],
        artifact: Artifact,
        family: Family,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Convolutions and matrix products in int8, but for what costs most; a row, and what was found.

        Args:
            keep: modules that stay in floats whatever they cost.
            calls: what ranges are measured on.
            held_out: calls of other prompts and other noise, which the ranges have to hold for.
        """
        graph = Graph(self.path)
        found = graph.layers()
        named = self._named(found, keep)
        candidates = graph.computable([layer for layer in found if layer not in named], self.flavour)
        self._check(len(candidates), found, named, "static")
        ranges = measure_ranges(
            self.path, candidates, calls, signed=self.flavour.signed, method=self.how.ranges
        )
        noted = None
        if self.how.ranges == "minmax":  # the others leave values out on purpose
            others = measure_ranges(self.path, candidates, held_out, signed=False)
            noted = self._hold(ranges, others, len(calls))
        weights = [layer.weight for layer in candidates]
        del graph, found, named, candidates
        costs = self._costs(weights, ranges, calls[0], artifact, family)

        def write(spared: Sequence[Cost]) -> int:
            graph = Graph(self.path)
            out = {weights[number] for cost in spared for number in cost.layers}
            found = graph.layers()
            kept = [*self._named(found, keep), *(layer for layer in found if layer.weight in out)]
            graph.halve(kept)
            rest = [layer for layer in found if layer not in kept]
            computed = graph.compute_static(rest, ranges, self.flavour, bits=self.bits)
            self._check(computed, found, kept, "static")
            row.update(self._save(graph, "static", len(found), computed))
            return computed

        row: dict[str, Any] = {}
        details: dict[str, Any] = {"kept": list(keep), **({"note": noted} if noted else {})}
        psnr = self.how.wanted_psnr
        if psnr is None:
            spared = sparing(costs, share=self.how.spared_share or SPARED, least=LEAST)
            write(spared)
        else:
            spared, details["pictures"] = self._until(psnr, costs, write, artifact, family)
        if costs:
            details |= self._say_costs(costs, spared)
        return row, details

    def _hold(self, ranges: Mapping[str, Range], others: Mapping[str, Range], calls: int) -> str | None:
        """What is to be said where values of other calls leave the ranges: too few calls, or other prompts.

        Raises:
            ArtifactError: many do.
        """
        strays = beyond(ranges, others)
        if len(strays) < NOTED * len(others):
            return None
        found = (
            f"ranges measured on {calls} calls of the {self.name} do not hold for others that it is called"
            f" with: {len(strays)} of {len(others)} are left by more than a quarter of their width"
        )
        hint = (
            "measure on more calls (samples), and on prompts like those that it is to draw (preview.prompts)"
        )
        if len(strays) > STRAYS * len(others):
            raise ArtifactError(found, where=str(self.path), hint=hint)
        self.context.say(f"{found}; {hint}")
        return f"{found}; {hint}"

    def _costs(
        self,
        weights: Sequence[str],
        ranges: Mapping[str, Range],
        call: Feeds,
        artifact: Artifact,
        family: Family,
    ) -> list[Cost]:
        """How far the latents of a picture end up from where they should, by layer that is rounded.

        The whole way counts: a small error in the first steps is a large one in the picture, and guidance
        multiplies errors that are not the same with the prompt and without it.
        """
        if isinstance(self.how.keep, list):
            return []
        self.context.say(f"what each of {len(weights)} layers costs")
        with _floats(artifact, self.context) as runtime:
            module: Any = family.denoiser(runtime.pipeline)
            graph, module.graph = module.graph, None
            switched = _Switched(graph.inputs, graph.max_rows, graph.unbatched)
            del graph  # its weights need not be there twice
            switched.probe = probe = Probe(self.path, weights, ranges, self.flavour, bits=self.bits)
            module.graph = switched
            sampling = self._sampling(runtime, LOOKED_AT)
            prompts, seeds = [*self.context.prompts[:1]] or [""], [self.context.seed]
            told, guided = runtime.conditioning(prompts, sampling), runtime.guided(1, sampling)
            shape = runtime.latent_shape(*runtime.size(sampling))

            def latents(rounded: Sequence[int]) -> Array:
                from tunekit.diffusion.sampling import initial_latents, sample

                switched.rounded = rounded
                made = sample(
                    runtime.denoise,
                    runtime.scheduler,
                    initial_latents(seeds, shape),
                    told,
                    guided,
                    sampling,
                    begin=family.begin,
                    seeds=seeds,
                )
                found: Array = made.float().numpy()
                return found

            seconds = 60 * self.how.minutes
            return measure_costs(probe.layers, probe.work(call), latents, seconds=seconds)

    def _until(
        self,
        psnr: float,
        costs: Sequence[Cost],
        write: Callable[[Sequence[Cost]], int],
        artifact: Artifact,
        family: Family,
    ) -> tuple[list[Cost], list[dict[str, Any]]]:
        """Spares as few layers as it takes for the worst picture to keep `psnr` dB; what, and the tries."""
        order = by_worth(costs)
        tries: dict[int, float] = {}
        with _floats(artifact, self.context) as runtime:
            module: Any = family.denoiser(runtime.pipeline)
            wanted = self._draw(runtime)

            def drawn(count: int) -> float:
                from tunekit.diffusion.metrics import psnr_db
                from tunekit.runtime.onnx import OrtGraph

                write(order[:count])
                exact, module.graph = module.graph, OrtGraph(self.target / GRAPH, [CPU], None)
                try:
                    made = self._draw(runtime)
                finally:
                    module.graph = exact
                tries[count] = min(psnr_db(one, other) for one, other in zip(made, wanted, strict=True))
                self.context.say(f"{count} layers in floats: PSNR {tries[count]:.1f} dB")
                return tries[count]

            low, high = -1, 0  # `low` is not enough, `high` is to be tried
            while drawn(high) < psnr:
                if high == len(order) - 1:
                    best = max(tries, key=lambda count: tries[count])
                    raise ArtifactError(
                        f"keep: {{psnr: {psnr:g}}} cannot be met: with {best} of {len(order)} layers in"
                        f" floats the worst picture has {tries[best]:.1f} dB, {psnr - tries[best]:.1f} less",
                        where=str(self.path),
                        hint="ask for less, or take mode weight_only",
                    )
                low, high = high, min(len(order) - 1, max(1, 2 * high))
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if drawn(middle) >= psnr else (middle, high)
            if list(tries)[-1] != high:
                write(order[:high])
        return order[:high], [{"layers": count, "psnr_db": tries[count]} for count in sorted(tries)]

    def _draw(self, runtime: Runtime) -> torch.Tensor:
        from tunekit.runtime import generate_pixels

        sampling = self._sampling(runtime, MOST_STEPS)
        prompts = list(islice(cycle(self.context.prompts or ("",)), PICTURES_DRAWN))
        seeds = [self.context.seed + index for index in range(PICTURES_DRAWN)]
        return generate_pixels(runtime, prompts, sampling, seeds=seeds)

    def _sampling(self, runtime: Runtime, most: int) -> SamplingConfig:
        """How the model draws, in at most so many steps."""
        artifact = runtime.artifact
        assert artifact is not None
        sampling = self.context.sampling_of(artifact).over(runtime.sampling)
        return sampling.model_copy(update={"steps": min(sampling.steps or most, most)})

    def _say_costs(self, costs: Sequence[Cost], spared: Sequence[Cost]) -> dict[str, Any]:
        """Writes what layers cost beside the graph; the same for the report."""
        paths = {cost.path for cost in spared}
        rows: list[dict[str, Any]] = [
            {
                "layer": cost.path.removeprefix(f"{self.name}."),
                "layer_error": cost.error,
                "work": cost.share,
                "computed_in": "float" if cost.path in paths else "int8",
            }
            for cost in costs
        ]
        write_json(self.target / SENSITIVITY, {"version": 1, "layers": rows})
        names = ", ".join(row["layer"] for row in rows if row["computed_in"] == "float") or "none"
        work = sum(cost.share for cost in spared)
        self.context.say(f"in floats, with {work:.1%} of the work: {names}")
        return {"sensitivity": rows}

    def _named(self, layers: Sequence[Layer], keep: Sequence[str]) -> list[Layer]:
        paths = [layer.path.removeprefix(f"{self.name}.") for layer in layers]
        return [layer for layer, own in zip(layers, paths, strict=True) if under(own, keep, paths)]

    def _check(self, computed: int, found: Sequence[Layer], kept: Sequence[Layer], mode: str) -> None:
        if not computed:
            raise ArtifactError(
                f"nothing of the {self.name} would be computed in int8 with mode {mode}: of its"
                f" {len(found)} layers {len(kept)} are kept, and the others are not made for it",
                where=str(self.path),
                hint="keep less, or take another mode",
            )

    def _save(self, graph: Graph, mode: str, layers: int, computed: int) -> dict[str, Any]:
        graph.save(self.target / GRAPH)
        noted = {"scheme": self.how.scheme, "mode": mode}
        if mode == "static":
            noted |= {"activations": "int8" if self.flavour.signed else "uint8", "target": self.how.target}
        if mode != "fp16":  # runtimes choose their options by it
            config = self.target / "config.json"
            write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "quantization": noted})
        return {
            "component": self.name,
            "mode": mode,
            "layers": layers,
            "computed": computed,
            "size_bytes": weight_bytes(self.target / GRAPH),
            "size_bytes_before": weight_bytes(self.path),
        }


def _copy(source: Path, target: Path, *, without: Sequence[str]) -> None:
    """Copies a model's files, except its record and the graphs, with their weights, that are written anew.

    Args:
        without: components whose graphs are.
    """
    import shutil

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


# Calls that the model itself makes -------------------------------------------------------------------------


@dataclasses.dataclass
class _Switched:
    """A probe in a graph's place."""

    inputs: dict[str, Any]
    max_rows: int | None
    unbatched: frozenset[str]
    probe: Probe | None = None
    rounded: Sequence[int] = ()

    def run(self, given: Feeds) -> Feeds:
        assert self.probe is not None
        return dict(zip(self.probe.outputs, self.probe.run(self.rounded, given), strict=True))


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


# What came of it -------------------------------------------------------------------------------------------

CPU: tuple[str, dict[str, Any]] = ("CPUExecutionProvider", {})


def _errors(made: Path, exact: Path, calls: Sequence[Feeds], target: str) -> dict[str, float]:
    """Relative error of a graph's worst output over all calls, by runtime that is here and that it is for."""
    from tunekit.runtime.onnx import OrtGraph

    wanted = _answers(OrtGraph(exact, [CPU], None), calls)
    return {
        name: max(
            (error(*pair) for pair in zip(_answers(opened(made), calls), wanted, strict=True)),
            key=lambda value: math.inf if math.isnan(value) else value,
        )
        for name, opened in _runtimes(target).items()
    }


def _runtimes(target: str) -> dict[str, Callable[[Path], Any]]:
    """What opens a graph's file, by name: ONNX Runtime on the processor reads every file."""
    import torch

    from tunekit.runtime.onnx import ORT_PROVIDERS, OrtGraph, ort_providers

    def by_onnxruntime(provider: str) -> Callable[[Path], Any]:
        return lambda path: OrtGraph(path, [(ORT_PROVIDERS[provider], {}), CPU], None)

    def by_openvino(path: Path) -> Any:
        from tunekit.runtime.openvino import OpenVinoGraph

        return OpenVinoGraph(path, "CPU", torch.float32, None)

    found: dict[str, Callable[[Path], Any]] = {"onnxruntime": lambda path: OrtGraph(path, [CPU], None)}
    if target in ("cpu", "openvino") and "openvino" in everywhere():
        found["openvino"] = by_openvino
    provider = "cuda" if target == "cuda" else "tensorrt" if target == "tensorrt" else None
    if provider and ORT_PROVIDERS[provider] in ort_providers() and gpu_answers():
        found[provider] = by_onnxruntime(provider)
    return found


def _unseen(target: str) -> str | None:
    """A line where what the file is for is not here, so that nobody has seen it answer."""
    if target == "cpu" or target in _runtimes(target):
        return None
    name = {"openvino": "OpenVINO", "cuda": "onnxruntime with a card of NVIDIA", "tensorrt": "TensorRT"}[
        target
    ]
    return f"made for target {target}, and compared in onnxruntime on the processor alone: {name} is not here"


def _answers(graph: Any, calls: Sequence[Feeds]) -> list[list[Tensor]]:
    """What a graph gives: for each output, a tensor per call."""
    import torch

    made = [list(graph.run(feeds).values()) for feeds in calls]
    return [[torch.from_numpy(value).float() for value in one] for one in zip(*made, strict=True)]


def _refuse_garbage(errors: dict[str, float], component: str, target: str, where: str) -> None:
    """Raises where a runtime reads the file and computes something else than it should."""
    for name, found in errors.items():
        if not found < GARBAGE:
            others = ", ".join(f"{value:.2g} in {other}" for other, value in errors.items() if other != name)
            raise ArtifactError(
                f"the quantized {component} runs in {name} and gives garbage there: its results are off by"
                f" {found:.2g} of their size" + (f" ({others})" if others else ""),
                where=where,
                hint=f"quantize it for what it is to run in (target, now {target}), with more samples, or"
                " with mode weight_only",
            )


def _by_runtime(errors: dict[str, float]) -> dict[str, float]:
    return {f"relative_error_{name}": value for name, value in errors.items()} if len(errors) > 1 else {}
