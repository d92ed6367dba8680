"""Torch or ONNX to OpenVINO's own files (IR), in the layout that optimum-intel opens.

The folder holds `{text_encoder, <denoiser>, vae_encoder, vae_decoder}/openvino_model.xml` with
`openvino_model.bin` and `config.json` beside each, the scheduler, the tokenizers and `model_index.json`:

- tunekit: `tunekit generate FOLDER`;
- optimum-intel: `OVDiffusionPipeline.from_pretrained(FOLDER)`, for the pipelines that it knows
  (https://huggingface.co/docs/optimum-intel/openvino/models).

A torch model goes through ONNX, one component at a time, so that names and order of inputs and outputs are
those of `export_onnx`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tunekit.artifacts import CARD, GRAPHS, PICTURES, RECORD, Artifact, directory_size, write_json
from tunekit.config import SamplingConfig
from tunekit.errors import ArtifactError, ModelError, output_errors, require
from tunekit.passes.base import Context, Outcome, Pass, Start, formats
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.providers import lacks

if TYPE_CHECKING:
    from tunekit.families import Family

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
READ_BY = ("openvino", "Model")
"""What model_index.json names as the class of the components."""
MAX_RELATIVE_ERROR = {"fp32": 2e-4, "fp16": 3e-2, "bf16": 0.15}
"""Of a component. Denoisers with random weights differ by 0.02 in bf16 at any time."""
MAX_OF_INT8 = 0.15
"""Of graphs in int8: another runtime rounds other values on the way."""
PROMPTS = ("a red apple", "a house")


class ExportOpenvino(Pass):
    """Writes every component as OpenVINO's own files, and notes what they shall be computed in."""

    kind: ClassVar[str] = "export_openvino"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx"})
    produces: ClassVar[str | None] = "openvino"
    refuses: ClassVar[Mapping[str, str]] = {
        "swappable": "comes after {giver} with adapters: swappable, and OpenVINO's files take no adapters;"
        " merge the adapter, and leave that out"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (SIZE, RELATIVE_ERROR)

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What OpenVINO shall compute in, noted in each config.json; `--dtype` of `tunekit generate` overrules
    it. A device without that type takes a wider one: many processors have bf16, Intel's GPUs fp16. Weights
    are stored in 32 bits for fp32, else in 16 (as fp16). Components that overflow in fp16 compute in fp32
    there; the family knows them. What came in 16 bits is stored in 16 bits."""

    def gives(self) -> frozenset[str]:
        """Nothing: it computes what its parent does."""
        return frozenset()

    def reads(self, context: Context) -> frozenset[str]:
        """Nothing else."""
        return frozenset()

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Says what is missing before other passes have taken their time."""
        needed = PACKAGES if format == "torch" else ("onnx", "onnxruntime", "openvino")
        return lacks(*needed, extra="openvino")

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds packed torch weights, which would be floats again."""
        if formats(start.format, earlier)[-1] != "torch":
            return None
        givers = {**start.traits, **{trait: other.kind for other in earlier for trait in other.gives()}}
        if "packed" not in givers:
            return None
        return (
            f"comes after {givers['packed']}, whose packed weights it would unpack; quantize the OpenVINO"
            " model (quantize_openvino), or the ONNX one"
        )

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Writes the files, then compares every component with the parent at three sizes and batches.

        Raises:
            MissingPackageError: openvino, onnx, onnxscript or onnxruntime is not installed.
            ModelError: a component that cannot be exported, or that OpenVINO cannot read.
            ArtifactError: an ONNX model without graphs.
        """
        for package in PACKAGES if artifact.format == "torch" else PACKAGES[2:]:
            require(package, extra="openvino", why="export_openvino needs")
        from tunekit import families

        family = families.get(context.family)
        write = self._from_torch if artifact.format == "torch" else self._from_onnx
        for name in write(artifact, context, family):
            context.say(name)
            self._note(context.folder / name, family)
        made = dataclasses.replace(
            artifact, path=None, model_path=context.folder, format="openvino", source=str(context.folder)
        )
        errors = compare(artifact, made, context)
        table = [
            {
                "component": name,
                "size_bytes": directory_size(context.folder / name),
                "relative_error": errors.get(name),
            }
            for name in components(context.folder)
        ]
        int8 = Start.of(artifact).traits.get("packed") is not None
        limit = max(MAX_RELATIVE_ERROR[self.precision], MAX_OF_INT8 if int8 else 0)
        worst = max(errors.values(), key=nan_is_worst)
        missed = [
            f"{name} in OpenVINO differs from its parent by {error:.2g} of its size;"
            f" {self.precision} should stay below {limit:g}"
            for name, error in errors.items()
            if nan_is_worst(error) > limit
        ]
        return Outcome(
            metrics={
                "relative_error": worst,
                **{f"relative_error_{name}": error for name, error in errors.items()},
            },
            details={"components": table, "note": f"OpenVINO {_version()}"},
            failure="; ".join(missed) or None,
        )

    def _from_torch(self, artifact: Artifact, context: Context, family: Family) -> Iterator[str]:
        """Writes the components one after the other, through ONNX; gives their names."""
        import torch

        from tunekit.passes.export_onnx import export_component, graph_config, write_rest

        shapes = context.open_networks(artifact)  # of a large model, without weights
        names = [(component.name, component.component) for component in family.export_components(shapes)]
        write_rest(family, shapes, [name for name, _ in names], context.folder, read_by=READ_BY)
        del shapes
        for name, network in names:
            pipeline = context.open_networks(artifact, network)
            component = next(one for one in family.export_components(pipeline) if one.name == name)
            del pipeline
            with tempfile.TemporaryDirectory(dir=context.folder, prefix=".") as scratch:
                with torch.no_grad():
                    export_component(component, Path(scratch))
                write_json(context.folder / name / "config.json", graph_config(component))
                del component  # before its graph comes
                gc.collect()
                self._convert(Path(scratch) / GRAPHS["onnx"], context.folder / name)
            yield name

    def _from_onnx(self, artifact: Artifact, context: Context, family: Family) -> Iterator[str]:
        """Writes each graph, and everything else as it is; gives the components' names."""
        from tunekit.runtime.onnx_files import external_files

        source = Path(artifact.source)
        graphs = sorted(source.glob(f"*/{GRAPHS['onnx']}"))
        if not graphs:
            raise ArtifactError("there is no graph to export", where=str(source))
        left = {path for graph in graphs for path in _with_weights(graph, external_files(graph))}
        copy_rest(source, context.folder, without=left)
        for graph in graphs:
            self._convert(graph, context.folder / graph.parent.name)
            yield graph.parent.name
        file = context.folder / "model_index.json"
        index = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, index | {graph.parent.name: list(READ_BY) for graph in graphs})

    def _convert(self, graph: Path, folder: Path) -> None:
        """Reads an ONNX graph in OpenVINO and writes its own files."""
        import io

        import openvino

        from tunekit.runtime.graph import first_line
        from tunekit.runtime.openvino import onnx_input

        given = onnx_input(graph)
        try:
            # Reading alone leaves twice the operations, and biases where nncf does not see them.
            model = openvino.convert_model(given if isinstance(given, Path) else io.BytesIO(given))
        except Exception as error:  # its exception classes have no common base
            raise ModelError(f"OpenVINO cannot read it: {first_line(error)}", where=str(graph)) from error
        save(model, folder, halved=self.precision != "fp32" or _is_halved(graph))

    def _note(self, folder: Path, family: Family) -> None:
        """Writes what a component computes in into its config.json."""
        from tunekit.runtime.openvino import NOTE

        overflowing = family.facts.overflowing
        name = "vae" if folder.name.startswith("vae_") else folder.name
        precision = "fp32" if self.precision == "fp16" and name in overflowing else self.precision
        config = folder / "config.json"
        content = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, content | {NOTE: {"precision": precision}})


def save(model: Any, folder: Path, *, halved: bool) -> None:
    """Writes a model of OpenVINO into a component's folder; weights as fp16 if `halved`.

    What leads to sines and cosines is marked: it is fp32 wherever the file is opened.

    Raises:
        OutputError: disk full, no permission.
    """
    import openvino

    from tunekit.runtime.openvino_angles import keep_angles

    keep_angles(model)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, folder / GRAPHS["openvino"], compress_to_fp16=halved)


def components(folder: Path) -> list[str]:
    """Names of the components of a model in OpenVINO's files."""
    return sorted(path.parent.name for path in folder.glob(f"*/{GRAPHS['openvino']}"))


def copy_rest(source: Path, target: Path, *, without: set[Path]) -> None:
    """Copies a model's files, except its record, its pictures and `without`."""
    with output_errors(target):
        for path in sorted(source.rglob("*")):
            parts = path.relative_to(source).parts
            if path.is_dir() or path in without or parts[0] in (PICTURES, RECORD, CARD):
                continue
            if any(part.startswith(".") for part in parts):
                continue  # leftovers, and what other programs keep: no part of the model
            place = target.joinpath(*parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def compare(parent: Artifact, made: Artifact, context: Context) -> Mapping[str, float]:
    """Relative error of each component against the parent's, the worst of three sizes, batches and times.

    Pictures are of half the model's size, on the processor: what is asked is whether a runtime computes the
    same, not how well the model draws.
    """
    from tunekit.diffusion.metrics import relative_error
    from tunekit.passes.verify import trials

    here = dataclasses.replace(context, device="cpu")
    with here.running(parent, provider="cpu" if parent.format == "onnx" else None) as runtime:
        multiple = runtime.family.resolution_multiple(runtime.pipeline)
        height, width = (max(multiple, side // 2 // multiple * multiple) for side in runtime.default_size)
        size = SamplingConfig(height=height, width=width).over(runtime.sampling)
        tried = trials(runtime, list(PROMPTS), context.seed, size)
        expected = [trial.run(runtime) for trial in tried]
        denoiser = runtime.family.facts.denoiser_name
    errors: dict[str, float] = {}
    with here.running(made) as runtime:
        for trial, wanted in zip(tried, expected, strict=True):
            name = denoiser if trial.component == "denoiser" else trial.component
            error = relative_error(trial.run(runtime), wanted)
            errors[name] = max(errors.get(name, 0.0), error, key=nan_is_worst)
    return errors


def nan_is_worst(error: float) -> float:
    """A key for `max`."""
    return math.inf if math.isnan(error) else error


def _with_weights(graph: Path, names: Sequence[str]) -> Iterator[Path]:
    yield graph
    yield from (graph.parent / name for name in names)


def _is_halved(graph: Path) -> bool:
    """Whether weights of an ONNX graph are float16: they stay so, whatever it computes in."""
    import onnx

    weights = onnx.load(graph, load_external_data=False).graph.initializer
    return any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in weights)


def _version() -> str:
    import openvino

    return str(openvino.__version__.partition("-")[0])


PASS = ExportOpenvino
