"""OpenVINO, which reads the same model.onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunekit.artifacts import Artifact
from tunekit.errors import DeviceError, ModelError, require
from tunekit.families.family import Family
from tunekit.hardware import Device
from tunekit.runtime.base import Runtime
from tunekit.runtime.graph import Array, first_line, graph_pipeline
from tunekit.runtime.onnx_files import external_files, load_whole

MOST_IN_MEMORY = 2_000_000_000
"""Bytes of a graph that protobuf can hold."""
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
    pipeline = graph_pipeline(
        folder, family, lambda path: OpenVinoGraph(path / "model.onnx", device, precision, threads)
    )
    return Runtime(family, pipeline, title, artifact, threads=threads)


class OpenVinoGraph:
    """A model.onnx in OpenVINO."""

    max_rows: int | None = None
    unbatched: frozenset[str] = frozenset()

    def __init__(self, path: Path, device: str, precision: torch.dtype, threads: int | None) -> None:
        openvino = require("openvino", extra="openvino", why='provider "openvino" needs')
        # Without the hint OpenVINO takes bf16 where the processor has it, which nobody asked for.
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _TYPES[precision],
            "PERFORMANCE_HINT": "LATENCY",
            # Nor shall it round activations to int8 where only the weights are int8: such a file computes in
            # floats, on every runtime.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if threads is not None and device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        self.path = path
        core = openvino.Core()
        if device not in core.available_devices:
            raise DeviceError(
                f"OpenVINO finds no device {device}", hint=f"it finds {', '.join(core.available_devices)}"
            )
        try:
            self.compiled = core.compile_model(_read(core, path), device, settings)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot load it: {first_line(error)}", where=str(path)) from error
        self.request = self.compiled.create_infer_request()
        self.inputs = {
            port.get_any_name(): (
                np.dtype(port.get_element_type().to_dtype()),
                [d.get_length() if d.is_static else None for d in port.get_partial_shape()],
            )
            for port in self.compiled.inputs
        }
        self.outputs = [port.get_any_name() for port in self.compiled.outputs]

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


def _read(core: Any, path: Path) -> Any:
    """OpenVINO reads no weights through links that leave the folder; such a graph it gets whole."""
    linked = any(file.is_symlink() for file in path.parent.iterdir())  # most have none, and this is cheap
    if not linked or not any(path.parent.joinpath(name).is_symlink() for name in external_files(path)):
        return core.read_model(path)
    model = load_whole(path)
    if model.ByteSize() > MOST_IN_MEMORY:
        raise ModelError(
            "OpenVINO reads no weights through links",
            where=str(path),
            hint="copy the folder with what they point to: cp -rL FOLDER COPY",
        )
    return core.read_model(model.SerializeToString(), b"")
