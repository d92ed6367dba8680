from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tunekit.errors import NonFiniteError
from tunekit.passes.onnx_int8 import FLAVOURS, Flavour, Graph, Layer, measure_ranges
from tunekit.passes.onnx_probe import Probe, measure_costs, sparing

DRAW = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return DRAW.normal(0, 0.2, shape).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table -> MatMul -> Gemm (with bias), and Conv -> Conv, both into one sum."""
    tensors = {
        "table.weight": weights(64, 32),
        "linear.weight": weights(32, 64),
        "gemm.weight": weights(48, 64),
        "gemm.bias": weights(48),
        "conv1.weight": weights(24, 8, 3, 3),
        "conv1.bias": weights(24),
        "conv2.weight": weights(48, 24, 3, 3),
        "small.weight": weights(4, 4),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Gather", ["table.weight", "ids"], ["embedded"], axis=0),
        helper.make_node("MatMul", ["embedded", "linear.weight"], ["wide"]),
        helper.make_node("Gemm", ["wide", "gemm.weight", "gemm.bias"], ["told"], transB=1),
        helper.make_node("Conv", ["picture", "conv1.weight", "conv1.bias"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "conv2.weight"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["seen"], keepdims=0),
        helper.make_node("Add", ["told", "seen"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 8, "h", "w"]),
    ]
    graph = helper.make_graph(
        nodes,
        "both",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 48])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    path = tmp_path_factory.mktemp("graphs") / "model" / "model.onnx"
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def feeds(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {"ids": draw.integers(0, 64, 5), "picture": draw.normal(0.3, 1, (5, 8, 12, 10)).astype(np.float32)}


def run(path: Path, seed: int = 9) -> np.ndarray:
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds(seed))[0]


def error(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def written(model: Path, tmp_path: Path, mode: str) -> Path:
    graph = Graph(model)
    found = graph.layers()
    if mode in ("uint8", "int8"):
        flavour = FLAVOURS["tensorrt" if mode == "int8" else "cpu"]
        ranges = measure_ranges(model, found, [feeds(seed) for seed in range(6)], signed=flavour.signed)
        graph.compute_static(found, ranges, flavour)
    elif mode == "dynamic":
        graph.compute_dynamic(found)
    else:
        graph.store(found, fold=mode == "folded")
    graph.save(tmp_path / mode / "model.onnx")
    return tmp_path / mode / "model.onnx"


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_layers_are_found_with_their_modules(model: Path):
    found = {layer.path: (layer.node.op_type, layer.axis) for layer in Graph(model).layers()}
    assert found == {
        "table": ("Gather", 0),
        "linear": ("MatMul", 1),
        "gemm": ("Gemm", 0),
        "conv1": ("Conv", 0),
        "conv2": ("Conv", 0),
    }


@pytest.mark.parametrize(
    ("mode", "most"),
    [("plain", 0.01), ("folded", 0.01), ("dynamic", 0.015), ("uint8", 0.025), ("int8", 0.025)],
)
def test_each_way_is_small_and_near(model: Path, tmp_path: Path, mode: str, most: float):
    path = written(model, tmp_path, mode)
    assert error(run(path), run(model)) < most
    stored = [
        tensor for tensor in onnx.load(path).graph.initializer if numpy_helper.to_array(tensor).size >= 1024
    ]
    assert len(stored) == 5 and all(tensor.data_type == TensorProto.INT8 for tensor in stored)


def test_what_each_way_is_made_of(model: Path, tmp_path: Path):
    assert operators(written(model, tmp_path, "plain")).count("DequantizeLinear") == 5
    folded = operators(written(model, tmp_path, "folded"))
    assert folded.count("Cast") == 5 and "DequantizeLinear" not in folded
    dynamic = operators(written(model, tmp_path, "dynamic"))
    assert dynamic.count("MatMulInteger") == 2 and "ConvInteger" not in dynamic
    static = onnx.load(written(model, tmp_path, "uint8")).graph
    zero_points = {t.name: t.data_type for t in static.initializer if t.name.endswith("_z")}
    assert set(zero_points.values()) == {TensorProto.UINT8}
    assert any(t.data_type == TensorProto.INT32 for t in static.initializer)  # onnxruntime wants int32 biases
    signed = onnx.load(written(model, tmp_path, "int8")).graph
    assert not any(
        t.data_type in (TensorProto.INT32, TensorProto.UINT8) for t in signed.initializer
    )  # TensorRT not
    assert all(not numpy_helper.to_array(t).any() for t in signed.initializer if t.name.endswith("_z"))


def test_onnxruntime_computes_static_layers_in_int8(model: Path, tmp_path: Path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    path = written(model, tmp_path, "uint8")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    done = operators(tmp_path / "optimized.onnx")
    assert done.count("QLinearConv") == 2 and "Conv" not in done
    assert "MatMulIntegerToFloat" in done and "MatMul" not in done
    assert done.count("DequantizeLinear") == 2  # the Convs' results; no weight is unpacked in a call


def test_openvino_reads_static_graphs_to_the_same_accuracy(model: Path, tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    wanted = run(model)
    for mode in ("uint8", "int8"):
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(written(model, tmp_path, mode)), "CPU", settings)
        (value,) = compiled(feeds(9)).values()
        assert error(value, wanted) < 0.025


@pytest.mark.parametrize("mode", ["plain", "int8"])
def test_tensorrt_rtx_parses_what_is_meant_for_it(model: Path, tmp_path: Path, mode: str):
    tensorrt = pytest.importorskip("tensorrt_rtx")
    logger = tensorrt.Logger(tensorrt.Logger.INTERNAL_ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(written(model, tmp_path, mode)))


def test_a_range_gives_up_outliers(model: Path):
    graph = Graph(model)
    found = [layer for layer in graph.layers() if layer.path == "conv1"]
    calls = [feeds(seed) for seed in range(4)]
    calls[0]["picture"][0, 0, 0, 0] = 1000.0
    low, high = measure_ranges(model, found, calls, signed=False, method="mse")["picture"]
    assert high < 400 and low < -1
    calls[0]["picture"][0, 0, 0, 0] = 0.0
    low, high = measure_ranges(model, found, calls, signed=False, method="mse")["picture"]
    assert 2 < high < 6
    assert list(model.parent.parent.glob(".calibration-*")) == []


def test_extremes_found_within_the_graph_are_those_of_the_values(model: Path):
    """And a value that is no number is found, though a maximum passes over it."""
    graph = Graph(model)
    layers = [layer for layer in graph.layers() if layer.computes]
    calls = [feeds(seed) for seed in range(3)]
    ranges = measure_ranges(model, layers, calls, signed=False)
    names = sorted(ranges)
    asked = onnx.load(model)
    made = {name for node in asked.graph.node for name in node.output} & set(names)
    asked.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made)
    session = onnxruntime.InferenceSession(asked.SerializeToString(), providers=["CPUExecutionProvider"])
    values = [dict(zip(made, session.run(list(made), call), strict=True)) | call for call in calls]
    for name in names:
        low = min(0.0, *(float(each[name].min()) for each in values))
        high = max(0.0, *(float(each[name].max()) for each in values))
        assert ranges[name] == (low, high)
    assert len(made) < len(names)  # the graph's inputs among them
    calls[1]["picture"][0, 0, 3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        measure_ranges(model, layers, calls, signed=False)


def test_seven_bits_stay_within_64(model: Path):
    graph = Graph(model)
    found = [layer for layer in graph.layers() if layer.path not in ("table", "gemm")]
    ranges = measure_ranges(model, found, [feeds(0)], signed=False)
    graph.compute_static(found, ranges, Flavour(), bits=7)
    values = [numpy_helper.to_array(t) for name, t in graph.initializers.items() if name.endswith("_int8")]
    assert len(values) == 3 and all(np.abs(value).max() == 63 for value in values)


def test_weights_beside_the_graph_are_read_and_calibrated(model: Path, tmp_path: Path):
    outside = tmp_path / "big" / "model.onnx"
    outside.parent.mkdir()
    onnx.save(
        onnx.load(model), outside, save_as_external_data=True, location="model.onnx_data", size_threshold=1024
    )
    path = written(outside, tmp_path, "uint8")
    assert error(run(path), run(model)) < 0.025
    assert not path.with_name("model.onnx_data").exists()  # small enough for one file now


def test_the_probe_rounds_what_the_written_graph_rounds(model: Path, tmp_path: Path):
    calls = [feeds(seed) for seed in range(4)]
    for flavour in (FLAVOURS["cpu"], FLAVOURS["tensorrt"]):
        graph = Graph(model)
        layers = graph.computable(graph.layers(), flavour)
        ranges = measure_ranges(model, layers, calls, signed=flavour.signed)
        probe = Probe(model, [layer.weight for layer in layers], ranges, flavour)
        assert np.allclose(probe.run((), feeds(9))[0], run(model), atol=1e-5)
        graph.compute_static(layers, ranges, flavour)
        graph.save(tmp_path / "one" / "model.onnx")
        wanted = run(tmp_path / "one" / "model.onnx")
        assert error(probe.run(range(len(layers)), feeds(9))[0], wanted) < 0.005
        work = probe.work(feeds(9))
        assert sum(work) == pytest.approx(1) and all(share > 0 for share in work)

        def made(rounded: Sequence[int], probe: Probe = probe) -> np.ndarray:
            return probe.run(rounded, feeds(9))[0]

        costs = measure_costs(layers, work, made, seconds=60)
        assert {cost.path for cost in costs} == {layer.path for layer in layers}
        assert all(cost.error > 0 for cost in costs)
        spared = sparing(costs, share=0.5)
        assert spared and sum(cost.share for cost in spared) <= 0.5 and sparing(costs, share=0.0) == []


def test_without_time_layers_of_a_module_are_measured_together():
    draw = np.random.default_rng(0).normal(size=8)
    paths = ["net.a.conv", "net.a.linear", "net.b.conv"]
    layers = [Layer(helper.make_node("Conv", [], []), path, 0, path) for path in paths]

    def made(rounded: Sequence[int]) -> np.ndarray:
        return draw + 0.1 * len(rounded)

    found = {}
    for seconds in (3.5, 2.5, 0.0):
        ticks = iter((0.0, 1.0))
        now = ticks.__next__
        costs = measure_costs(layers, [0.5, 0.2, 0.3], made, seconds=seconds, now=now)
        found[seconds] = {cost.path: (cost.layers, pytest.approx(cost.share)) for cost in costs}
    assert found[3.5] == {path: ((index,), [0.5, 0.2, 0.3][index]) for index, path in enumerate(paths)}
    assert found[2.5] == found[0.0] == {"net": ((0, 1, 2), 1.0)}


def test_what_time_there_is_goes_to_the_modules_that_cost_most():
    paths = [f"net.{block}.inner.{layer}" for block in "abcd" for layer in "xyz"]
    layers = [Layer(helper.make_node("Conv", [], []), path, 0, path) for path in paths]
    each = np.diag([0.5 if path == "net.c.inner.y" else 0.01 for path in paths])
    asked: list[Sequence[int]] = []

    def made(rounded: Sequence[int]) -> np.ndarray:
        asked.append(rounded)
        return np.ones(len(paths)) + each[:, list(rounded)].sum(axis=1)

    ticks = iter((0.0, 1.0))
    costs = measure_costs(layers, [1 / 12] * 12, made, seconds=9, now=ticks.__next__)
    assert costs[0].path == "net.c.inner.y" and costs[0].layers == (7,)
    assert [cost.path for cost in costs[1:4]] == [f"net.{block}.inner" for block in "abd"] and len(costs) == 6
    assert len(asked) == 1 + 4 + 3  # two calls are left, and no module has two layers
    assert sum(cost.share for cost in costs) == pytest.approx(1)
