"""OpenVINO, which reads files of its own (IR: a graph in XML, its weights beside it) and ONNX files."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunekit import hardware
from tunekit.artifacts import GRAPHS, Artifact
from tunekit.config import RuntimeConfig
from tunekit.errors import DeviceError, ModelError, output_errors, require
from tunekit.families.family import DTYPES, Family, Middle
from tunekit.hardware import Device
from tunekit.records import read_mapping
from tunekit.runtime.base import Runtime, settings_here
from tunekit.runtime.graph import (
    Array,
    GraphModule,
    first_line,
    graph_module,
    graph_pipeline,
    model_folder,
)
from tunekit.runtime.onnx_files import external_files, load_whole
from tunekit.runtime.step_cache import GraphSplit, Node, cut, is_matrix

IR = GRAPHS["openvino"]
"""The graph in a component's folder; its weights are in `openvino_model.bin`."""
NOTE = "openvino"
"""Key of a component's config.json: `{"precision": "bf16"}`, what it computes in unless told otherwise."""
MOST_IN_MEMORY = 2_000_000_000
"""Bytes of a graph that protobuf can hold."""
IR_VERSION = 11
"""Of the files, since OpenVINO 2022.1."""
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def open_in_openvino(
    artifact: Artifact,
    folder: Path,
    family: Family,
    place: Device,
    precision: torch.dtype | None,
    threads: int | None,
) -> Runtime:
    """Open the ONNX model in `folder`, in float32 if no precision is asked for."""
    precision = precision or torch.float32
    device = "GPU" if place.kind == "xpu" else "CPU"
    title = f"openvino {_TYPES[precision]} {device}"
    return _runtime(
        artifact,
        family,
        lambda path, settings: OpenVinoGraph(path / GRAPHS["onnx"], device, precision, threads, settings),
        threads,
        title,
    )


def open_ir(
    artifact: Artifact, family: Family, device: str, precision: torch.dtype | None, threads: int | None
) -> Runtime:
    """Open a folder of OpenVINO's own files.

    Args:
        device: "xpu" is a GPU of Intel, which OpenVINO finds by itself; anything else is the processor.
        precision: to compute in; None for what each component says.

    Raises:
        DeviceError: it is not there.
        ModelError: a file is damaged, or of a newer OpenVINO.
    """
    kind, _, number = device.partition(":")
    if kind != "xpu":  # torch need not know the GPU
        kind, number = hardware.probe(device).kind, ""
    where = ("GPU" + (f".{number}" if number else "")) if kind == "xpu" else "CPU"
    return _runtime(
        artifact,
        family,
        lambda path, settings: OpenVinoGraph(
            path / IR, where, precision or noted_precision(path), threads, settings
        ),
        threads,
    )


def _runtime(
    artifact: Artifact,
    family: Family,
    open_graph: Callable[[Path, RuntimeConfig | None], OpenVinoGraph],
    threads: int | None,
    title: str | None = None,
) -> Runtime:
    """The graphs of an artifact in OpenVINO.

    Args:
        open_graph: of a component's folder.
        threads: that were asked for; before those of the artifact's settings.
        title: of the runtime; None: what the denoiser computes in says it.
    """
    folder, name = model_folder(artifact), family.facts.denoiser_name

    def denoiser(settings: RuntimeConfig | None) -> GraphModule:
        made = graph_module(folder / name, lambda path: open_graph(path, settings))
        made.graph.max_rows = settings.rows if settings else None
        return made

    tuned = artifact.runtime if artifact.runtime and artifact.runtime.runtime.startswith("openvino") else None
    pipeline = graph_pipeline(folder, family, lambda path: open_graph(path, tuned))
    network: Any = family.denoiser(pipeline)
    title = title or f"openvino {network.graph.precision} {network.graph.device}"
    settings = settings_here(artifact, title)
    if settings is None and tuned is not None:  # what they are for is known only now
        pipeline = graph_pipeline(folder, family, lambda path: open_graph(path, None))
    elif settings is not None:
        network.graph.max_rows = settings.rows
    return Runtime(
        family,
        pipeline,
        title,
        artifact,
        threads=threads or (settings.threads if settings else None),
        settings=settings,
        reopen=denoiser,
        take_apart=_apart,
    )


def _apart(runtime: Runtime, middle: Middle) -> GraphSplit:
    """Compiles the two graphs that a denoiser's can be taken apart into, in place of it.

    Raises:
        ModelError: its weights do not have the names of their modules.
    """
    import openvino
    from openvino import opset13

    module: Any = runtime.family.denoiser(runtime.pipeline)
    graph: OpenVinoGraph = module.graph
    prefixes = tuple(f"{module.name}.{part}." for part in middle.paths)
    model = read(openvino.Core(), graph.path)
    names = _cut(model, prefixes)
    if not names:
        raise ModelError(
            f"its graph does not say where the network's middle is: no weight begins with {prefixes[-1]}",
            where=str(graph.path),
            hint="export the model with export_openvino, which keeps the names",
        )
    ports = {name: port for op in model.get_ordered_ops() for name, port in _ports(op).items()}
    given = [f"middle.{index}" for index in range(len(names))]
    results = []
    for name, title in zip(names, given, strict=True):
        results.append(opset13.result(ports[name]))
        ports[name].get_tensor().set_names({title})
    whole = graph.of(openvino.Model([*model.get_results(), *results], model.get_parameters(), "whole"))
    taken = []
    for name, title in zip(names, given, strict=True):
        port = ports[name]
        shape = port.get_partial_shape()
        added = opset13.parameter(shape, port.get_element_type(), name=title)
        port.get_tensor().set_names(set())
        added.output(0).get_tensor().set_names({title})
        for target in port.get_target_inputs():
            if target.get_node().get_type_name() != "Result":
                target.replace_source_output(added.output(0))
        taken.append(added)
    outer = graph.of(openvino.Model(model.get_results(), [*model.get_parameters(), *taken], "outer"))
    return GraphSplit(module, whole, outer, given)


def _cut(model: Any, prefixes: tuple[str, ...]) -> list[str]:
    nodes: list[Node] = []
    constants: set[str] = set()
    middle: set[str] = set()
    for op in model.get_ordered_ops():
        reads, kind = [_port(value.get_source_output()) for value in op.inputs()], op.get_type_name()
        nodes.append(Node(reads, list(_ports(op)), kind == "ShapeOf"))
        if kind == "Constant":
            constants.update(_ports(op))
            if op.get_friendly_name().startswith(prefixes) and is_matrix(op.get_output_shape(0)):
                middle.update(_ports(op))
    return cut(nodes, constants, middle)


def _ports(op: Any) -> dict[str, Any]:
    return {_port(port): port for port in op.outputs()}


def _port(port: Any) -> str:
    return f"{port.get_node().get_friendly_name()}:{port.get_index()}"


def noted_precision(folder: Path) -> torch.dtype:
    """What the config.json of a component says it computes in; float32 where it says nothing.

    Raises:
        ModelError: something that is no precision.
    """
    config = folder / "config.json"
    noted = read_mapping(config).get(NOTE)
    name = noted.get("precision") if isinstance(noted, dict) else None
    found = torch.float32 if name is None else DTYPES.get(str(name))
    if found is None:
        raise ModelError(f'it says precision "{name}"', where=str(config), hint=f"one of {', '.join(DTYPES)}")
    return found


class OpenVinoGraph:
    """A graph in OpenVINO: one of its own files, or a model.onnx."""

    max_rows: int | None = None
    unbatched: frozenset[str] = frozenset()

    def __init__(
        self,
        path: Path,
        device: str,
        precision: torch.dtype,
        threads: int | None,
        chosen: RuntimeConfig | None = None,
    ) -> None:
        openvino = require("openvino", extra="openvino", why="running a model in OpenVINO needs")
        # Without the hint OpenVINO takes bf16 where the processor has it, which nobody asked for.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _TYPES[precision],
            "PERFORMANCE_HINT": "LATENCY",
            # Nor shall it round activations to int8 where only the weights are int8: such a file computes in
            # floats, on every runtime.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        threads = threads or (chosen.threads if chosen else None)
        if threads is not None and device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        if chosen and chosen.pinning is not None and device == "CPU":
            settings["ENABLE_CPU_PINNING"] = chosen.pinning
        self.path, self.device, self.settings = path, device, settings
        core = openvino.Core()
        there = list(core.available_devices)
        if device not in there and f"{device}.0" not in there:
            raise DeviceError(
                f"OpenVINO finds no device {device}", hint=f"it finds {', '.join(there) or 'none'}"
            )
        self._unmarked = path.name != IR and precision != torch.float32  # our own files have their marks
        try:
            self._compile(core, read(core, path))
        except RuntimeError as error:
            raise ModelError(_why(path, error), where=str(path), hint=_newer(path)) from error
        self.precision: str = self._taken(openvino, _TYPES[precision])

    def _compile(self, core: Any, model: Any) -> None:
        if self._unmarked:
            model = _with_angles(core, model)
        self.compiled = core.compile_model(model, self.device, self.settings)
        self.request = self.compiled.create_infer_request()
        self.inputs = {
            port.get_any_name(): (
                np.dtype(port.get_element_type().to_dtype()),
                [d.get_length() if d.is_static else None for d in port.get_partial_shape()],
            )
            for port in self.compiled.inputs
        }
        self.outputs = [port.get_any_name() for port in self.compiled.outputs]

    def of(self, model: Any) -> OpenVinoGraph:
        """Another graph that is run as this one is."""
        import openvino

        made = copy.copy(self)
        made._compile(openvino.Core(), model)
        return made

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        try:
            results = self.request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise ModelError(
                f"OpenVINO cannot run it on {shapes}: {first_line(error)}", where=str(self.path)
            ) from error
        return {name: results[i].copy() for i, name in enumerate(self.outputs)}

    def _taken(self, openvino: Any, wanted: str) -> str:
        """What it computes in: a device without the type that is wanted takes a wider one."""
        try:
            found = self.compiled.get_property("INFERENCE_PRECISION_HINT")
        except RuntimeError:  # a device that does not say
            return wanted
        names = {"f32": openvino.Type.f32, "bf16": openvino.Type.bf16, "f16": openvino.Type.f16}
        return next((name for name, kind in names.items() if kind == found), wanted)


def read(core: Any, path: Path) -> Any:
    """Read a graph of either kind into OpenVINO.

    Raises:
        ModelError: it or its weights are missing.
        RuntimeError: OpenVINO cannot read it.
    """
    if path.name == IR:
        for file in (path, path.with_suffix(".bin")):
            if not file.is_file():
                raise ModelError(
                    f"its {file.name} is missing",
                    where=str(path.parent),
                    hint="copy it from the model that this is a copy of, or export again",
                )
        return core.read_model(path)
    graph = onnx_input(path)
    return core.read_model(graph) if isinstance(graph, Path) else core.read_model(graph, b"")


def onnx_input(path: Path) -> Path | bytes:
    """What OpenVINO can read of an ONNX graph: no weights through links that leave the folder.

    Raises:
        ModelError: there are such, and more than a graph can hold.
    """
    linked = any(file.is_symlink() for file in path.parent.iterdir())  # most have none, and this is cheap
    if not linked or not any(path.parent.joinpath(name).is_symlink() for name in external_files(path)):
        return path
    model = load_whole(path)
    if model.ByteSize() > MOST_IN_MEMORY:
        raise ModelError(
            "OpenVINO reads no weights through links",
            where=str(path),
            hint="copy the folder with what they point to: cp -rL FOLDER COPY",
        )
    return bytes(model.SerializeToString())


def _with_angles(core: Any, model: Any) -> Any:
    """The model with its angles in fp32: marks count only for what is read from one of OpenVINO's files."""
    import openvino

    from tunekit.runtime.openvino_angles import keep_angles

    keep_angles(model)
    with tempfile.TemporaryDirectory() as folder, output_errors(Path(folder)):
        openvino.save_model(model, Path(folder) / IR, compress_to_fp16=False)
        return core.read_model(Path(folder) / IR, config={"ENABLE_MMAP": False})


def _why(path: Path, error: RuntimeError) -> str:
    """What OpenVINO says, which names places in its own sources first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"(Exception from|Check '.*failed at) ", line)]
    told = (said or lines or [type(error).__name__])[0]
    return f"OpenVINO cannot load it: {told}"


def _newer(path: Path) -> str | None:
    """A hint where the file was written by a newer OpenVINO than the one that is installed."""
    if path.name != IR:
        return None
    import openvino

    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, path.stat().st_size - 65_536))
        tail = file.read()
    here = openvino.__version__.partition("-")[0]
    again = "install the newer one, or export the model again with this one"
    kind = re.search(rb'<net [^>]*version="(\d{1,6})"', head)
    if kind and int(kind[1]) > IR_VERSION:
        return f"it is IR {int(kind[1])}, and OpenVINO {here} reads up to {IR_VERSION}: {again}"
    made = re.search(rb'(?:"OpenVINO Runtime"|<Runtime_version) value="(\d{4}(?:\.\d{1,4}){1,2})', tail)
    if made and _numbers(made[1].decode()) > _numbers(here):
        return f"it was written by OpenVINO {made[1].decode()}, and {here} is installed here: {again}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
