"""TensorRT-RTX engines, built for cards that are not here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tunekit import families, install
from tunekit.artifacts import Artifact, Step
from tunekit.errors import ChainError, DeviceError, ModelError
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.build_tensorrt import BuildTensorrt, _input_shapes
from tunekit.runtime import open_runtime

needs_tensorrt = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("tensorrt_rtx"), reason='needs "tunekit[tensorrt]"'
)
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@needs_tensorrt
def test_one_engine_per_capability(tiny_onnx: Path, tmp_path: Path) -> None:
    chain = parse_chain(
        [{"build_tensorrt": {"devices": ["rtx-3060", "rtx-4090", "rtx-3090"], "batch": [1, 2, 3]}}]
    )
    made = run_chain(chain, Artifact.load(tiny_onnx), Context(run_dir=tmp_path))
    assert made.format == "tensorrt"
    assert made.path is not None
    for component in COMPONENTS:
        names = {path.name for path in (made.path / component).iterdir()}
        assert names == {"config.json", "sm86.engine", "sm89.engine"}
        assert all(path.stat().st_size > 10_000 for path in (made.path / component).glob("*.engine"))
    index = json.loads((made.path / "engines.json").read_text())
    assert index["engines"] == {"sm86": ["rtx-3060", "rtx-3090"], "sm89": ["rtx-4090"]}
    # With guidance, the denoiser has two rows per picture; latents are a quarter of the pixels.
    assert index["shapes"]["unet"]["sample"] == [[1, 4, 8, 8], [4, 4, 16, 16], [6, 4, 16, 16]]
    assert index["shapes"]["vae_encoder"]["sample"] == [[1, 3, 32, 32], [2, 3, 64, 64], [3, 3, 64, 64]]
    assert {path.name for path in made.path.iterdir()} >= {"model_index.json", "scheduler", "tokenizer"}
    assert made.step is not None
    print(made.step.details["engines"])
    assert made.step.metrics["engines"] == 8

    import torch

    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="NVIDIA RTX cards"):
            open_runtime(made)


@needs_tensorrt
def test_zeros_of_a_model_that_is_sparse_may_be_skipped(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is set for it, and the builder takes it for a card that is not here."""
    folder = shutil.copytree(tiny_onnx, tmp_path / "model")
    for graph in folder.glob("*/model.onnx"):  # one is enough
        if graph.parent.name != "unet":
            graph.unlink()
    dense = Artifact.load(folder, check=False)
    pruned = Step(kind="prune", artifact="pruned", settings={"sparsity": "2:4"})
    sparse = replace(dense, lineage=(pruned, *dense.lineage))
    import tensorrt_rtx

    flags: list[Any] = []
    real = tensorrt_rtx.Builder.create_builder_config

    def watched(builder: Any) -> Any:
        config = real(builder)
        flags.append(config)
        return config

    monkeypatch.setattr(tensorrt_rtx.Builder, "create_builder_config", watched)
    chain = parse_chain([{"build_tensorrt": {"devices": ["rtx-4090"], "batch": [1, 1, 1]}}])
    made = run_chain(chain, sparse, Context(run_dir=tmp_path / "run", say=lambda line: None))
    assert made.path is not None and (made.path / "unet" / "sm89.engine").stat().st_size > 10_000
    assert json.loads((made.path / "engines.json").read_text())["sparse"] is True
    assert flags[0].get_flag(tensorrt_rtx.BuilderFlag.SPARSE_WEIGHTS)


@pytest.mark.each_family
@needs_tensorrt
def test_it_builds_for_every_family(family: Any, tiny_onnxs: Callable[[str], Path], tmp_path: Path) -> None:
    source = Artifact.load(tiny_onnxs(family.name))
    assert source.model_path is not None
    graphs = {path.parent.name for path in source.model_path.glob("*/model.onnx")}
    assert family.facts.denoiser_name in graphs and len(graphs) > 3
    chain = parse_chain([{"build_tensorrt": {"devices": ["rtx-4090"], "batch": [1, 1, 3]}}])
    made = run_chain(chain, source, Context(run_dir=tmp_path, say=lambda line: None))
    assert made.path is not None and made.step is not None
    built = {path.parent.name: path.stat().st_size for path in made.path.glob("*/sm89.engine")}
    assert built.keys() == graphs and min(built.values()) > 10_000
    beside = {"scheduler", *(part.tokenizer for part in family.facts.encoders)}
    assert beside <= {path.name for path in made.path.iterdir()}
    print(family.name, {row["component"]: row["seconds"] for row in made.step.details["engines"]})


def test_shapes_of_a_model_with_two_text_encoders(tiny_onnxs: Callable[[str], Path]) -> None:
    (step,) = parse_chain([{"build_tensorrt": {"devices": ["rtx-4090"], "batch": [1, 1, 3]}}])
    assert isinstance(step, BuildTensorrt)
    names = ["text_encoder", "text_encoder_2", "unet"]
    shapes = step._shapes(families.get("sdxl"), tiny_onnxs("sdxl"), names)
    for encoder in names[:2]:
        assert shapes[encoder] == {"input_ids": [(1, 40), (1, 40), (3, 40)]}
    assert shapes["unet"] == {
        "sample": [(1, 4, 8, 8), (2, 4, 16, 16), (6, 4, 16, 16)],
        "encoder_hidden_states": [(1, 40, 80), (2, 40, 80), (6, 40, 80)],
        "text_embeds": [(1, 24), (2, 24), (6, 24)],
        "time_ids": [(1, 6), (2, 6), (6, 6)],
    }


def test_axes_are_as_long_as_what_the_encoders_give(tmp_path: Path) -> None:
    inputs = {"sample": ["batch", 4, "height", "width"], "states": ["batch", "words", 8], "ids": ["words", 3]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in inputs.items()]
    node = helper.make_node("Identity", ["sample"], ["out"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, inputs["sample"])
    onnx.save(helper.make_model(helper.make_graph([node], "unet", values, [out])), tmp_path / "model.onnx")
    axes = {"batch": (1, 2, 6), "height": (8, 16, 16), "width": (8, 8, 16)}
    fed = [
        {"sample": (rows, 4, height, 8), "states": (rows, 11, 8), "ids": (11, 3)}
        for rows, height in ((1, 8), (2, 16), (6, 16))
    ]
    assert _input_shapes(tmp_path / "model.onnx", axes, fed) == {
        "sample": [(1, 4, 8, 8), (2, 4, 16, 8), (6, 4, 16, 8)],
        "states": [(1, 11, 8), (2, 11, 8), (6, 11, 8)],
        "ids": [(11, 3)] * 3,
    }
    with pytest.raises(ModelError, match="input states has an axis 'words'; known are batch, height, width"):
        _input_shapes(tmp_path / "model.onnx", axes, [])


def test_shapes_are_those_that_a_family_gives_its_denoiser(
    family: Any, tiny_onnxs: Callable[[str], Path]
) -> None:
    """Whatever its axes are: pixels, tokens, or both of text and picture."""
    folder, name = tiny_onnxs(family.name), family.facts.denoiser_name
    (step,) = parse_chain([{"build_tensorrt": {"devices": ["rtx-4090"], "batch": [1, 1, 3]}}])
    assert isinstance(step, BuildTensorrt)
    shapes = step._shapes(family, folder, [name])[name]
    graph = onnx.load(folder / name / "model.onnx").graph
    dynamic = {
        value.name for value in graph.input if any(d.dim_param for d in value.type.tensor_type.shape.dim)
    }
    assert shapes.keys() == dynamic
    first = next(iter(shapes.values()))
    assert [shape[0] for shape in first] == [1, 2, 6]
    for value in graph.input:
        for low, high in zip(shapes.get(value.name, [()])[0], shapes.get(value.name, [()])[-1], strict=True):
            assert 0 < low <= high


def _folder_with(
    tiny_onnx: Path, folder: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto]
) -> Artifact:
    """A copy whose text encoder, the first component that is built, is a graph of these nodes."""
    shutil.copytree(tiny_onnx, folder)
    graph = helper.make_graph(
        nodes,
        "text_encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["batch", "sequence"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence"])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "text_encoder" / "model.onnx")
    return Artifact.load(folder, check=False)  # it is changed on purpose


@needs_tensorrt
@pytest.mark.parametrize("kind", ["bias", "dynamic"])
def test_nodes_it_cannot_take_are_named(tiny_onnx: Path, tmp_path: Path, kind: str) -> None:
    import numpy as np

    cast = helper.make_node("Cast", ["input_ids"], ["x"], "to_float", to=TensorProto.FLOAT)
    if kind == "bias":  # what onnxruntime's quantizer writes by default
        weights = [
            numpy_helper.from_array(np.arange(1, 2, dtype=np.int32), "bias"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
        ]
        nodes = [
            cast,
            helper.make_node("DequantizeLinear", ["bias", "scale"], ["b"], "the_bias"),
            helper.make_node("Add", ["x", "b"], ["last_hidden_state"], "add"),
        ]
        named = "DequantizeLinear"
    else:
        weights = []
        nodes = [
            cast,
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "the_dynamic_one"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["last_hidden_state"], "back"),
        ]
        named = "the_dynamic_one"
    artifact = _folder_with(tiny_onnx, tmp_path / "model", nodes, weights)
    chain = parse_chain([{"build_tensorrt": {"devices": ["rtx-3060"]}}])
    with pytest.raises(ModelError) as raised:
        run_chain(chain, artifact, Context(run_dir=tmp_path / "run"))
    print(raised.value)
    assert "TensorRT-RTX cannot read text_encoder" in str(raised.value)
    assert named in str(raised.value)
    assert "quantize: {target: tensorrt}" in str(raised.value)
    assert not list((tmp_path / "run").glob("*build_tensorrt*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": ["rtx-3061"]}, 'did you mean "rtx-3060"'),
        ({"devices": ["rx-7900-xtx"]}, "has no TensorRT: that is for NVIDIA cards"),
        ({"devices": []}, "at least 1 item"),
        ({}, "devices: is required"),
        ({"devices": ["rtx-3060"], "height": [64, 32, 64]}, "the smallest, the usual and the largest"),
    ],
)
def test_wrong_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ChainError) as raised:
        parse_chain([{"build_tensorrt": settings}], lambda index, key: "mine.yaml:7")
    assert words in str(raised.value)
    assert "mine.yaml:7" in str(raised.value)


@needs_tensorrt
def test_cards_it_builds_nothing_for_are_known_before_anything_runs() -> None:
    with pytest.raises(ChainError, match=r"builds nothing for h100 \(sm90\)"):
        check_chain(parse_chain([{"build_tensorrt": {"devices": ["h100"]}}]), "onnx")
    turing = [{"export_onnx": {}}, {"build_tensorrt": {"devices": ["t4"]}}]
    for settings in ({}, {"dtype": "fp16"}):
        turing[0] = {"export_onnx": settings}
        with pytest.raises(
            ChainError,
            match=r"nothing in fp32 for t4 \(sm75\); write `export_onnx: \{dtype: fp16, keep: \[\]\}`",
        ):
            check_chain(parse_chain(turing), "torch")
    turing[0] = {"export_onnx": {"dtype": "fp16", "keep": []}}
    assert check_chain(parse_chain(turing), "torch") == "tensorrt"


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ChainError) as raised:
        check_chain(parse_chain([{"build_tensorrt": {"devices": ["rtx-3060"]}}]), "onnx")
    message = str(raised.value)
    assert message.endswith(f'needs the package "tensorrt_rtx": {install.with_extra("tensorrt")}')
    assert "\n" not in message
