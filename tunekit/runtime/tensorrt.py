"""TensorRT-RTX engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunekit import hardware
from tunekit.artifacts import Artifact
from tunekit.errors import DeviceError, ModelError, require
from tunekit.families.family import Family
from tunekit.records import read_mapping
from tunekit.runtime.base import Runtime
from tunekit.runtime.graph import Array, graph_pipeline, model_folder, unbatched_inputs


def open_engines(artifact: Artifact, family: Family, device: str) -> Runtime:
    """Open the engines for the card that is here."""
    folder = model_folder(artifact)
    require("tensorrt_rtx", extra="tensorrt", why="TensorRT-RTX engines need")
    if not torch.cuda.is_available():
        raise DeviceError(
            "TensorRT-RTX engines run on NVIDIA RTX cards, and torch finds none here",
            where=artifact.source,
            hint="open the ONNX model that they were built from, or take this folder to such a machine",
        )
    place = torch.device(hardware.probe("cuda" if device == "auto" else device).torch_device)
    if place.type != "cuda":
        raise DeviceError(f"TensorRT-RTX engines do not run on {device}", where=artifact.source)
    name = "sm{}{}".format(*torch.cuda.get_device_capability(place))
    built = sorted(path.stem for path in (folder / family.facts.denoiser_name).glob("*.engine"))
    if name not in built:
        raise DeviceError(
            f"its engines are for {', '.join(built) or 'nothing'}; "
            f"{torch.cuda.get_device_name(place)} needs {name}",
            where=artifact.source,
            hint="build them for this card: build_tensorrt: {devices: [...]}",
        )
    pipeline = graph_pipeline(folder, family, lambda path: EngineGraph(path / f"{name}.engine", place))
    return Runtime(family, pipeline, f"tensorrt-rtx {torch.cuda.get_device_name(place)}", artifact)


def _built_with(engine: Path) -> str:
    """What is known of the version that built an engine, to be added to a sentence."""
    index = engine.parent.parent / "engines.json"
    said = read_mapping(index).get("tensorrt_rtx") if index.is_file() else None
    return f"; it was built with {said}" if isinstance(said, str) else ""


class EngineGraph:
    """A TensorRT-RTX engine on the GPU that torch uses; torch owns its buffers."""

    def __init__(self, path: Path, device: torch.device) -> None:
        trt = require("tensorrt_rtx", extra="tensorrt", why="TensorRT-RTX engines need")
        self.device = device
        # Engine and context borrow from their makers, which must live as long.
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._context: Any = self._engine.create_execution_context() if self._engine else None
        if self._context is None:
            raise ModelError(
                f"TensorRT-RTX {trt.__version__} cannot open it on {torch.cuda.get_device_name(device)}"
                f"{_built_with(path)}",
                where=str(path),
                hint="engines need the card and the TensorRT-RTX they were built for; build them again",
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs = {
            name: (
                np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))),
                [size if size >= 0 else None for size in self._engine.get_tensor_shape(name)],
            )
            for name in inputs
        }
        self.outputs = {
            name: torch.from_numpy(np.empty(0, trt.nptype(self._engine.get_tensor_dtype(name)))).dtype
            for name in names
            if name not in inputs
        }
        self.unbatched = unbatched_inputs(path.parent)
        most = [
            self._engine.get_tensor_profile_shape(name, 0)[2][0]
            for name, (_, shape) in self.inputs.items()
            if shape and shape[0] is None and name not in self.unbatched
        ]
        self.max_rows: int | None = min(most, default=None)

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """See `Graph.run`."""
        held = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise ModelError(
                    f"{name} has shape {list(tensor.shape)}; the engine takes {list(low)} to {list(high)}",
                    hint="build it with a wider range of sizes",
                )
        results = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device=self.device)
            for name, kind in self.outputs.items()
        }
        for name, tensor in (held | results).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise DeviceError("TensorRT-RTX could not run the engine", hint="its messages are above")
        stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in results.items()}
