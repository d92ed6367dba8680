"""Torch to ONNX: one graph per component, in the layout that onnxruntime's users expect.

The folder holds `{text_encoder, <denoiser>, vae_encoder, vae_decoder}/model.onnx`, each with its
`config.json`, the scheduler, the tokenizer and one `model_index.json` that serves all who read such folders:

- tunekit: `tunekit generate FOLDER`;
- Optimum: `ORTDiffusionPipeline.from_pretrained(FOLDER)`;
- diffusers before 0.43: `OnnxStableDiffusionPipeline.from_pretrained(FOLDER)`. It takes 8 pixels per latent
  and the VAE scale 0.18215 for granted, as SD 1.x has them.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.artifacts import directory_size, write_json
from tunekit.config import Names, no_effect
from tunekit.config.adapter import Preset
from tunekit.errors import ChainError, ModelError, output_errors, require
from tunekit.passes.base import DISTINCT, Context, Outcome, Pass, Start
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.paths import unmatched
from tunekit.passes.providers import lacks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.artifacts import Artifact
    from tunekit.families import ExportComponent, Family
    from tunekit.families.family import Dtypes, FamilyFacts, Pipeline

GRAPH = "model.onnx"
WEIGHTS = "model.onnx_data"
NEEDS = "ONNX export needs"
PROTOBUF_LIMIT = 2_000_000_000
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 3e-2}


class ExportOnnx(Pass):
    """Writes every component as an ONNX graph with dynamic batch, height and width."""

    kind: ClassVar[str] = "export_onnx"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    produces: ClassVar[str | None] = "onnx"
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, whose packed weights it would unpack; put {giver} behind it"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (SIZE, RELATIVE_ERROR, Metric("nodes", "nodes", "count"))

    dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of weights and activations. Components that overflow in fp16 stay fp32; the family knows them."""
    keep: Annotated[Names, DISTINCT] | None = None
    """Of fp16: blocks of the denoiser that stay in float32, weights and all that is computed in them, such as
    `up_blocks.-1` (the last one) or `*.attn2` (each); other components by name, such as `vae`, as a whole.
    null: what the family knows to be sensitive, such as its first and last layer and the time embedding."""
    opset: int = Field(20, ge=18, le=23)
    """ONNX operator set. 20 was fastest on the CPU; of 23's Attention, TensorRT-RTX refuses small heads."""
    external_data_threshold: int = Field(PROTOBUF_LIMIT, ge=0, le=PROTOBUF_LIMIT)
    """Bytes of weights above which they go into `model.onnx_data`: one ONNX file cannot hold 2 GiB."""

    adapters: Literal["swappable"] | None = None
    """swappable: adapters can be put on the denoiser afterwards, without another export, also after
    `quantize`: `tunekit generate FOLDER --adapter A`. Their weights are inputs of the graph, and each layer
    that they are for computes a little more. Export the base for it: what is merged stays."""
    adapter_targets: Names | Preset | None = None
    """Layers that such adapters may change, as `adapter.targets`; null means the family's own choice."""

    @model_validator(mode="after")
    def _effects(self) -> ExportOnnx:
        if self.adapters is None:
            no_effect(self, ("adapter_targets",), "adapters is not swappable")
        if self.dtype == "fp32":
            no_effect(self, ("keep",), "dtype is fp32")
        return self

    def gives(self) -> frozenset[str]:
        """What the graphs compute in, and whether they take adapters."""
        computed = {self.dtype} if self.keep == [] else {self.dtype, "fp32"}
        return frozenset(computed | {"swappable"} if self.adapters else computed)

    def reads(self, context: Context) -> frozenset[str]:
        """Nothing else."""
        return frozenset()

    def formerly(self, format: str) -> dict[str, Any] | None:
        """There were no adapters, and all of a network was in fp16."""
        settings = super().formerly(format)
        if self.adapters or settings is None or (self.dtype == "fp16" and self.keep != []):
            return None
        del settings["adapters"], settings["adapter_targets"], settings["keep"]
        return settings

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Says what is missing before other passes have taken their time."""
        return lacks("onnx", "onnxscript", "onnxruntime", extra="onnx")

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds blocks to keep that the model does not have."""
        if not (self.keep and start.modules and start.family):
            return None
        from tunekit import families

        wrong = self._unknown(families.planned(start.family).facts, start.modules)
        return f"has a wrong keep: {wrong}" if wrong else None

    def kept(self, facts: FamilyFacts) -> list[str]:
        """Blocks and components that stay in float32."""
        if self.dtype == "fp32":
            return []
        return list(facts.denoiser.sensitive if self.keep is None else self.keep)

    def _unknown(self, facts: FamilyFacts, modules: Collection[str]) -> str | None:
        """What to say of the first that is neither a block nor a component."""
        others = {part.name for part in facts.networks} - {facts.denoiser_name}
        return unmatched([path for path in self.keep or () if path not in others], modules)

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Exports, then runs each graph once beside its torch module, at another batch size and resolution.

        Graphs in fp16 also draw a small picture: what overflows, overflows on what a model really computes.

        Raises:
            MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
            ModelError: packed weights, or a component that cannot be exported.
            ChainError: `keep` names what is not there.
        """
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, extra="onnx", why=NEEDS)

        from tunekit import families

        family = families.get(context.family)
        shapes = context.open_networks(artifact)  # of a large model, without weights
        _refuse_packed(family.denoiser(shapes), artifact.source)
        modules = [path for path, _ in family.denoiser(shapes).named_modules() if path]
        if wrong := self._unknown(family.facts, modules):
            raise ChainError(f"export_onnx has a wrong keep: {wrong}", where=artifact.source)
        exported = family.export_components(shapes)
        branches = {family.facts.denoiser_name: self._branches(family, shapes)}
        names = [(component.name, component.component) for component in exported]
        write_rest(family, shapes, [name for name, _ in names], context.folder)
        del exported, shapes

        table: list[dict[str, Any]] = []
        failures = []
        for name, network in names:
            context.say(name)
            row = self._write(name, network, artifact, context, branches.get(name) or [])
            table.append(row)
            if _nan_is_worst(row["relative_error"]) > MAX_RELATIVE_ERROR[row["dtype"]]:
                failures.append(
                    f"{name} in onnxruntime differs from torch by {row['relative_error']:.2g} of its size;"
                    f" {row['dtype']} should stay below {MAX_RELATIVE_ERROR[row['dtype']]:g}"
                )
        if self.dtype == "fp16" and not failures and (trouble := _overflow(family, context.folder)):
            failures.append(trouble)
        error = max((row["relative_error"] for row in table), key=_nan_is_worst)
        return Outcome(
            metrics={
                "relative_error": error,
                "nodes": sum(row["nodes"] for row in table),
                **{f"relative_error_{row['component']}": row["relative_error"] for row in table},
            },
            details={"components": table},
            failure="; ".join(failures) or None,
        )

    def _write(
        self, name: str, network: str, artifact: Artifact, context: Context, branches: Sequence[str]
    ) -> dict[str, Any]:
        """Writes one graph and compares it; of a large model nothing else is in memory meanwhile.

        Args:
            network: that it is a part of.
        """
        import torch

        from tunekit import families
        from tunekit.passes.half import exact_weights, keep_whole

        family = families.get(context.family)
        facts, keep = family.facts, self.kept(family.facts)
        whole = self.dtype == "fp32" or network in (*facts.overflowing, *keep)

        def opened(dtypes: Dtypes | None = None) -> tuple[Pipeline, ExportComponent]:
            pipeline = context.open_networks(artifact, network, dtypes=dtypes)
            return pipeline, next(one for one in family.export_components(pipeline) if one.name == name)

        folder = context.folder / name
        pipeline, component = opened()
        inputs, kept = check_inputs(component), list[str]()
        with torch.no_grad():
            expected = as_tuple(component.module(*inputs.values()))
        if not whole:
            within = keep if network == facts.denoiser_name else []
            weights = exact_weights(family.denoiser(pipeline), within)
            del component, pipeline
            # The family gives example inputs in the type of what they are for.
            pipeline, component = opened(facts.drawing_dtypes(torch.float16))
            kept = keep_whole(family.denoiser(pipeline), weights, within)
            if kept:  # a family may export modules of its own, made of what the network is by now
                again = next(one for one in family.export_components(pipeline) if one.name == name)
                component = dataclasses.replace(again, inputs=component.inputs)
            del weights
        nodes = export_component(
            component,
            folder,
            opset=self.opset,
            external_data_threshold=self.external_data_threshold,
            branches=branches,
        )
        write_json(folder / "config.json", graph_config(component, folder / GRAPH, branches=branches))
        del component, pipeline  # before its graph comes
        gc.collect()
        return {
            "component": name,
            "dtype": "fp32" if whole else self.dtype,
            **({"kept": kept} if kept else {}),
            "nodes": nodes,
            "size_bytes": directory_size(folder),
            "relative_error": graph_error(folder / GRAPH, inputs, expected),
        }

    def _branches(self, family: Family, pipeline: Any) -> list[str]:
        """Modules of the denoiser that adapters may change."""
        if self.adapters is None:
            return []
        from tunekit.adapters.attach import adaptable
        from tunekit.config import AdapterConfig

        config = AdapterConfig(targets=self.adapter_targets)
        facts = family.facts
        return adaptable(family.denoiser(pipeline), config, facts.lora_targets, facts.presets)


def export_component(
    component: ExportComponent,
    folder: Path,
    *,
    opset: int = 20,
    external_data_threshold: int = PROTOBUF_LIMIT,
    branches: Collection[str] = (),
) -> int:
    """Writes one graph to `folder/model.onnx` and returns its number of nodes.

    Args:
        branches: modules that adapters may change; see `passes.onnx_adapters`.

    Raises:
        ModelError: the exporter refuses it.
        OutputError: disk full, no permission.
    """
    import onnx_ir

    from tunekit.passes.onnx_graph import graph_of

    component.module.eval()
    model = graph_of(component, opset)
    if branches:
        from tunekit.passes.onnx_adapters import add_branches

        add_branches(model, component.name, branches)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = WEIGHTS if weights > external_data_threshold else None
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        onnx_ir.save(model, folder / GRAPH, external_data=external)
    return len(model.graph)


def graph_config(
    component: ExportComponent, graph: Path | None = None, *, branches: Collection[str] = ()
) -> dict[str, Any]:
    """What stands beside the graph: the model's configuration, and which inputs are the same for all rows.

    Args:
        graph: its file, of one that has branches for adapters.
        branches: see `export_component`.
    """
    from tunekit.runtime.graph import UNBATCHED

    same = [
        name
        for name, example in component.inputs.items()
        # One row, as of the timestep, stands for all of them: it is no table of rows.
        if component.dynamic.get(name, {}).get(0) != "batch" and example.shape[:1] != (1,)
    ]
    own = {**component.config, UNBATCHED: same} if same else component.config
    if not (branches and graph):
        return own
    from tunekit.passes.onnx_adapters import without_branch
    from tunekit.runtime.swap import KEY

    return {**own, KEY: {"without_effect": without_branch(graph, component.name, branches)}}


def _overflow(family: Family, folder: Path) -> str | None:
    """What to say if the graphs in a folder draw NaN or infinity; None if they do not."""
    from tunekit.artifacts import Artifact
    from tunekit.config import SamplingConfig
    from tunekit.errors import NonFiniteError
    from tunekit.runtime import generate, open_runtime

    made = Artifact(None, folder, "onnx", family.name, str(folder))
    runtime = open_runtime(made, device="cpu", provider="cpu")
    try:
        multiple = family.resolution_multiple(runtime.pipeline)
        height, width = (max(multiple, side // 2 // multiple * multiple) for side in runtime.default_size)
        few = SamplingConfig(steps=4, height=height, width=width)
        generate(runtime, ["a red apple"], few, seeds=[0])
    except NonFiniteError as error:
        return f"{error.message}; export_onnx: {{dtype: fp32}} has the range for it"
    finally:
        runtime.close()
    return None


def _refuse_packed(denoiser: nn.Module, source: str) -> None:
    from tunekit import layers

    if (layers.describe(denoiser) or {}).get("quantized"):
        raise ModelError(
            "its weights are packed to few bits; in ONNX they would be floats again, as large as before",
            where=source,
            hint="export the model from before `quantize`, and quantize the ONNX model",
        )


def write_rest(
    family: Family,
    pipeline: Any,
    components: Sequence[str],
    folder: Path,
    *,
    read_by: tuple[str, str] = ("diffusers", "OnnxRuntimeModel"),
) -> None:
    """Writes scheduler, tokenizers and the `model_index.json` that Optimum and diffusers read.

    That keeps the pipeline's own settings, such as SDXL's `force_zeros_for_empty_prompt`, and names the parts
    it does not have.

    Args:
        read_by: package and class that read the components.
    """
    import diffusers

    from tunekit.families.loading import save_tokenizer

    tokenizers = [encoder.tokenizer for encoder in family.facts.encoders_of(pipeline)]
    with output_errors(folder):
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        for name in tokenizers:
            save_tokenizer(getattr(pipeline, name), folder / name)
    own = {key: value for key, value in pipeline.config.items() if not key.startswith("_")}
    index: dict[str, Any] = {
        **{key: value for key, value in own.items() if isinstance(value, bool | int | float | str)},
        **{key: [None, None] for key, value in own.items() if value in ((None, None), [None, None])},
        "_class_name": family.facts.pipeline_class,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        **{name: ["transformers", type(getattr(pipeline, name)).__name__] for name in tokenizers},
        **{name: list(read_by) for name in components},
    }
    write_json(folder / "model_index.json", index)


# Checking a graph ------------------------------------------------------------------------------------------


def check_inputs(component: ExportComponent, seed: int = 0) -> dict[str, Tensor]:
    """Inputs unlike the export's in every dynamic size: a batch of 3, half as high, wide and long.

    Latents are as large as a decoder gets them, which in fp16 is where it overflows.
    """
    import torch

    sizes = {"batch": 3}
    for name, axes in component.dynamic.items():
        for dim, axis in axes.items():
            if axis not in sizes and "+" not in axis:
                multiple = component.multiples.get(axis, 1)
                half = max(1, component.inputs[name].shape[dim] // (2 * multiple)) * multiple
                sizes[axis] = half + (multiple if axis == "width" else 0)
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, example in component.inputs.items():
        axes = component.dynamic.get(name, {})
        shape = [
            sum(sizes[axis] for axis in axes[dim].split("+")) if dim in axes else size
            for dim, size in enumerate(example.shape)
        ]
        if not axes:
            inputs[name] = example
        elif name == "attention_mask":  # of texts that fill the half
            inputs[name] = (torch.arange(shape[1]) < (shape[1] + 1) // 2).expand(shape).to(example.dtype)
        elif example.is_floating_point():
            scale = component.config.get("scaling_factor") if name == "latent_sample" else None
            inputs[name] = (torch.randn(shape, generator=generator) / (scale or 1)).to(example.dtype)
        else:
            high = int(example.max()) + 1
            inputs[name] = torch.randint(high, shape, generator=generator).to(example.dtype)
    return inputs


def graph_error(path: Path, inputs: dict[str, Tensor], expected: tuple[Tensor, ...]) -> float:
    """Runs an ONNX file in onnxruntime on the CPU; returns the largest relative error of its outputs."""
    import numpy as np
    import onnxruntime
    import torch

    from tunekit.diffusion.metrics import relative_error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings speak of its own optimizations
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    feed = {}
    for wanted in session.get_inputs():
        value = inputs[wanted.name].numpy()
        feed[wanted.name] = value.astype(types.get(wanted.type, value.dtype))
    outputs = session.run(None, feed)
    pairs = zip(outputs, expected, strict=True)
    return max((relative_error(torch.from_numpy(got), want) for got, want in pairs), key=_nan_is_worst)


def _nan_is_worst(error: float) -> float:
    return math.inf if math.isnan(error) else error


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A module's output as a tuple."""
    return value if isinstance(value, tuple) else (value,)


PASS = ExportOnnx
