"""ONNX files with their weights, wherever these lie.

Programs put large weights into `model.onnx_data`, `model.onnx.data`, `weights.pb` or one file per tensor; the
hub's cache makes links of them all. The onnx package reads no weights through links, so they are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tunekit.errors import ModelError, require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto


EXTERNAL = 1
"""TensorProto.EXTERNAL: the value lies in another file."""


def load_graph(path: Path) -> ModelProto:
    """A graph as it stands in its file: weights outside it are only named.

    Raises:
        ModelError: it is missing or damaged.
    """
    onnx = require("onnx", extra="onnx", why="reading an ONNX model needs")
    try:
        model: ModelProto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own exceptions differ by version
        raise ModelError(f"not an ONNX file, or damaged ({type(error).__name__})", where=str(path)) from error
    if not model.graph.node:
        raise ModelError("not an ONNX file, or damaged (it has no graph)", where=str(path))
    return model


def load_whole(path: Path) -> ModelProto:
    """A graph with all its weights in it.

    Raises:
        ModelError: it or a file of its weights is missing, damaged or outside of its folder.
    """
    model = load_graph(path)
    for tensor in external_tensors(model):
        tensor.raw_data = _content(tensor, path)
        del tensor.external_data[:]
        tensor.data_location = 0  # DEFAULT
    return model


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """The tensors of a graph whose values lie in other files."""
    for tensor in _tensors(model.graph):
        if tensor.data_location == EXTERNAL:
            yield tensor


def external_files(path: Path) -> list[str]:
    """The files, relative to the graph's folder, that hold weights of it."""
    return sorted({_location(tensor, path) for tensor in external_tensors(load_graph(path))})


def weight_bytes(path: Path) -> int:
    """Size of a graph with the files of its weights."""
    files = [path, *(path.parent / name for name in external_files(path))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _location(tensor: TensorProto, path: Path) -> str:
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    place = PurePosixPath(location.replace("\\", "/"))
    if not location or place.is_absolute() or ".." in place.parts:
        raise ModelError(
            f'the weights of {tensor.name} are said to lie in "{location}", which is not in its folder',
            where=str(path),
        )
    return place.as_posix()


def _content(tensor: TensorProto, path: Path) -> bytes:
    from onnx import helper

    said: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
    file = path.parent / _location(tensor, path)
    if not file.is_file():
        raise ModelError(f"its weights {file.name} are missing", where=str(path))
    count = 1
    for size in tensor.dims:
        count *= size
    try:
        offset = int(said.get("offset", 0))
        length = int(said.get("length") or file.stat().st_size - offset)
        needed = count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the place of {tensor.name} is damaged ({error})", where=str(path)) from error
    with file.open("rb") as opened:
        opened.seek(max(0, offset))
        content = opened.read(max(0, length))
    if offset < 0 or len(content) != length or (length < needed and tensor.data_type < 17):
        raise ModelError(f"{file.name} is too short for {tensor.name}: damaged or not whole", where=str(path))
    return content
