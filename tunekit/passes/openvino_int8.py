"""int8 in OpenVINO's graphs, by nncf: which layers there are, what it is asked for, what came of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunekit.errors import ArtifactError, ModelError
from tunekit.passes.paths import under

Feeds = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""Inputs of one call, by name."""
CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
WEIGHTED = (*CONVOLUTIONS, "MatMul")
UNPACKING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "FakeQuantize")
"""What may stand between a layer and the constant that its weights are stored in."""
FEW_BITS = ("i8", "u8", "i4", "u4")


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with weights.

    Attributes:
        name: of the operation in the graph.
        kind: of the operation.
        path: of its module, as far as the weights' name says it.
        stored: element type of the weights in the file.
        computed: whether its input is rounded to int8.
    """

    name: str
    kind: str
    path: str
    stored: str
    computed: bool


class Model:
    """A component of an OpenVINO model, to be quantized once; `graph` is the `openvino.Model`."""

    def __init__(self, path: Path) -> None:
        """Reads `openvino_model.xml`.

        Raises:
            ModelError: it cannot be read.
        """
        import openvino

        from tunekit.runtime.graph import first_line
        from tunekit.runtime.openvino import read

        self.path = path
        try:
            self.graph: Any = read(openvino.Core(), path)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot load it: {first_line(error)}", where=str(path)) from error

    def layers(self) -> list[Layer]:
        """All layers with weights, in the order of the graph."""
        return [
            Layer(
                name=op.get_friendly_name(),
                kind=op.get_type_name(),
                path=_path(weights.get_friendly_name()),
                stored=weights.get_element_type().get_type_name(),
                computed=op.input_value(0).get_node().get_type_name() == "FakeQuantize",
            )
            for op in self.graph.get_ordered_ops()
            if op.get_type_name() in WEIGHTED and (weights := _constant(op)) is not None
        ]

    def modules(self, component: str) -> list[str]:
        """Paths of the modules that layers belong to, and of those around them, in the component."""
        found: dict[str, None] = {}
        for layer in self.layers():
            parts = layer.path.removeprefix(f"{component}.").split(".")
            found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return list(found)

    def stored(self) -> int:
        """How many layers have weights in few bits."""
        return sum(layer.stored in FEW_BITS for layer in self.layers())

    def computed(self) -> int:
        """How many layers compute in int8."""
        return sum(layer.computed for layer in self.layers())

    def quantize(
        self, method: str, *, module: str, keep: Sequence[str] = (), calls: Sequence[Feeds] = ()
    ) -> None:
        """Quantizes the graph in place.

        Args:
            method: "hybrid", "ptq" or "weight_only".
            module: name of the component, with which the weights' names begin.
            keep: paths of modules that do not compute in int8.
            calls: what ranges are measured on.

        Raises:
            ArtifactError: nothing that computes in floats now would do so in int8.
        """
        layers = self.layers()
        paths = [layer.path.removeprefix(f"{module}.") for layer in layers]
        kept = {layer.name for layer, path in zip(layers, paths, strict=True) if under(path, keep, paths)}
        able = CONVOLUTIONS if method == "hybrid" else WEIGHTED
        computing = {layer.name for layer in layers if layer.kind in able} - kept
        if method != "weight_only" and not computing:
            what = "convolutions" if method == "hybrid" else "layers"
            raise ArtifactError(
                f"the {module} has no {what} that may compute in int8, as method {method} asks",
                where=str(self.path),
                hint="keep less, or take method ptq or weight_only",
            )
        with _quiet():
            import nncf

            if method == "weight_only":
                self.graph = nncf.compress_weights(self.graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
                return
            if method == "hybrid":
                rest = nncf.IgnoredScope(names=sorted(computing), validate=False)
                self.graph = nncf.compress_weights(
                    self.graph, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=rest
                )
                # Products of two activations, as in attention, have no weights and stay floats, too.
                floats = {
                    op.get_friendly_name()
                    for op in self.graph.get_ops()
                    if op.get_type_name() in WEIGHTED and op.get_friendly_name() not in computing
                }
            else:
                floats = kept
            # nncf takes the mean of the calls' extremes, and clips what goes beyond: the same error in each
            # step, which adds up. The quickstart's merged model in hybrid has 36.2 dB so, and 39.3 with all.
            ranges = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
            self.graph = nncf.quantize(
                self.graph,
                nncf.Dataset(list(calls)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=max(1, len(calls)),
                ignored_scope=nncf.IgnoredScope(names=sorted(floats), validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges
                ),
            )


def _path(name: str) -> str:
    """Path of the module whose weights have this name."""
    return name.removesuffix("_compressed").removesuffix(".weight")


def _constant(op: Any) -> Any:
    """The constant that a layer's weights are stored in; None if they are computed."""
    for index in (1, 0) if op.get_type_name() == "MatMul" else (1,):
        node = op.input_value(index).get_node()
        while node.get_type_name() in UNPACKING:
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Constant":
            return node
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides nncf's bars and remarks; its errors are exceptions."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
            yield
    finally:
        logger.setLevel(level)
