"""Graphs that an adapter can be put on afterwards: beside a layer stands a branch whose weights are inputs.

A layer y = W x becomes y = W x + up (down x). `down` and `up` are inputs of the graph with a default, zeros
of rank 1, so that a program which feeds only what it must draws with the base alone; onnxruntime calls them
overridable initializers, and its own adapters (`onnxruntime.LoraAdapter`) feed them too. Their names are
`<component>.<module>.lora_down` and `.lora_up`:

- of MatMul and Gemm: [in, rank] and [rank, out];
- of Conv: [rank, in, k, k] and [out, rank, 1, 1].

The rank is that of the adapter, and layers may differ in it. Scale (alpha / rank) is within `up`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tunekit.errors import ModelError
from tunekit.runtime.onnx import DOWN, UP
from tunekit.runtime.onnx_files import load_graph


def add_branches(model: Any, component: str, paths: Collection[str]) -> None:
    """Gives a graph (onnx_ir) branches at these modules of a component.

    A module of which nothing is in the graph, as nothing that it computes is used, gets none.

    Raises:
        ModelError: a layer cannot have one.
    """
    wanted = {f"{component}.{path}.weight": path for path in paths}
    graph = model.graph
    inputs: dict[str, tuple[Any, Any]] = {}
    for node in list(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.name not in wanted or not weight.is_initializer():
            continue
        if trouble := _unlike(node):
            raise ModelError(f"{wanted[weight.name]} of the {component} cannot be swapped: {trouble}")
        if weight.name not in inputs:
            inputs[weight.name] = _inputs(graph, node, weight, len(inputs))
        _branch(graph, node, *inputs[weight.name])
    if not inputs:
        raise ModelError(f"no layer of the {component} that adapters are for is in its graph by its name")
    for name in wanted.keys() - inputs.keys():
        if name in graph.initializers and graph.initializers[name].uses():
            use = next(iter(graph.initializers[name].uses())).node.op_type
            raise ModelError(f"{wanted[name]} of the {component} cannot be swapped: it is used by a {use}")


def without_branch(graph: Path, component: str, paths: Collection[str]) -> list[str]:
    """The modules of which nothing is in a written graph."""
    there = {value.name for value in load_graph(graph).graph.input}
    return sorted(path for path in paths if f"{component}.{path}{DOWN}" not in there)


def _unlike(node: Any) -> str | None:
    """Why a node can have no branch, or None."""
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return f"it is used by a {node.op_type}"
    if node.op_type == "Conv" and _attribute(node, "group", 1) != 1:
        return "it is a convolution in groups"
    if node.op_type == "Gemm" and (_attribute(node, "alpha", 1.0) != 1 or _attribute(node, "transA", 0)):
        return "it is more than a product"
    return None


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _inputs(graph: Any, node: Any, weight: Any, number: int) -> tuple[Any, Any]:
    """The two inputs of a layer, with their defaults."""
    import numpy as np
    import onnx_ir

    shape, kind = list(weight.const_value.shape), weight.const_value.dtype
    rank = f"rank_{number}"
    if node.op_type == "Conv":
        sizes = [rank, *shape[1:]], [shape[0], rank, 1, 1]
    else:
        turned = node.op_type == "Gemm" and _attribute(node, "transB", 0)
        into, out = shape[::-1] if turned else shape
        sizes = [into, rank], [rank, out]
    made = []
    for end, size in zip((DOWN, UP), sizes, strict=True):
        zeros = np.zeros([1 if side == rank else side for side in size], kind.numpy())
        name = weight.name.removesuffix(".weight") + end
        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(size), type=onnx_ir.TensorType(kind))
        value.const_value = onnx_ir.tensor(zeros, name=name)
        graph.inputs.append(value)
        graph.initializers[name] = value
        made.append(value)
    return made[0], made[1]


def _branch(graph: Any, node: Any, down: Any, up: Any) -> None:
    """Adds the branch to what a node gives."""
    import onnx_ir

    whole = node.outputs[0]
    uses = list(whole.uses())
    operation = "Conv" if node.op_type == "Conv" else "MatMul"
    own = list(node.attributes.values()) if operation == "Conv" else []
    low = onnx_ir.Node("", operation, [node.inputs[0], down], own, name=f"{node.name}_lora_down")
    high = onnx_ir.Node("", operation, [low.outputs[0], up], name=f"{node.name}_lora_up")
    total = onnx_ir.Node("", "Add", [whole, high.outputs[0]], name=f"{node.name}_lora")
    made = (low, high, total)
    for one, end in zip(made, ("down", "up", "sum"), strict=True):
        one.outputs[0].name = f"{whole.name}_lora_{end}"
    graph.insert_after(node, made)
    for use in uses:
        use.node.replace_input_with(use.idx, total.outputs[0])
    for index, value in enumerate(graph.outputs):
        if value is whole:
            result = total.outputs[0]
            result.shape, result.type, name = value.shape, value.type, value.name
            value.name, result.name = f"{name}_base", name
            graph.outputs[index] = result
