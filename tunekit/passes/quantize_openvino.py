"""int8 for OpenVINO: what is computed in it, and with what ranges, nncf decides on the model's own calls.

https://docs.openvino.ai/2026/openvino-workflow/model-optimization.html; "hybrid" is what optimum-intel calls
so: weights of matrix products in int8 that compute in floats, and convolutions that compute in int8.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.artifacts import GRAPHS, Artifact, directory_size, write_json
from tunekit.config import Names, no_effect
from tunekit.errors import ArtifactError, ChainError, require
from tunekit.passes.base import DISTINCT, SAMPLING, Context, Ladder, Outcome, Pass, Start, formats
from tunekit.passes.export_openvino import components, copy_rest, save
from tunekit.passes.fidelity import GARBAGE, PROBE_STEPS, TESTED_CALLS
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric, Value
from tunekit.passes.paths import unmatched
from tunekit.passes.providers import lacks

if TYPE_CHECKING:
    import torch

    from tunekit.data.calibration import Call
    from tunekit.passes.openvino_int8 import Feeds
    from tunekit.runtime import Runtime

EXTRA = "nncf"
NO_PROMPTS = (
    "has no prompts to measure ranges on, and those of the empty one fit no other; give the run `preview:"
    " {prompts: [...]}`, or write `quantize_openvino: {method: weight_only}`"
)


class QuantizeOpenvino(Pass):
    """Computes the denoiser of an OpenVINO model in int8, or stores weights in it, with nncf.

    What is not computed in int8 is computed in what `export_openvino` noted: on a processor with bf16,
    `export_openvino: {precision: bf16}` before this one is faster than fp32, and loses far less than int8.
    """

    kind: ClassVar[str] = "quantize_openvino"
    accepts: ClassVar[frozenset[str]] = frozenset({"openvino"})
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

    method: Literal["hybrid", "ptq", "weight_only"] = "hybrid"
    """hybrid: convolutions compute in int8, matrix products have int8 weights and compute in floats. ptq:
    both compute in int8, for denoisers without convolutions too. weight_only: all compute in floats."""
    keep: Annotated[Names, DISTINCT] | None = None
    """Paths in the denoiser that do not compute in int8, such as `up_blocks.-1` (the last one); null means
    what the family knows to be sensitive."""
    components: Annotated[Names, DISTINCT] | None = Field(None, min_length=1)
    """Folders to quantize; null means the denoiser. Others get int8 weights alone: they run once per picture,
    and a text encoder loses most in int8."""
    samples: int = Field(32, ge=4, le=1_000_000)
    """Calls of the denoiser, as it draws the run's prompts, that ranges are measured on."""

    @model_validator(mode="after")
    def _effects(self) -> QuantizeOpenvino:
        if self.method == "weight_only":
            no_effect(self, ("samples", "keep"), "method is weight_only")
        return self

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """Convolutions in int8, then all."""
        if target != "openvino":
            return ()
        return [[[{cls.kind: {"method": method}}] for method in ("hybrid", "ptq")]]

    def gives(self) -> frozenset[str]:
        """Weights in few bits."""
        return frozenset({"changed", "packed"})

    def reads(self, context: Context) -> frozenset[str]:
        """What ranges and errors are measured on."""
        return frozenset({"seed", "prompts", "data", *SAMPLING})

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Says what is missing before other passes have taken their time."""
        return lacks("openvino", extra="openvino") or lacks("nncf", extra=EXTRA)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds paths and components that the model does not have."""
        if self.keep and start.modules and (wrong := unmatched(self.keep, start.modules)):
            return f"has a wrong keep: {wrong}"
        if self.method != "weight_only" and not start.examples:
            return NO_PROMPTS
        if not self.components or not start.family:
            return None
        from tunekit import families

        facts = families.planned(start.family).facts
        if formats(start.format, earlier)[0] != "openvino":
            known = [
                *(part.name for part in facts.encoders),
                facts.denoiser_name,
                "vae_encoder",
                "vae_decoder",
            ]
            if absent := [name for name in self.components if name not in known]:
                return f"finds no component {', '.join(absent)} to quantize; there are {', '.join(known)}"
        if self.method != "weight_only" and facts.denoiser_name not in self.components:
            return (
                f"has method {self.method}, which has no effect on {', '.join(self.components)}: only the"
                f" {facts.denoiser_name} is computed in int8"
            )
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Quantizes, and compares the denoiser with what it was, on calls that no range was measured on.

        Raises:
            MissingPackageError: openvino or nncf is not installed.
            ArtifactError: a component that is not there, or has nothing to quantize; garbage.
            ChainError: `keep` names what is not there.
            ModelError: a file is missing or damaged.
            NonFiniteError: the model gives values that are not finite while ranges are measured.
        """
        require("openvino", extra="openvino", why="quantize_openvino needs")
        require("nncf", extra=EXTRA, why="quantize_openvino needs")
        from tunekit import families
        from tunekit.passes import openvino_int8

        family, folder = families.get(context.family), Path(artifact.source)
        name = family.facts.denoiser_name
        there = components(folder)
        chosen = self.components or [name]
        if absent := sorted(set(chosen) - set(there)):
            raise ArtifactError(
                f"there is no component {', '.join(absent)} to quantize",
                where=artifact.source,
                hint=f"there are {', '.join(there)}",
            )
        keep = list(family.facts.denoiser.sensitive) if self.keep is None else self.keep
        tested, seen = self._calls(artifact, context)
        graphs = {component: folder / component / GRAPHS["openvino"] for component in chosen}
        copy_rest(
            folder,
            context.folder,
            without={path for graph in graphs.values() for path in (graph, graph.with_suffix(".bin"))},
        )
        table: list[dict[str, Any]] = []
        for component, graph in graphs.items():
            context.say(component)
            model = openvino_int8.Model(graph)
            if component == name and self.keep and (wrong := unmatched(self.keep, model.modules(name))):
                raise ChainError(f"quantize_openvino has a wrong keep: {wrong}", where=artifact.source)
            method = self.method if component == name else "weight_only"
            model.quantize(method, keep=keep, module=component, calls=seen if component == name else ())
            note = {"scheme": "int8", "mode": method}
            if not model.stored():
                raise ArtifactError(
                    f"the {component} has no weights that could be quantized",
                    where=str(graph.parent),
                    hint="name other components, or keep less",
                )
            target = context.folder / component
            save(model.graph, target, halved=False)  # what is in 16 bits stays so
            config = target / "config.json"
            content = json.loads(config.read_text(encoding="utf-8"))
            write_json(config, content | {"quantization": note})
            table.append(
                {
                    "component": component,
                    "method": method,
                    "layers": model.stored(),
                    "computed": model.computed(),
                    "size_bytes": directory_size(target),
                    "size_bytes_before": directory_size(graph.parent),
                }
            )
            del model
        error = self._error(artifact, context, tested)
        if not error < GARBAGE:
            raise ArtifactError(
                f"the quantized {name} runs in OpenVINO and gives garbage there: its results are off by"
                f" {error:.2g} of their size",
                where=artifact.source,
                hint="measure on more calls (samples), keep more in floats (keep), or take weight_only",
            )
        metrics: dict[str, Value] = {
            "quantized_layers": sum(row["layers"] for row in table),
            "int8_computed_layers": sum(row["computed"] for row in table),
            "relative_error": error,
            "sqnr_db": -20 * math.log10(max(1e-9, error)),
        }
        return Outcome(metrics=metrics, details={"components": table, "kept": keep})

    def _calls(self, artifact: Artifact, context: Context) -> tuple[list[Call], list[Feeds]]:
        """Calls to be tested on, and what the denoiser's graph is fed in others."""
        with dataclasses.replace(context, device="cpu").running(artifact) as runtime:
            if self.method == "weight_only":
                return context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS), []
            calls = context.calls(runtime, count=self.samples + TESTED_CALLS)
            apart = {index * len(calls) // TESTED_CALLS for index in range(TESTED_CALLS)}
            tested = [call for index, call in enumerate(calls) if index in apart]
            rest = [call for index, call in enumerate(calls) if index not in apart]
            return tested, fed(runtime, rest)

    def _error(self, artifact: Artifact, context: Context, calls: Sequence[Call]) -> float:
        """Relative error of the denoiser over all calls."""
        import torch

        from tunekit.diffusion.metrics import relative_error

        made = dataclasses.replace(
            artifact, path=None, model_path=context.folder, source=str(context.folder), recorded_hash=None
        )

        def answers(model: Artifact) -> torch.Tensor:
            with dataclasses.replace(context, device="cpu").running(model) as runtime:
                return torch.cat([runtime.denoise(*call).flatten() for call in calls])

        return relative_error(answers(made), answers(artifact))


class _Noting:
    """Stands in for a graph: notes what it is fed, and runs nothing."""

    def __init__(self, graph: Any) -> None:
        self.inputs, self.max_rows, self.unbatched = graph.inputs, graph.max_rows, graph.unbatched
        self.feeds: list[Feeds] = []

    def run(self, given: Feeds) -> Feeds:
        import numpy as np

        self.feeds.append({name: array.copy() for name, array in given.items()})
        # A denoiser gives what has the shape of its first input.
        return {"nothing": np.zeros_like(next(iter(given.values())), dtype=np.float32)}


def fed(runtime: Runtime, calls: Sequence[Call]) -> list[Feeds]:
    """What the denoiser's graph is fed for these calls, by the names of its inputs.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    import numpy as np

    from tunekit.errors import NonFiniteError

    module: Any = runtime.family.denoiser(runtime.pipeline)
    graph = module.graph
    module.graph = noting = _Noting(graph)
    try:
        for call in calls:
            runtime.denoise(*call)
    finally:
        module.graph = graph
    for feeds in noting.feeds:
        for name, array in feeds.items():
            if not np.isfinite(array).all():
                raise NonFiniteError(f"{name} of the denoiser holds values that are not finite")
    return noting.feeds


PASS = QuantizeOpenvino
