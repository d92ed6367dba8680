"""Keeps angles in fp32 where OpenVINO computes in 16 bits.

A time of 999 is 1000 in bf16, and the angles that a network makes of it are off by as much as a radian; so
are those of positions in a large picture. torch embeds both in fp32. A hint such as bf16 asks OpenVINO to
round every value between layers, but for operations that carry a mark:
https://github.com/openvinotoolkit/openvino/blob/master/src/common/transformations/include/transformations/rt_info/disable_precision_conversion.hpp
"""

from __future__ import annotations

import math
from typing import Any

MARK = "precise_0"
"""Key of an operation's own facts, by which it stays in its type once the graph is in a file."""
ANGLES = ("Sin", "Cos")
ENDS = ("Parameter", "MatMul", "Convolution")
"""Where the way back from an angle ends: what a layer computes may be rounded."""
RESHAPING = ("Unsqueeze", "Squeeze", "Reshape")
"""Plugins write these as one Reshape, and lose the mark."""


def keep_angles(model: Any) -> int:
    """Marks all that leads to a sine or cosine, in place, so that it is computed in fp32; says how many.

    Operations that a plugin would write as others, and so forget the mark, are written so here. Angles in
    fp64 become fp32: plugins narrow them anyway, and then round them like everything else. The marks count
    once the model has been written to one of OpenVINO's files and read again.

    Args:
        model: an `openvino.Model`.
    """
    import openvino

    ends = [op for op in model.get_ordered_ops() if op.get_type_name() in ANGLES]
    way = _Way(openvino)
    for op in ends:
        was = op.get_output_element_type(0)
        op.input(0).replace_source_output(way.to(op.input_value(0)))
        way.mark(op)
        if was == openvino.Type.f64:
            op.validate_and_infer_types()
            users = op.output(0).get_target_inputs()
            wide = way.operations.convert(op.output(0), "f64")
            for user in users:
                user.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()
    return way.marked


class _Way:
    """The way from a graph's inputs to its angles, as it is written anew."""

    def __init__(self, openvino: Any) -> None:
        from openvino import opset13

        self.operations: Any = opset13
        self.floats = (openvino.Type.f32, openvino.Type.f64)
        self.wide = openvino.Type.f64
        self.done: dict[tuple[str, int], Any] = {}
        self.marked = 0

    def mark(self, op: Any) -> None:
        op.get_rt_info()[MARK] = ""
        self.marked += 1

    def to(self, value: Any) -> Any:
        """What stands for a value: itself, what made it being marked, or what is written instead."""
        op = value.get_node()
        key = op.get_name(), value.get_index()
        if key not in self.done:
            self.done[key] = self._to(value, op, op.get_type_name())
        return self.done[key]

    def _to(self, value: Any, op: Any, kind: str) -> Any:
        if value.get_element_type() not in self.floats:
            return value  # integers are not rounded
        if kind == "Constant":
            return self._constant(op)
        if kind in ENDS:
            return self._narrow(value)
        first = op.input_value(0)
        if kind == "Convert":
            if first.get_element_type() in self.floats:
                return self.to(first)
            return self._instead(op, self.operations.convert(first, "f32"))
        if kind in RESHAPING and (shape := _reshaped(value)) is not None:
            while first.get_node().get_type_name() in RESHAPING:  # plugins make one of two
                first = first.get_node().input_value(0)
            return self._instead(op, self.operations.reshape(self.to(first), shape, special_zero=False))
        if kind == "Broadcast":
            return self._repeated(op, first)
        for port in op.inputs():
            port.replace_source_output(self.to(port.get_source_output()))
        op.validate_and_infer_types()
        self.mark(op)
        return value

    def _repeated(self, op: Any, first: Any) -> Any:
        """A Broadcast as Tile, which stays one; products with ones are made a Broadcast again."""
        made, size = self.operations, op.input_value(1)
        rank, wanted = first.get_partial_shape().rank, size.get_partial_shape()
        if rank.is_dynamic or wanted.is_dynamic or wanted[0].get_length() != rank.get_length():
            return op.output(0)
        given = made.shape_of(first, size.get_element_type())
        times = made.maximum(made.divide(size, given), made.constant(1, size.get_element_type()))
        return self._instead(op, made.tile(self.to(first), times))

    def _instead(self, op: Any, made: Any) -> Any:
        made.set_friendly_name(op.get_friendly_name())
        self.mark(made)
        return made.output(0)

    def _constant(self, op: Any) -> Any:
        """A constant, such as frequencies, in a form that a file with weights in fp16 leaves exact.

        It is an integer of 31 bits and a power of two; plugins multiply them when they load the file.
        """
        import numpy as np

        values = op.get_data().astype(np.float64)
        largest = float(np.abs(values).max(initial=0.0))
        if largest == 0.0 or not np.isfinite(values).all() or (values == values.astype(np.float16)).all():
            return self._constant_of(values).output(0)
        scale = 2.0 ** (math.ceil(math.log2(largest)) - 30)
        whole = self.operations.convert(
            self.operations.constant(np.rint(values / scale).astype(np.int32)), "f32"
        )
        return self.operations.multiply(whole, self._constant_of(scale)).output(0)

    def _constant_of(self, values: Any) -> Any:
        import numpy as np

        return self.operations.constant(np.asarray(values, np.float32))

    def _narrow(self, value: Any) -> Any:
        if value.get_element_type() != self.wide:
            return value
        made = self.operations.convert(value, "f32")
        self.mark(made)
        return made.output(0)


def _reshaped(value: Any) -> list[int] | None:
    """A shape with at most one open dimension; None if more are open."""
    shape = value.get_partial_shape()
    if shape.rank.is_dynamic:
        return None
    sizes = [side.get_length() if side.is_static else -1 for side in shape]
    return sizes if sizes.count(-1) <= 1 else None
