"""What each layer costs when it is computed in int8: one graph in which every layer has a switch.

Behind a switch a layer's input, weight and result are rounded as `Graph.compute_static` would round them; the
arithmetic stays in floats, which gives the same but for the last bits. So any choice of layers is measured in
one session, and none has to be written and loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tunekit.passes.onnx_int8 import (
    PROTOBUF_LIMIT,
    Array,
    Feeds,
    Flavour,
    Graph,
    Layer,
    Range,
    open_in_memory,
    rounding,
)
from tunekit.runtime.onnx_files import weight_bytes

MOST_WEIGHTS = PROTOBUF_LIMIT // 2
"""Bytes of weights above which they are not rounded here, as the graph holds them a second time for it.
Nearly all of the error comes from activations (builtin/emoji-64: 35 dB from them, 49 dB from the weights)."""


@dataclass(frozen=True)
class Cost:
    """What one layer, or all layers below one path, cost in int8.

    Attributes:
        path: of the module.
        error: of what is made when only this is rounded, relative to its size.
        share: of the multiplications of all layers, 0 to 1.
        layers: numbers of the layers.
    """

    path: str
    error: float
    share: float
    layers: tuple[int, ...]


class Probe:
    """A float graph whose layers can be rounded one by one."""

    def __init__(
        self,
        path: Path,
        weights: Sequence[str],
        ranges: Mapping[str, Range],
        flavour: Flavour,
        *,
        bits: int = 8,
    ) -> None:
        """Builds the graph and opens it.

        Args:
            path: of the float graph.
            weights: names of the weights of the layers that get a switch; they are numbered in this order.
            ranges: see `measure_ranges`.
        """
        self._rounds_weights = weight_bytes(path) <= MOST_WEIGHTS
        self._graph = graph = Graph(path, weights=self._rounds_weights)
        self._flavour, self._bits = flavour, bits
        found = {layer.weight: layer for layer in graph.layers()}
        self.layers = [found[name] for name in weights]
        inner = graph.model.graph
        self.outputs = [output.name for output in inner.output]
        self._nodes: list[NodeProto] = []
        numbers = {id(layer.node): number for number, layer in enumerate(self.layers)}
        for node in graph.nodes:
            if id(node) in numbers:
                self._with_switch(numbers[id(node)], ranges)
            else:
                self._nodes.append(node)
        for number in range(len(self.layers)):
            inner.input.append(helper.make_tensor_value_info(f"switch_{number}", TensorProto.BOOL, []))
            inner.output.append(helper.make_tensor_value_info(f"size_{number}", TensorProto.INT64, []))
        del inner.node[:], inner.initializer[:]
        inner.node.extend(self._nodes)
        inner.initializer.extend(graph.initializers.values())
        self._session = open_in_memory(graph.model, path)
        del self._graph, self._nodes

    def run(self, rounded: Iterable[int], feeds: Feeds, *, more: Sequence[str] = ()) -> list[Array]:
        """The graph's outputs with these layers rounded, then the values named `more`."""
        chosen = set(rounded)
        switches = {f"switch_{number}": np.array(number in chosen) for number in range(len(self.layers))}
        values: list[Array] = self._session.run([*self.outputs, *more], {**feeds, **switches})
        return values

    def work(self, feeds: Feeds) -> list[float]:
        """Share of the multiplications that each layer has for these inputs."""
        asked = [f"size_{number}" for number in range(len(self.layers))]
        sizes = self.run((), feeds, more=asked)[len(self.outputs) :]
        work = [
            layer.weights / layer.channels * float(size)
            for layer, size in zip(self.layers, sizes, strict=True)
        ]
        return [one / sum(work) for one in work]

    # Building ----------------------------------------------------------------------------------------------

    def _with_switch(self, number: int, ranges: Mapping[str, Range]) -> None:
        layer, node = self.layers[number], self.layers[number].node
        if self._rounds_weights:
            node.input[1] = self._weight(layer, number)
        x, y = node.input[0], node.output[0]
        self._nodes += self._value(number, x, f"probe_x{number}", ranges[x])
        node.input[0] = f"probe_x{number}"
        self._nodes.append(node)
        if node.op_type == "Conv" and self._flavour.outputs:
            node.output[0] = f"{y}_exact"
            self._nodes += self._value(number, f"{y}_exact", y, ranges[y])
        self._nodes.append(helper.make_node("Size", [y], [f"size_{number}"]))

    def _weight(self, layer: Layer, number: int) -> str:
        name = f"probe_w{number}"
        self._constant(f"{name}_rounded", self._graph.rounded(layer, bits=self._bits))
        inputs = [f"switch_{number}", f"{name}_rounded", layer.weight]
        self._nodes.append(helper.make_node("Where", inputs, [name]))
        return name

    def _value(self, number: int, x: str, y: str, bounds: Range) -> list[NodeProto]:
        """Nodes that make `y`: the value `x`, rounded where the switch is on."""
        scale, zero = rounding(bounds, signed=self._flavour.signed)
        self._constant(f"{y}_s", np.array(scale, np.float32))
        self._constant(f"{y}_z", np.array(zero, np.int8 if self._flavour.signed else np.uint8))
        return [
            helper.make_node("QuantizeLinear", [x, f"{y}_s", f"{y}_z"], [f"{y}_q"]),
            helper.make_node("DequantizeLinear", [f"{y}_q", f"{y}_s", f"{y}_z"], [f"{y}_rounded"]),
            helper.make_node("Where", [f"switch_{number}", f"{y}_rounded", x], [y]),
        ]

    def _constant(self, name: str, value: Array) -> None:
        self._graph.initializers[name] = numpy_helper.from_array(value, name)


def measure_costs(
    layers: Sequence[Layer],
    work: Sequence[float],
    made: Callable[[Sequence[int]], Array],
    *,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> list[Cost]:
    """What layers cost, the dearest first.

    Where there is no time to look at each layer by itself, half of it goes to modules, and the other half to
    what is in those that cost most.

    Args:
        layers: of a probe.
        work: see `Probe.work`.
        made: gives what is made with these layers rounded, such as the latents at the end of a trajectory.
        seconds: that it may take, about.
    """
    started = now()
    exact = made(())
    each, size = now() - started, max(1e-30, float(np.linalg.norm(exact)))
    paths = [layer.path for layer in layers]

    def cost(path: str, numbers: tuple[int, ...]) -> Cost:
        error = float(np.linalg.norm(made(numbers) - exact)) / size
        return Cost(path, error, sum(work[number] for number in numbers), numbers)

    most = int(seconds / max(each, 1e-6))
    groups = _groups(paths, most=most if len(set(paths)) <= most else most // 2)
    found = [cost(path, numbers) for path, numbers in groups.items()]
    left = most - len(found)
    for _ in paths:
        inner = {one.path: _inside(one, paths) for one in found}
        able = [one for one in found if 1 < len(inner[one.path]) <= left]
        if not able:
            break
        dearest = max(able, key=lambda one: one.error)
        parts = inner[dearest.path]
        found.remove(dearest)
        found += [cost(path, numbers) for path, numbers in parts.items()]
        left -= len(parts)
    return sorted(found, key=lambda cost: -cost.error)


def sparing(costs: Sequence[Cost], *, share: float, least: float = 0.0) -> list[Cost]:
    """The costs that are best saved: of the dearest for their work, as many as hold `share` of all of it.

    Args:
        costs: of all layers.
        share: of the multiplications, at most.
        least: share of the whole squared error below which a layer is not worth it.
    """
    whole = sum(cost.error**2 for cost in costs)
    chosen, taken = [], 0.0
    for cost in by_worth(costs):
        if taken + cost.share <= share and cost.error**2 >= least * whole:
            chosen.append(cost)
            taken += cost.share
    return chosen


def by_worth(costs: Sequence[Cost]) -> list[Cost]:
    """Costs by how much error (errors of layers add up in squares) leaves for their work, the most first."""
    return sorted(costs, key=lambda cost: -(cost.error**2) / max(cost.share, 1e-9))


def _inside(cost: Cost, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Numbers by path, one step further down where that makes a difference: one path if nothing does."""
    deepest = max(paths[number].count(".") + 1 for number in cost.layers)
    found: dict[str, list[int]] = {}
    for depth in range(cost.path.count(".") + 2, deepest + 1):
        found = {}
        for number in cost.layers:
            found.setdefault(".".join(paths[number].split(".")[:depth]), []).append(number)
        if len(found) > 1:
            break
    return {path: tuple(numbers) for path, numbers in found.items()}


def _groups(paths: Sequence[str], *, most: int) -> dict[str, tuple[int, ...]]:
    """Numbers by path: each one's own, or shortened until there are `most` different ones."""
    deepest = max((path.count(".") + 1 for path in paths), default=1)
    for depth in range(deepest, 0, -1):
        found: dict[str, list[int]] = {}
        for number, path in enumerate(paths):
            found.setdefault(".".join(path.split(".")[:depth]), []).append(number)
        if len(found) <= most or depth == 1:
            break
    return {path: tuple(numbers) for path, numbers in found.items()}
