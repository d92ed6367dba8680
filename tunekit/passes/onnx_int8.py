"""ONNX graphs with 8-bit weights and activations.

Three ways to write an int8 layer, by what computes it:

- `store`: the weight is int8 in the file and a float in the computation. Saves bytes, and runs everywhere.
- `compute_dynamic`: MatMul and Gemm in int8, the activation's range taken from each input as it comes.
- `compute_static`: Conv and MatMul in int8 between QuantizeLinear and DequantizeLinear.

Figures that led to the choices here (2 cores of an AMD EPYC with AVX512-VNNI, onnxruntime 1.31, 11M U-Net,
one thread): fp32 20.6 ms, dynamic 17.6, static 10.8; OpenVINO reads the static file to the same accuracy;
TensorRT-RTX builds from `store` and from static with signed activations and float biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tunekit.errors import NonFiniteError, output_errors
from tunekit.runtime.onnx_files import EXTERNAL, load_graph, load_whole, weight_bytes

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = dict[str, Array]
Range = tuple[float, float]
Method = Literal["mse", "percentile", "minmax"]

SMALLEST = 1024
"""Weights with fewer elements stay floats: their scales and nodes would cost more than they save."""
KEPT_VALUES = 1024
"""Values kept of each tensor and call for choosing its range."""
OUTSIDE = 1e-4
"""Share of the values on either side that a range by percentile leaves out."""
STRAYING = 0.25
"""Share of a range's width by which values of calls that it was not measured on may leave it."""
FETCHED_AT_ONCE = 64
"""Values of a graph that are fetched in one run of it, as those of a large model would not all fit."""
SMALL = 200_000_000
"""Bytes of weights below which all are."""
PROTOBUF_LIMIT = 2_000_000_000
COMPUTED = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Flavour:
    """What an int8 layer looks like to whom it is made for.

    Attributes:
        signed: activations are symmetric int8; otherwise uint8 with a zero point.
        outputs: results of Convs are quantized too, without which onnxruntime computes them in floats.
        biases: biases are int32, which onnxruntime wants and TensorRT refuses.
        gemm: Gemms are computed in int8; onnxruntime has none with a float result, and a denoiser's see one
            row per picture anyway.
    """

    signed: bool = False
    outputs: bool = True
    biases: bool = True
    gemm: bool = False


FLAVOURS = {
    "cpu": Flavour(),
    "openvino": Flavour(outputs=False, biases=False, gemm=True),
    "cuda": Flavour(signed=True, outputs=False, biases=False, gemm=True),
    "tensorrt": Flavour(signed=True, outputs=False, biases=False, gemm=True),
}
"""By the target that a file is made for."""


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight.

    Attributes:
        node: Conv, MatMul, Gemm or Gather.
        weight: name of the initializer.
        axis: of the weight: output channels, or the rows of a table.
        path: the module it came from, e.g. "unet.conv_in".
        weights: how many there are.
        channels: how many of them are its results'.
    """

    node: NodeProto
    weight: str
    axis: int
    path: str
    weights: int = 0
    channels: int = 1

    @property
    def computes(self) -> bool:
        """Whether int8 arithmetic exists for it (a table is only looked up)."""
        return self.node.op_type in COMPUTED


class Graph:
    """One model.onnx, to be changed in place."""

    def __init__(self, path: Path, *, weights: bool = True) -> None:
        """Reads it.

        Args:
            weights: those in other files too; otherwise they are only named, and stay where they are.
        """
        self.path = path
        self.model: ModelProto = load_whole(path) if weights else load_graph(path)
        # Shapes in between go stale when types change; onnxruntime works them out itself.
        del self.model.graph.value_info[:]
        self.nodes: list[NodeProto] = list(self.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._defaults = {value.name for value in self.model.graph.input}
        self._replaced: dict[str, str] = {}
        self._activations: dict[tuple[str, bool], str] = {}

    def layers(self) -> list[Layer]:
        """Every node with a large constant weight, in the order of the graph."""
        found = []
        for node in self.nodes:
            index = 0 if node.op_type == "Gather" else 1
            if node.op_type not in (*COMPUTED, "Gather") or len(node.input) <= index:
                continue
            tensor = self.initializers.get(node.input[index])
            if tensor is None or tensor.data_type != TensorProto.FLOAT or _count(tensor) < SMALLEST:
                continue
            if tensor.name in self._defaults:  # of an input: adapters stay in floats
                continue
            axis = _channel_axis(node, len(tensor.dims))
            if axis is not None:
                path, channels = tensor.name.removesuffix(".weight"), tensor.dims[axis]
                found.append(Layer(node, tensor.name, axis, path, _count(tensor), channels))
        return found

    def modules(self, component: str) -> list[str]:
        """Paths of all modules with weights, within the component."""
        paths = (name.rpartition(".")[0].removeprefix(f"{component}.") for name in self.initializers)
        return sorted({path for path in paths if path})

    def convolutional(self) -> float:
        """Share of the large weights that are in convolutions, 0 to 1."""
        layers = self.layers()
        inside = sum(layer.weights for layer in layers if layer.node.op_type == "Conv")
        return inside / max(1, sum(layer.weights for layer in layers))

    def types(self) -> str:
        """What the large weights are, for people: "they are float16"."""
        large = [tensor for tensor in self.initializers.values() if _count(tensor) >= SMALLEST]
        names = sorted({TensorProto.DataType.Name(tensor.data_type).lower() for tensor in large})
        return f"they are {' and '.join(names)}" if names else "all are small"

    def store(self, layers: Iterable[Layer], *, fold: bool = False) -> None:
        """Keeps the weights of `layers` as int8 in the file.

        Args:
            fold: written as Cast and Mul, which onnxruntime computes once, when it loads the file, even where
                QuantizeLinear stands elsewhere in the graph; otherwise as DequantizeLinear, the standard
                form, which TensorRT demands and onnxruntime computes in each call (unless told
                `session.disable_quant_qdq`).
        """
        for layer in layers:
            index = list(layer.node.input).index(layer.weight)
            layer.node.input[index] = self._stored(layer, fold=fold)

    def halve(self, layers: Iterable[Layer]) -> None:
        """Keeps the weights of `layers` as float16 in the file; they are floats in the computation.

        For what int8 would cost too much: of builtin/emoji-64, the last layer's weights in int8 alone leave
        43 dB. Runtimes convert them once, when they load the file. What float16 cannot hold stays as it is.
        """
        for layer in layers:
            weight = numpy_helper.to_array(self.initializers[layer.weight])
            if np.abs(weight).max() > np.finfo(np.float16).max:
                continue
            if layer.weight not in self._replaced:
                half, name = f"{layer.weight}_half", f"{layer.weight}_float"
                self._add(half, weight.astype(np.float16))
                self._prepend([helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT)])
                self._replaced[layer.weight] = name
            index = list(layer.node.input).index(layer.weight)
            layer.node.input[index] = self._replaced[layer.weight]

    def store_four(self, layers: Iterable[Layer], *, group: int) -> int:
        """Keeps the weights of matrix products as 4 bits, with a scale per `group` inputs; returns how many.

        They become MatMulNBits, an operation of onnxruntime that OpenVINO reads, too. To be called last: the
        layers of this graph are no longer its own then.

        Args:
            group: 16, 32, 64, 128 or 256.
        """
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        chosen = [layer for layer in layers if layer.node.op_type == "MatMul"]
        for layer in chosen:
            layer.node.name = layer.path
        self._settle()
        quantizer = MatMulNBitsQuantizer(
            self.model,
            bits=4,
            block_size=group,
            is_symmetric=True,
            nodes_to_include=[layer.path for layer in chosen],
        )
        quantizer.process()
        self.model = quantizer.model.model
        self.nodes = list(self.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        return sum(node.op_type == "MatMulNBits" for node in self.nodes)

    def compute_dynamic(self, layers: Iterable[Layer], *, bits: int = 8) -> int:
        """Computes MatMul and Gemm layers in int8 with ranges of the moment, stores others; returns how many.

        Args:
            bits: of weights, see `compute_static`.
        """
        count = 0
        for layer in layers:
            if layer.node.op_type == "Conv" or not layer.computes or _scaled(layer.node):
                self.store([layer], fold=True)  # a ConvInteger is slower than a float Conv
                continue
            values, scale = self._quantized(layer, bits=bits, as_matmul=True)
            x, y = layer.node.input[0], layer.node.output[0]
            names = self._dynamic_input(x)
            bias = layer.node.input[2] if len(layer.node.input) > 2 else ""
            nodes = [
                helper.make_node("MatMulInteger", [names[0], values, names[2]], [f"{y}_int32"]),
                helper.make_node("Cast", [f"{y}_int32"], [f"{y}_float"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [names[1], scale], [f"{y}_scale"]),
                helper.make_node("Mul", [f"{y}_float", f"{y}_scale"], [f"{y}_product" if bias else y]),
            ]
            if bias:
                nodes.append(helper.make_node("Add", [f"{y}_product", bias], [y]))
            self._substitute(layer.node, nodes)
            count += 1
        return count

    def computable(self, layers: Iterable[Layer], flavour: Flavour) -> list[Layer]:
        """Those of `layers` that `compute_static` computes in int8; it stores the others."""
        return [
            layer
            for layer in layers
            if layer.computes and not _scaled(layer.node) and (layer.node.op_type != "Gemm" or flavour.gemm)
        ]

    def compute_static(
        self, layers: Iterable[Layer], ranges: Mapping[str, Range], flavour: Flavour, *, bits: int = 8
    ) -> int:
        """Computes layers in int8 between QuantizeLinear and DequantizeLinear; returns how many.

        Args:
            ranges: of every layer's input, and of every Conv's output; see `measure_ranges`.
            bits: of weights; 7 keeps sums of two products within 16 bits, for processors without VNNI.
        """
        layers, signed = list(layers), flavour.signed
        computable = self.computable(layers, flavour)
        self.store([layer for layer in layers if layer not in computable], fold=not signed)
        for layer in computable:
            node = layer.node
            node.input[1] = self._stored(layer, fold=False, bits=bits)
            x_scale = self._activation(node.input[0], ranges, signed=signed)
            if len(node.input) > 2 and node.input[2] in self.initializers and flavour.biases:
                node.input[2] = self._stored_bias(node.input[2], x_scale, f"{layer.weight}_scale")
            node.input[0] = self._activations[node.input[0], signed]
            if node.op_type == "Conv" and flavour.outputs:
                self._quantize_output(node, ranges)
        return len(computable)

    def save(self, path: Path) -> None:
        """Writes the graph; weights above 2 GB go beside it."""
        self._settle()
        _save(self.model, path)

    def _settle(self) -> None:
        """Writes nodes, and the weights that are used, into the model."""
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input} | {value.name for value in graph.output}
        tensors = [tensor for tensor in self.initializers.values() if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
        del graph.node[:]
        graph.node.extend(self.nodes)

    # What the ways share
    # --------------------------------------------------------------------------------------

    def _stored(self, layer: Layer, *, fold: bool, bits: int = 8) -> str:
        """Name of the float weight that is made from the int8 one in the file."""
        if layer.weight in self._replaced:
            return self._replaced[layer.weight]
        values, scale = self._quantized(layer, bits=bits)
        name = f"{layer.weight}_dequantized"
        if fold:
            flat = numpy_helper.to_array(self.initializers[scale])
            shape = [1] * len(self.initializers[values].dims)
            shape[layer.axis] = -1
            self._add(f"{scale}_shaped", flat.reshape(shape))
            made = [
                helper.make_node("Cast", [values], [f"{name}_unscaled"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{name}_unscaled", f"{scale}_shaped"], [name]),
            ]
        else:
            made = [helper.make_node("DequantizeLinear", [values, scale], [name], axis=layer.axis)]
        self._prepend(made)
        self._replaced[layer.weight] = name
        return name

    def _quantized(self, layer: Layer, *, bits: int = 8, as_matmul: bool = False) -> tuple[str, str]:
        """Adds the int8 weight, as MatMul takes it if asked, and its scales; returns their names."""
        values, scale, _ = self._levels(layer, bits)
        names = f"{layer.weight}_int8", f"{layer.weight}_scale"
        if as_matmul and layer.axis == 0:
            values = np.ascontiguousarray(values.T)
            names = f"{names[0]}_t", names[1]
        self._add(names[0], values)
        self._add(names[1], scale)
        return names

    def rounded(self, layer: Layer, *, bits: int = 8) -> Array:
        """A layer's weight as floats that int8 can hold."""
        values, scale, shape = self._levels(layer, bits)
        return values.astype(np.float32) * scale.reshape(shape)

    def _levels(self, layer: Layer, bits: int) -> tuple[Array, Array, list[int]]:
        """The int8 weight, a scale per channel, and the shape in which they multiply."""
        weight = numpy_helper.to_array(self.initializers[layer.weight])
        others = tuple(dim for dim in range(weight.ndim) if dim != layer.axis)
        most = 2 ** (bits - 1) - 1
        scale = np.maximum(np.abs(weight).max(axis=others), 1e-30).astype(np.float32) / np.float32(most)
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        values = np.clip(np.rint(weight / scale.reshape(shape)), -most, most).astype(np.int8)
        return values, scale, shape

    def _stored_bias(self, bias: str, x_scale: float, weight_scale: str) -> str:
        scale = numpy_helper.to_array(self.initializers[weight_scale]) * np.float32(x_scale)
        values = np.rint(numpy_helper.to_array(self.initializers[bias]) / scale)
        name = f"{weight_scale.removesuffix('.weight_scale')}.bias_{x_scale:.9g}"
        self._add(f"{name}_int32", np.clip(values, -(2**31), 2**31 - 1).astype(np.int32))
        self._add(f"{name}_scale", scale)
        node = helper.make_node("DequantizeLinear", [f"{name}_int32", f"{name}_scale"], [name], axis=0)
        self._prepend([node])
        return name

    def _activation(self, name: str, ranges: Mapping[str, Range], *, signed: bool) -> float:
        """Adds Q and DQ behind the value `name`, once; returns the scale."""
        scale, zero = rounding(ranges[name], signed=signed)
        if (name, signed) not in self._activations:
            self._activations[name, signed] = f"{name}_dequantized"
            self._insert_behind(name, self._q_and_dq(name, f"{name}_dequantized", scale, zero, signed=signed))
        return scale

    def _quantize_output(self, node: NodeProto, ranges: Mapping[str, Range]) -> None:
        y = node.output[0]
        if (y, False) in self._activations:
            return
        scale, zero = rounding(ranges[y], signed=False)
        node.output[0] = f"{y}_float"
        self._insert_behind(f"{y}_float", self._q_and_dq(f"{y}_float", y, scale, zero, signed=False))
        self._activations[y, False] = y  # whoever takes it takes it quantized

    def _q_and_dq(self, x: str, y: str, scale: float, zero: int, *, signed: bool) -> list[NodeProto]:
        self._add(f"{y}_s", np.array(scale, np.float32))
        self._add(f"{y}_z", np.array(zero, np.int8 if signed else np.uint8))
        return [
            helper.make_node("QuantizeLinear", [x, f"{y}_s", f"{y}_z"], [f"{y}_q"]),
            helper.make_node("DequantizeLinear", [f"{y}_q", f"{y}_s", f"{y}_z"], [y]),
        ]

    def _dynamic_input(self, name: str) -> tuple[str, str, str]:
        """Values, scale and zero point of `name`, made once."""
        names = f"{name}_dq", f"{name}_dq_scale", f"{name}_dq_zero"
        if (name, False) not in self._activations:
            self._activations[name, False] = names[0]
            self._insert_behind(name, [helper.make_node("DynamicQuantizeLinear", [name], list(names))])
        return names

    # Editing
    # --------------------------------------------------------------------------------------------------

    def _add(self, name: str, values: Array) -> None:
        self.initializers[name] = numpy_helper.from_array(values, name)

    def _prepend(self, nodes: Sequence[NodeProto]) -> None:
        self.nodes[:0] = nodes

    def _insert_behind(self, value: str, nodes: Sequence[NodeProto]) -> None:
        """Puts nodes right behind the one that makes `value` (at the front for an input of the graph)."""
        at = next((i + 1 for i, node in enumerate(self.nodes) if value in node.output), 0)
        self.nodes[at:at] = nodes

    def _substitute(self, node: NodeProto, nodes: Sequence[NodeProto]) -> None:
        at = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[at : at + 1] = nodes


def _count(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _scaled(node: NodeProto) -> bool:
    """Whether a Gemm does more than multiply and add."""
    plain = _attribute(node, "alpha", 1.0) == 1.0 and _attribute(node, "beta", 1.0) == 1.0
    return node.op_type == "Gemm" and (not plain or _attribute(node, "transA", 0) == 1)


def _channel_axis(node: NodeProto, rank: int) -> int | None:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gather":
        return 0 if rank == 2 and _attribute(node, "axis", 0) == 0 else None
    if rank != 2:
        return None
    return 0 if node.op_type == "Gemm" and _attribute(node, "transB", 0) else 1


def rounding(found: Range, *, signed: bool) -> tuple[float, int]:
    """Scale and zero point for a range; zero itself is always hit exactly."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    if signed:
        return max(-low, high, 1e-30) / 127, 0
    scale = max(high - low, 1e-30) / 255
    return scale, int(np.clip(round(-low / scale), 0, 255))


def _save(model: ModelProto, path: Path) -> None:
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        if size > PROTOBUF_LIMIT:
            onnx.save(
                model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024
            )
        else:
            onnx.save(model, path)


# Ranges ----------------------------------------------------------------------------------------------------


def measure_ranges(
    path: Path,
    layers: Sequence[Layer],
    calls: Sequence[Feeds],
    *,
    signed: bool,
    method: Method = "minmax",
) -> dict[str, Range]:
    """Ranges of the layers' inputs and outputs, from real calls of the float graph (tables have none).

    Args:
        path: of the float graph.
        calls: feeds, e.g. from the model's own trajectories.
        signed: symmetric ranges.
        method: "minmax": the extremes; "percentile": without the outermost `OUTSIDE` of the values on either
            side; "mse": what has the least squared rounding and clipping error over `KEPT_VALUES` values of
            each call.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    computed = [layer.node for layer in layers if layer.computes]
    names = sorted({name for node in computed for name in (node.input[0], node.output[0])})
    found: dict[str, Range] = dict.fromkeys(names, (0.0, 0.0))

    def widen(name: str, bounds: Range) -> None:
        if not np.isfinite(bounds).all():
            raise _not_finite(name, path)
        found[name] = min(found[name][0], bounds[0]), max(found[name][1], bounds[1])

    if method == "minmax":
        for feeds, made in _within_graph(path, names, calls):
            for name in names:
                widen(name, made[name] if name in made else _extremes(feeds[name]))
        return found
    kept: dict[str, list[Array]] = {name: [] for name in names}
    for number, name, value in _fetched(path, names, calls):
        widen(name, _extremes(value))
        few = value.size <= KEPT_VALUES
        places = np.random.default_rng(number).integers(0, value.size, KEPT_VALUES)
        kept[name].append(value if few else value[places])
    return {
        name: _inner_range(np.concatenate(kept[name]))
        if method == "percentile"
        else _best_range(np.concatenate(kept[name]), found[name], signed=signed)
        for name in names
    }


def _not_finite(name: str, path: Path) -> NonFiniteError:
    return NonFiniteError(f"{name} holds values that are not finite", where=str(path))


def _extremes(value: Array) -> Range:
    return float(value.min()), float(value.max())


def _within_graph(
    path: Path, names: Sequence[str], calls: Iterable[Feeds]
) -> Iterator[tuple[Feeds, dict[str, Range]]]:
    """Calls, and the extremes of those values that the graph computes, worked out where they are.

    Nothing large is fetched or kept, so that a call runs the graph once whatever its size.
    """
    model = load_graph(path)
    made = {name for node in model.graph.node for name in node.output} & set(names)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        for name in made.intersection(node.output):  # right behind: they run before it is overwritten
            for kind in ("Min", "Max"):
                reduced = helper.make_node(f"Reduce{kind}", [name], [f"{name}_{kind}"], keepdims=0)
                model.graph.node.append(reduced)
                value = helper.make_tensor_value_info(reduced.output[0], TensorProto.FLOAT, [])
                model.graph.output.append(value)
    session = open_in_memory(model, path, in_order=True)
    outputs = [value.name for value in session.get_outputs()]
    for feeds in calls:
        values = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        bounds = {name: (float(values.pop(f"{name}_Min")), float(values.pop(f"{name}_Max"))) for name in made}
        for name, value in values.items():  # the graph's own; a maximum may pass over what is no number
            if not np.isfinite(value).all():
                raise _not_finite(name, path)
        yield feeds, bounds


def _fetched(path: Path, names: Sequence[str], calls: Iterable[Feeds]) -> Iterator[tuple[int, str, Array]]:
    """Number of the call, and each value as a flat array; of a large graph some values at a time."""
    session = _session_with_outputs(path, names)
    outputs = {node.name for node in session.get_outputs()} & set(names)
    at_once = FETCHED_AT_ONCE if weight_bytes(path) > SMALL else max(1, len(names))
    for number, feeds in enumerate(calls):
        for start in range(0, len(names), at_once):
            wanted = [name for name in names[start : start + at_once] if name in outputs]
            got = dict(zip(wanted, session.run(wanted, feeds), strict=True)) if wanted else {}
            for name in names[start : start + at_once]:
                yield (
                    number,
                    name,
                    np.asarray(got[name] if name in outputs else feeds[name], np.float32).ravel(),
                )


def beyond(ranges: Mapping[str, Range], others: Mapping[str, Range]) -> list[str]:
    """Values whose ranges on other calls leave these by more than `STRAYING` of their width."""
    found = []
    for name, (low, high) in others.items():
        bottom, top = ranges[name]
        if max(bottom - low, high - top) > STRAYING * max(top - bottom, 1e-30):
            found.append(name)
    return found


def _inner_range(values: Array) -> Range:
    low, high = np.quantile(values, [OUTSIDE, 1 - OUTSIDE])
    return float(low), float(high)


def _best_range(values: Array, extremes: Range, *, signed: bool) -> Range:
    best, least = extremes, np.inf
    for share in np.linspace(1.0, 0.3, 15):
        candidate = (extremes[0] * share, extremes[1] * share)
        scale, zero = rounding(candidate, signed=signed)
        bottom, top = (-127, 127) if signed else (0, 255)
        levels = np.clip(np.rint(values / scale) + zero, bottom, top)
        error = float(np.square((levels - zero) * scale - values).mean())
        if error < least:
            best, least = candidate, error
    return best


def _session_with_outputs(path: Path, names: Sequence[str]) -> Any:
    """A session of the graph at `path` in which the values `names` can be fetched; writes no file."""
    model = load_graph(path)
    made = {name for node in model.graph.node for name in node.output}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name in made - known
    )
    return open_in_memory(model, path)


def open_in_memory(model: ModelProto, path: Path, *, in_order: bool = False) -> Any:
    """A session of a graph that is in no file; weights that are only named lie beside `path`.

    Args:
        in_order: nodes run in the graph's order; otherwise those behind which nothing comes may run last, and
            keep what they read until then.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if outside := [tensor.name for tensor in model.graph.initializer if tensor.data_location == EXTERNAL]:
        # A graph in memory has no folder, and the weights may lie behind links: they are handed over.
        weights = {tensor.name: tensor for tensor in load_whole(path).graph.initializer}
        values = [numpy_helper.to_array(weights[name]) for name in outside]
        held = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in values]
        options.add_external_initializers(outside, held)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
