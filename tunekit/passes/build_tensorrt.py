"""ONNX to TensorRT-RTX engines, for cards that need not be here.

An engine holds kernels for one compute capability; cards that share it share the engine. Precision is that of
the ONNX file: TensorRT's networks are strongly typed. The folder keeps the layout of the ONNX folder, with
`<component>/sm86.engine` in place of `<component>/model.onnx`, and `engines.json`::

    {"version": 1, "tensorrt_rtx": "1.7.1.116", "engines": {"sm86": ["rtx-3060"]},
     "shapes": {"unet": {"sample": [[1, 4, 32, 32], [2, 4, 64, 64], [8, 4, 64, 64]], ...}, ...}}
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from tunekit import hardware
from tunekit.artifacts import write_json
from tunekit.errors import DeviceError, ModelError, missing, output_errors, require
from tunekit.passes.base import Context, Distinct, Outcome, Pass, Start
from tunekit.passes.metrics import SIZE, Metric

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.families import Component, Family, Sizes

PACKAGE = "tensorrt_rtx"
INDEX = "engines.json"
VERSION = 1
Range = tuple[int, int, int]
"""Smallest, usual and largest."""
MOST = 65_536
"""Of pictures, or of pixels."""
Shapes = dict[str, list[tuple[int, ...]]]
"""Input name -> its smallest, usual and largest shape."""


class BuildTensorrt(Pass):
    """Builds TensorRT-RTX engines for named cards, on any machine."""

    kind: ClassVar[str] = "build_tensorrt"
    accepts: ClassVar[frozenset[str]] = frozenset({"onnx"})
    produces: ClassVar[str | None] = "tensorrt"
    refuses: ClassVar[Mapping[str, str]] = {
        "uint8": "comes after {giver}, and TensorRT reads no uint8 activations; write"
        " `quantize: {{target: tensorrt}}` before it, or mode weight_only",
        "swappable": "comes after {giver} with adapters: swappable, and an engine takes no adapters; merge"
        " the adapter, and leave that out",
        "cached": "comes after {giver}, and an engine runs every step whole; leave {giver} out",
    }
    metrics: ClassVar[tuple[Metric, ...]] = (SIZE, Metric("engines", "engines", "count"))

    devices: Distinct[str] = Field(min_length=1)
    """Cards by name, such as rtx-3060, rtx-4090; a wrong name is answered with all of them."""
    batch: Range = (1, 1, 4)
    """Fewest, usual and most pictures at once. With guidance the denoiser has twice as many rows."""
    height: Range | None = None
    """Smallest, usual and largest height in pixels; None: from half the model's own to its own."""
    width: Range | None = None
    """Likewise. Memory on the card is taken for the largest."""

    @field_validator("devices")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            try:
                facts = hardware.find(name)
            except DeviceError as error:
                raise ValueError(f"{error.message}; {error.hint}") from error
            if facts.compute_capability is None:
                raise ValueError(f"{facts.name} has no TensorRT: that is for NVIDIA cards")
        return names

    @field_validator("batch", "height", "width")
    @classmethod
    def _ordered(cls, sizes: Range | None) -> Range | None:
        if sizes is not None and not 0 < sizes[0] <= sizes[1] <= sizes[2] <= MOST:
            raise ValueError("should be the smallest, the usual and the largest, in this order and above 0")
        return sizes

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Says what is missing before other passes have taken their time."""
        absent = missing(PACKAGE, extra="tensorrt", why="needs")
        if absent:
            return absent.message
        old = [name for name in self.devices if hardware.find(name).compute_capability == (7, 5)]
        if old and any("fp32" in step.gives() for step in earlier):
            return (
                f"builds nothing in fp32 for {old[0]} (sm75); write `export_onnx: {{dtype: fp16, keep: []}}`"
                " before it"
            )
        try:
            _targets(importlib.import_module(PACKAGE), self.devices)
        except DeviceError as error:
            return f"cannot run: {error.message}; {error.hint}"
        return None

    def reads(self, context: Context) -> frozenset[str]:
        """Nothing else."""
        return frozenset()

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds sizes that the model cannot draw, and graphs of an earlier chain that sm75 does not take."""
        if start.traits.get("fp32") and not any("fp16" in step.gives() for step in earlier):
            for name in self.devices:
                if hardware.find(name).compute_capability == (7, 5):
                    return f"builds nothing in fp32 for {name} (sm75); export the model in fp16, keep: []"
        if start.sizes is None or not (self.height or self.width):
            return None
        multiple = start.sizes.family.resolution_multiple(start.sizes.configs)
        for side in (*(self.height or ()), *(self.width or ())):
            if side % multiple:
                return f"has a side of {side} px, which is not a multiple of {multiple}, as this model needs"
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Builds every component once per compute capability.

        Raises:
            MissingPackageError: tensorrt_rtx is not installed.
            DeviceError: TensorRT-RTX does not build for one of the cards.
            ModelError: it cannot read or build a graph; names the node where it can.
        """
        trt = require(PACKAGE, extra="tensorrt", why="build_tensorrt needs")

        from tunekit import families

        assert artifact.model_path is not None
        source = artifact.model_path
        targets = _targets(trt, self.devices)
        components = sorted(path.parent.name for path in source.glob("*/model.onnx"))
        family = families.get(context.family)
        shapes = self._shapes(family, source, components)
        sparse = "sparse" in Start.of(artifact).traits
        table = []
        for component in components:
            for engine, cards in targets.items():
                context.say(f"{component} for {engine} ({', '.join(cards)})")
                started = time.perf_counter()
                graph = source / component / "model.onnx"
                data = _build(trt, graph, shapes[component], engine, sparse=sparse)
                target = context.folder / component / f"{engine}.engine"
                with output_errors(target):
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(data)
                table.append(
                    {
                        "component": component,
                        "engine": engine,
                        "cards": ", ".join(cards),
                        "size_bytes": len(data),
                        "seconds": round(time.perf_counter() - started, 2),
                    }
                )
        with output_errors(context.folder):
            shutil.copy2(source / "model_index.json", context.folder)
            for component in components:
                shutil.copy2(source / component / "config.json", context.folder / component)
            for folder in ("scheduler", *(encoder.tokenizer for encoder in family.facts.encoders)):
                if (source / folder).is_dir():  # some may be without one of their encoders
                    shutil.copytree(source / folder, context.folder / folder)
        index = {"version": VERSION, PACKAGE: trt.__version__, "engines": targets, "shapes": shapes}
        if sparse:
            index["sparse"] = True
        write_json(context.folder / INDEX, index)
        return Outcome(metrics={"engines": len(table)}, details={"engines": table})

    def _shapes(self, family: Family, folder: Path, components: list[str]) -> dict[str, Shapes]:
        """Per component and input, its smallest, usual and largest shape.

        Raises:
            ConfigError: a height or width that the model cannot draw.
        """
        denoiser, sizes = family.facts.denoiser_name, _sizes(family, folder)
        multiple, own = family.resolution_multiple(sizes.configs), family.default_size(sizes.configs)
        pixels = [
            wanted or (max(multiple, side // 2 // multiple * multiple), side, side)
            for wanted, side in zip((self.height, self.width), own, strict=True)
        ]
        latents = [family.latent_shape(sizes.configs, *size)[1:] for size in zip(*pixels, strict=True)]
        tokens = {encoder.name: encoder.tokens for encoder in sizes.encoders}
        smallest, usual, largest = self.batch
        guided = (smallest, 2 * usual, 2 * largest)
        found = {}
        for name in components:
            height, width = pixels if name == "vae_encoder" else zip(*latents, strict=True)
            axes: dict[str, Range] = {
                "batch": self.batch,
                "height": tuple(height),
                "width": tuple(width),
            }
            if name in tokens:
                axes["sequence"] = (tokens[name],) * 3
            fed = [
                _fed(sizes, rows, height, width)
                for rows, height, width in zip(guided, *pixels, strict=True)
                if name == denoiser
            ]
            found[name] = _input_shapes(folder / name / "model.onnx", axes, fed)
        return found


def _sizes(family: Family, folder: Path) -> Sizes:
    """Of the networks that the graphs in a folder were made from, by their configurations."""
    from tunekit.families.sizes import Sizes, with_config

    def read(part: Component) -> Component:
        """A row of the family's table, as it is in this folder."""
        place = {"vae": "vae_decoder"}.get(part.role, part.name)
        name = "scheduler_config.json" if part.role == "scheduler" else "config.json"
        made = with_config(part, json.loads((folder / place / name).read_text(encoding="utf-8")))
        if not part.tokenizer:
            return made
        config = json.loads((folder / part.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        return dataclasses.replace(made, tokens=min(made.tokens, int(config["model_max_length"])))

    there = (p for p in family.facts.components if not p.optional or (folder / p.name).is_dir())
    return Sizes(family, tuple(read(part) for part in there))


def _targets(trt: Any, devices: Sequence[str]) -> dict[str, list[str]]:
    """Engine name -> the cards that it is for: {"sm86": ["rtx-3060", "rtx-3090"]}."""
    targets: dict[str, list[str]] = {}
    for facts in map(hardware.find, devices):
        assert facts.compute_capability is not None
        name = "sm{}{}".format(*facts.compute_capability)
        if not hasattr(trt.ComputeCapability, name.upper()):
            raise DeviceError(
                f"TensorRT-RTX {trt.__version__} builds nothing for {facts.name} ({name})",
                hint="it is for RTX cards; on data-centre cards run the ONNX model with provider tensorrt",
            )
        cards = targets.setdefault(name, [])
        if facts.name not in cards:
            cards.append(facts.name)
    return targets


class _Enough(Exception):
    """Ends what only asks for a network's inputs."""


class _Fed:
    """Stands in for a denoiser, and notes the shape of what it is given."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, return_dict: bool = False, **given: Any) -> None:
        for name, value in given.items():
            self.shapes |= {
                key: tuple(tensor.shape)
                for key, tensor in (value if isinstance(value, dict) else {name: value}).items()
            }
        raise _Enough


def _fed(sizes: Sizes, rows: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what a family gives its denoiser for pictures of that size in pixels, by name."""
    import torch

    family = sizes.family
    fed: Any = _Fed(getattr(sizes.configs, sizes.denoiser.name).config)
    frame = torch.empty(rows, 6, device="meta")
    told = family.conditioning(sizes.encoded(rows), frame, 1.0)
    with suppress(_Enough):
        family.denoise(fed, sizes.latents(rows, height, width), frame[:, 0], told)
    found: dict[str, tuple[int, ...]] = fed.shapes
    return found


def _input_shapes(
    graph: Path, axes: Mapping[str, Range], fed: Sequence[Mapping[str, tuple[int, ...]]]
) -> Shapes:
    """Input name -> its smallest, usual and largest shape; inputs of one fixed shape are left out.

    Args:
        axes: the sizes of axes by their names.
        fed: of a denoiser, the shapes of its inputs, smallest, usual and largest; they go before `axes`.
    """
    import onnx

    shapes = {}
    for value in onnx.load(graph, load_external_data=False).graph.input:
        sizes: list[Range | int] = []
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            axis = dim.dim_param
            if axis and fed:
                smallest, usual, largest = (shapes_of[value.name][index] for shapes_of in fed)
                sizes.append((smallest, usual, largest))
            elif axis in axes:
                sizes.append(axes[axis])
            elif axis:
                raise ModelError(
                    f"input {value.name} has an axis {axis!r}; known are {', '.join(axes)}",
                    where=str(graph),
                    hint="export it with export_onnx",
                )
            else:
                sizes.append(int(dim.dim_value))
        if any(isinstance(size, tuple) for size in sizes):
            shapes[value.name] = [
                tuple(size[i] if isinstance(size, tuple) else size for size in sizes) for i in range(3)
            ]
    return shapes


def _build(trt: Any, graph: Path, shapes: Shapes, engine: str, *, sparse: bool = False) -> bytes:
    """Parses and builds one graph for one compute capability; `sparse` lets it skip zeros that are 2:4."""
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    component = graph.parent.name
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(
            f"{error.node_operator()} node {error.node_name()!r}: {_line(error.desc())}" for error in errors
        )
        raise ModelError(
            f"TensorRT-RTX cannot read {component}: {said}",
            where=str(graph),
            hint="it takes fp32, fp16, and int8 as `quantize: {target: tensorrt}` writes it:"
            " symmetric, without int32 biases",
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, engine.upper()), 0)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ModelError(
            f"TensorRT-RTX cannot build {component} for {engine}: {log.said()}",
            where=str(graph),
            hint="sm75 (RTX 20, T4) takes fp16 only: export_onnx: {dtype: fp16, keep: []}"
            if engine == "sm75"
            else None,
        )
    return bytes(built)


def _logger(trt: Any) -> Any:
    """A logger that keeps what TensorRT-RTX says of its errors, for our own message."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(_line(text))

        def said(self) -> str:
            return "; ".join(dict.fromkeys(self.errors)) or "it gives no reason"

    return Log()


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


PASS = BuildTensorrt
