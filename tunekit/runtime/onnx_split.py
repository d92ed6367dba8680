"""An ONNX graph in two: one that also gives what the middle of the network gives, and one that takes it.

The file stays as it is, for whoever else reads it; both are made when it is opened. What belongs to the
middle is known by the names of weights, which exporting and quantizing keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import ModelError
from tunekit.runtime.onnx_files import load_graph
from tunekit.runtime.step_cache import Node, cut, is_matrix, needed

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto


def with_middle(path: Path, prefixes: Sequence[str]) -> tuple[ModelProto, list[str]]:
    """The graph with what its middle gives as further outputs, and their names; weights outside are named.

    Args:
        prefixes: of the names of the middle's weights.

    Raises:
        ModelError: no weight has such a name.
    """
    import onnx

    model = load_graph(path)
    graph, start = model.graph, tuple(prefixes)
    constants = {weight.name for weight in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    middle = {
        weight.name
        for weight in graph.initializer
        if weight.name.startswith(start) and is_matrix(weight.dims)
    }
    names = cut(_nodes(graph), constants, middle)
    if not names:
        raise ModelError(
            f"its graph does not say where the network's middle is: no weight begins with {prefixes[-1]}",
            where=str(path),
            hint="export the model with export_onnx, which keeps the names",
        )
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model, names


Values = Mapping[str, tuple[int, Sequence[int | str | None]]]
"""Name -> element type, and shape as far as it is known."""


def without_middle(model: ModelProto, values: Values) -> ModelProto:
    """The graph that takes what the middle gives, in place of making it.

    Args:
        model: from `with_middle`; it is changed.
        values: what the middle gives.
    """
    from onnx import helper

    graph = model.graph
    outputs = [value.name for value in graph.output if value.name not in values]
    kept = [graph.node[index] for index in needed(_nodes(graph), outputs, list(values))]
    read = {name for node in kept for name in _reads(node)}
    weights = [weight for weight in graph.initializer if weight.name in read]
    left = {weight.name for weight in graph.initializer} - read  # also of adapters: inputs with a default
    inputs = [value for value in graph.input if value.name not in left]
    results = [value for value in graph.output if value.name in outputs]
    taken = []
    for name, (kind, shape) in values.items():
        sides = [size if isinstance(size, int) else f"{name}_{axis}" for axis, size in enumerate(shape)]
        taken.append(helper.make_tensor_value_info(name, kind, ["batch", *sides[1:]]))
    for part, content in (
        ("node", kept),
        ("initializer", weights),
        ("output", results),
        ("input", [*inputs, *taken]),
    ):
        graph.ClearField(part)
        getattr(graph, part).extend(content)
    return model


def _nodes(graph: GraphProto) -> list[Node]:
    shapes = ("Shape", "Size")
    return [Node(_reads(node), list(node.output), node.op_type in shapes) for node in graph.node]


def _reads(node: object) -> list[str]:
    """What a node reads, and the graphs within it."""
    found = [name for name in node.input if name]  # type: ignore[attr-defined]
    for attribute in node.attribute:  # type: ignore[attr-defined]
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            found += [name for part in inner.node for name in _reads(part)]
    return found
