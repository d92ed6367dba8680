from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import DataConfig, SamplingConfig
from tunekit.diffusion.metrics import psnr_db, relative_error
from tunekit.errors import ArtifactError, ChainError, ModelError
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.paths import resolve, under, unmatched
from tunekit.passes.providers import gpu_answers
from tunekit.passes.quantize import Quantize
from tunekit.passes.quantize_onnx import SPARED
from tunekit.runtime import generate_pixels, open_runtime

FAMILY, SDXL = families.get("sd15"), families.get("sdxl")
PROMPTS = ("a cat", "a dog")
# Lowest signal-to-noise ratio of the tiny model's output. Random weights are harder on rounding than
# trained ones: a trained 11M U-Net has 44 dB where this has 34.
LEAST_SQNR_DB = {"weight_only": 30, "dynamic": 29, "static": 15}
LEAST_SQNR_DB_TORCH = {"int8": 30, "int4": 10, "nf4": 10}


def quantized(source: Path, folder: Path, *, family: str = "sd15", **settings: Any) -> Artifact:
    return run_chain(
        [Quantize(**settings)],
        open_artifact(source, family=family),
        Context(
            run_dir=folder / "run",
            prompts=PROMPTS,
            sampling=SamplingConfig(steps=6),
            device="cpu",
            say=lambda line: None,
        ),
    )


def draw(source: Artifact | Path, family: str = "sd15", **options: Any) -> torch.Tensor:
    runtime = open_runtime(source, family=family, device="cpu", **options)
    return generate_pixels(runtime, PROMPTS, SamplingConfig(steps=3), seeds=[0, 1])


# Torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_torch_model_gets_small_and_stays_near(scheme: str, tiny_source: Path, tmp_path: Path):
    result = quantized(tiny_source, tmp_path, scheme=scheme)
    metrics = result.lineage[-1].metrics
    assert metrics["sqnr_db"] > LEAST_SQNR_DB_TORCH[scheme]
    assert metrics["relative_error"] == pytest.approx(10 ** (-metrics["sqnr_db"] / 20), rel=1e-3)
    weights = [folder / "unet" / layers.WEIGHTS for folder in (Path(result.source), tiny_source)]
    sizes = [path.stat().st_size for path in weights]
    assert sizes[0] < {"int8": 0.33, "int4": 0.22, "nf4": 0.22}[scheme] * sizes[1]
    denoiser = FAMILY.denoiser(FAMILY.load(result.source))
    kinds = {
        type(denoiser.get_submodule(name)) for name in ("conv_in", "conv_out", "time_embedding.linear_1")
    }
    assert kinds == {torch.nn.Conv2d, torch.nn.Linear}  # kept
    assert isinstance(denoiser.mid_block.resnets[0].conv1, layers.QuantConv2d)
    count = sum(isinstance(module, layers.QuantLinear | layers.QuantConv2d) for module in denoiser.modules())
    assert metrics["quantized_layers"] == count > 50


@pytest.mark.each_family
def test_every_family_keeps_what_it_knows_to_be_sensitive(
    family: Any, tiny_sources: Callable[[str], Path], tmp_path: Path
):
    result = quantized(tiny_sources(family.name), tmp_path, family=family.name)
    metrics, details = result.lineage[-1].metrics, result.lineage[-1].details
    print(f"{family.name}: {metrics['sqnr_db']:.1f} dB, kept {details['kept']}")
    assert metrics["sqnr_db"] > LEAST_SQNR_DB_TORCH["int8"]
    assert details["kept"] == list(family.facts.denoiser.sensitive)
    denoiser = family.denoiser(family.load(result.source))
    packed = [name for name, module in denoiser.named_modules() if hasattr(module, "packed")]
    assert packed and not any(layers.under(name, denoiser, details["kept"]) for name in packed)


def test_the_runtime_draws_with_packed_weights(tiny_source: Path, tmp_path: Path):
    result = quantized(tiny_source, tmp_path, scheme="int8", keep=[])
    assert isinstance(FAMILY.denoiser(FAMILY.load(result.source)).conv_in, layers.QuantConv2d)
    assert psnr_db(draw(result), draw(tiny_source)) > 30


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"mode": "dynamic"}, "int8_dynamic"),
        ({"mode": "dynamic", "rotate": True}, "int8_rotated"),
        ({"scheme": "int4_svd"}, "int4_svd"),
        ({"scheme": "fp8"}, "fp8"),
        ({"scheme": "fp8", "mode": "dynamic"}, "fp8_dynamic"),
    ],
)
def test_other_packings_are_saved_and_opened_again(
    settings: dict[str, Any],
    kind: str,
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("tunekit.passes.quantize.no_fp8", lambda: None)
    result = quantized(tiny_source, tmp_path, **settings)
    metrics = result.lineage[-1].metrics
    print(kind, metrics["sqnr_db"])
    assert metrics["sqnr_db"] > {"int4_svd": 12, "fp8": 17, "fp8_dynamic": 15}.get(kind, 25)
    layer = FAMILY.denoiser(FAMILY.load(result.source)).mid_block.resnets[0].conv1
    again = FAMILY.denoiser(FAMILY.load(result.source)).half().mid_block.resnets[0].conv1
    assert layer.scheme == again.scheme == kind
    for name in layers.packed_names(layer):  # neither rounded nor widened
        assert torch.equal(layer.get_buffer(name), again.get_buffer(name))
    computed = metrics["quantized_layers"] if kind in layers.DYNAMIC else 0
    assert metrics["int8_computed_layers"] == computed


def test_each_packing_is_nearer_than_the_plain_one_of_as_many_bits():
    """The bundled model's own weights and one call: outliers are what random weights do not have."""
    runtime = open_runtime("builtin/emoji-64", device="cpu")
    whole = runtime.pipeline.unet
    told = runtime.conditioning(
        ["cat face", ""], SamplingConfig(steps=4, guidance=4.0).over(runtime.sampling)
    )
    latents = torch.randn(2, *runtime.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    kept, errors = list(FAMILY.facts.denoiser.sensitive), {}

    def call() -> torch.Tensor:
        return torch.cat([runtime.denoise(latents, torch.tensor([at, at]), told) for at in (900, 300)])

    wanted = call()
    kinds: tuple[layers.Scheme, ...] = ("int8", "int8_dynamic", "int8_rotated", "nf4", "int4", "int4_svd")
    for kind in kinds:
        runtime.pipeline.unet = copy.deepcopy(whole)
        layers.quantize(runtime.pipeline.unet, kind, keep=kept)
        errors[kind] = relative_error(call(), wanted)
    print({kind: f"{found:.4f}" for kind, found in errors.items()})
    assert errors["int8_rotated"] < 0.95 * errors["int8_dynamic"]
    assert errors["int4_svd"] < 0.7 * min(errors["int4"], errors["nf4"])


def test_a_rotation_leaves_the_product_as_it_is():
    random = torch.Generator().manual_seed(0)
    for channels, order in ((256, 256), (320, 64), (96, 16), (6, 1)):
        assert layers.rotation_order(channels) == order
        x, weight = (torch.randn(5, channels, generator=random, dtype=torch.float64) for _ in range(2))
        turned = layers.rotated(x, 1)
        assert torch.allclose(turned @ layers.rotated(weight, 1).T, x @ weight.T, atol=1e-9)
        assert torch.allclose(layers.rotated(turned, 1), x, atol=1e-9)
    spike = torch.zeros(1, 256)
    spike[0, 7] = 16.0
    assert float(layers.rotated(spike, 1).abs().max()) == 1.0
    assert torch.allclose(
        layers.rotated(torch.ones(1, 256), 1), torch.ones(1, 256)
    )  # nor does a mean stick out


def test_without_bitsandbytes_nothing_starts(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ChainError, match=r"bitsandbytes.*install .*\[quant\]"):
        quantized(tiny_source, tmp_path, scheme="nf4")
    assert not (tmp_path / "run").exists()


def test_other_parts_of_a_torch_model_are_refused(tiny_source: Path, tmp_path: Path):
    with pytest.raises(ChainError, match="of a torch model only the unet can be quantized"):
        quantized(tiny_source, tmp_path, components=["vae"])


# ONNX ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("quantized")
    signed = ["conv_in", "up_blocks.-1"]
    return {
        "weight_only": quantized(tiny_onnx, folder, mode="weight_only", components=PARTS),
        "dynamic": quantized(tiny_onnx, folder, mode="dynamic", components=PARTS),
        "static": quantized(tiny_onnx, folder, samples=8, components=PARTS, keep=SENSITIVE),
        "signed": quantized(tiny_onnx, folder, target="tensorrt", samples=8, keep=signed, components=PARTS),
    }


PARTS = ["unet", "vae_encoder", "vae_decoder"]
SENSITIVE = list(FAMILY.facts.denoiser.sensitive)
MODES = ["weight_only", "dynamic", "static", "signed"]


def graph(artifact: Artifact, component: str = "unet") -> onnx.GraphProto:
    return onnx.load(Path(artifact.source, component, "model.onnx")).graph


@pytest.mark.parametrize("mode", MODES)
def test_an_onnx_model_gets_small_and_stays_near(mode: str, results: dict[str, Artifact], tiny_onnx: Path):
    result = results[mode]
    metrics = result.lineage[-1].metrics
    assert metrics["sqnr_db"] > LEAST_SQNR_DB.get(mode, 15)
    assert result.size_bytes == metrics["size_bytes"] < 0.35 * open_artifact(tiny_onnx).size_bytes
    components = {row["component"]: row for row in result.lineage[-1].details["components"]}
    assert list(components) == PARTS
    assert all(row["size_bytes"] < 0.5 * row["size_bytes_before"] for row in components.values())
    assert all(
        metrics[f"relative_error_{name}"] == row["relative_error"] > 0 for name, row in components.items()
    )
    assert metrics["relative_error"] == components["unet"]["relative_error"]
    assert {row["mode"] for name, row in components.items() if name != "unet"} == {"weight_only"}
    assert (metrics["int8_computed_layers"] > 0) == (mode != "weight_only")
    noted = json.loads(Path(result.source, "unet", "config.json").read_text())
    static = {"activations": "uint8", "target": "cpu"}
    signed = {"activations": "int8", "target": "tensorrt"}
    activations = {"static": static, "signed": signed}.get(mode, {})
    own = "static" if mode == "signed" else mode
    assert noted["quantization"] == {"scheme": "int8", "mode": own, **activations}


@pytest.mark.parametrize("mode", MODES)
def test_the_folder_is_whole_and_draws(mode: str, results: dict[str, Artifact], tiny_onnx: Path):
    result = results[mode]
    files = {path.relative_to(tiny_onnx).as_posix() for path in tiny_onnx.rglob("*") if path.is_file()}
    assert {
        path.relative_to(result.source).as_posix()
        for path in Path(result.source).rglob("*")
        if path.is_file()
    } == files
    assert psnr_db(draw(result), draw(tiny_onnx)) > (20 if mode in ("static", "signed") else 30)


@pytest.mark.parametrize("mode", ["weight_only", "static", "signed"])
def test_openvino_reads_the_same_file_as_well(mode: str, results: dict[str, Artifact], tiny_onnx: Path):
    pytest.importorskip("openvino")
    wanted = draw(tiny_onnx)
    by_openvino = psnr_db(draw(results[mode], provider="openvino"), wanted)
    assert by_openvino > psnr_db(draw(results[mode]), wanted) - 3


def test_matrix_products_of_an_onnx_model_in_4_bits(tiny_onnx: Path, tmp_path: Path):
    """OpenVINO, where it is installed, has read the file, too, and computed the same."""
    made = quantized(tiny_onnx, tmp_path, scheme="int4", keep=["conv_in", "mid_block"])
    metrics = made.lineage[-1].metrics
    print(metrics)
    found = graph(made)
    kept = [
        tensor.name for tensor in found.initializer if "mid_block" in tensor.name and "_half" in tensor.name
    ]
    packed = [node for node in found.node if node.op_type == "MatMulNBits"]
    assert (
        kept and len(packed) > 10 and not any("mid_block" in name for node in packed for name in node.input)
    )
    assert metrics["sqnr_db"] > 15 and metrics["int8_computed_layers"] == 0
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in found.initializer}
    for node in packed:  # two weights a byte
        shape = {attribute.name: attribute.i for attribute in node.attribute}
        assert sizes[node.input[1]] == shape["N"] * -(-shape["K"] // 32) * 16
    assert psnr_db(draw(made), draw(tiny_onnx)) > 20
    with pytest.raises(ArtifactError, match="has no matrix products that could be stored in 4 bits"):
        quantized(tiny_onnx, tmp_path, scheme="int4", keep=["down_blocks", "mid_block", "up_blocks"])


def test_calibration_is_the_models_own_and_repeatable(
    results: dict[str, Artifact], tiny_onnx: Path, tmp_path: Path
):
    again = quantized(tiny_onnx, tmp_path, samples=8, components=PARTS, keep=SENSITIVE)
    assert again.hash == results["static"].hash


def test_what_a_model_sees_is_recorded_once(tiny_source: Path, tiny_onnx: Path, tmp_path: Path):
    """Whatever runs it: the same calls, and the same again in a chain."""
    context = Context(
        run_dir=tmp_path, family="sd15", device="cpu", prompts=PROMPTS, sampling=SamplingConfig(steps=4)
    )
    seen = {}
    for source in (tiny_source, tiny_onnx):
        artifact = open_artifact(source, family="sd15")
        with context.running(artifact) as runtime:
            seen[source] = context.calls(runtime, count=10)
            assert context.calls(runtime, count=10) is seen[source]
            assert len({float(times[0]) for _, times, _ in context.calls(runtime, count=3, steps=2)}) == 2
            assert len({float(times[0]) for _, times, _ in seen[source]}) == 4
    for one, other in zip(*seen.values(), strict=True):
        assert torch.equal(one[1], other[1]) and one[0].shape == (8, 4, 16, 16)  # 4 pictures, each twice
        for a, b in ((one[0], other[0]), *((value, other[2][key]) for key, value in one[2].items())):
            assert torch.allclose(a, b, atol=1e-3)


def test_captions_are_drawn_too(tiny_source: Path, pictures: Path, tmp_path: Path):
    data = DataConfig(path=str(pictures), resolution=64)
    context = Context(run_dir=tmp_path, family="sd15", device="cpu", prompts=PROMPTS, data=data)
    with context.running(open_artifact(tiny_source, family="sd15")) as runtime:
        calls = context.calls(runtime, count=4, steps=1)
        known = runtime.encode_prompt([*PROMPTS, "a disc number 0", "a disc number 1"])
    states = calls[0][2]["encoder_hidden_states"]
    assert torch.allclose(states[4:], known["encoder_hidden_states"], atol=1e-5)


def test_kept_layers_compute_in_floats(results: dict[str, Artifact]):
    for mode, kept, gone in (
        ("static", "conv_out", "up_blocks.1.resnets.0.conv1"),
        ("signed", "up_blocks.1.resnets.0.conv1", "conv_out"),
    ):
        found = graph(results[mode])
        makers = {output: node for node in found.node for output in node.output}
        convolutions = {
            node.input[1].removesuffix("_dequantized").removesuffix("_float"): node
            for node in found.node
            if node.op_type == "Conv"
        }

        def computes_in_int8(name: str, convolutions: Any = convolutions, makers: Any = makers) -> bool:
            made = makers.get(convolutions[f"unet.{name}.weight"].input[0])
            return made is not None and made.op_type == "DequantizeLinear"

        assert not computes_in_int8(kept) and computes_in_int8(gone)


def test_what_tensorrt_refuses_is_not_in_its_files(results: dict[str, Artifact]):
    for mode in ("weight_only", "signed"):
        found = graph(results[mode])
        assert not {node.op_type for node in found.node} & {"DynamicQuantizeLinear", "MatMulInteger"}
        assert not any(tensor.data_type == TensorProto.UINT8 for tensor in found.initializer)
        quantizing = {"DequantizeLinear"}
        int8 = {
            tensor.name
            for tensor in found.initializer
            if tensor.data_type == TensorProto.INT8 and tensor.dims
        }
        assert all(node.op_type in quantizing for node in found.node if set(node.input) & int8)


def test_a_model_with_two_text_encoders(tiny_onnxs: Callable[[str], Path], tmp_path: Path):
    source = tiny_onnxs("sdxl")
    result = quantized(source, tmp_path, family="sdxl", samples=8, keep=list(SDXL.facts.denoiser.sensitive))
    metrics = result.lineage[-1].metrics
    print(f"sdxl: {metrics['sqnr_db']:.1f} dB")
    assert metrics["sqnr_db"] > 11  # twice as many layers as SD 1.x's smallest, all with random weights
    rows = {row["component"]: row for row in result.lineage[-1].details["components"]}
    assert rows["unet"]["computed"] > 50
    assert {name for name, row in rows.items() if row["mode"] == "fp16"} == set(rows) - {"unet"}
    # What the family knows to be sensitive is stored in int8 and computed in floats.
    kept = {f"unet.add_embedding.linear_{index}.weight" for index in (1, 2)}
    quantizers = [node for node in graph(result).node if node.op_type == "QuantizeLinear"]
    users = {node.input[1]: node for node in graph(result).node if node.op_type in ("Gemm", "MatMul")}
    for name in kept:
        feeder = users[f"{name}_float"].input[0]
        assert not any(feeder.startswith(node.output[0].removesuffix("_q")) for node in quantizers)
    assert psnr_db(draw(result, "sdxl"), draw(source, "sdxl")) > 15


def test_only_some_components(tiny_onnx: Path, tmp_path: Path):
    result = quantized(tiny_onnx, tmp_path, components=["text_encoder", "vae_decoder"])
    metrics = result.lineage[-1].metrics
    parts = [metrics["relative_error_text_encoder"], metrics["relative_error_vae_decoder"]]
    assert metrics["relative_error"] == max(parts) and min(parts) > 0 and max(parts) < 0.1
    assert (
        Path(result.source, "unet", "model.onnx").read_bytes()
        == (tiny_onnx / "unet" / "model.onnx").read_bytes()
    )
    with pytest.raises(ArtifactError, match=r"no component vea_decoder.*\n.*vae_decoder"):
        quantized(tiny_onnx, tmp_path, components=["vea_decoder"])


# What stays in floats --------------------------------------------------------------------------------------


def test_layers_are_measured_and_the_worst_stay_in_floats(tiny_onnx: Path, tmp_path: Path):
    result = quantized(tiny_onnx, tmp_path, samples=8)
    details = result.lineage[-1].details
    rows = details["sensitivity"]
    saved = json.loads(Path(result.source, "unet", "sensitivity.json").read_text())
    assert saved == {"version": 1, "layers": rows}
    others = {row["component"]: row["mode"] for row in details["components"][1:]}
    assert others == dict.fromkeys(["text_encoder", "vae_decoder", "vae_encoder"], "fp16")
    assert result.size_bytes < 0.4 * open_artifact(tiny_onnx).size_bytes
    errors = [row["layer_error"] for row in rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0 and len(rows) > 50
    assert sum(row["work"] for row in rows) == pytest.approx(1)
    floats = [row for row in rows if row["computed_in"] == "float"]
    assert 0 < sum(row["work"] for row in floats) <= SPARED
    convolutions = {node.input[1]: node for node in graph(result).node if node.op_type == "Conv"}
    makers = {output: node.op_type for node in graph(result).node for output in node.output}
    for row in rows:
        kind = "float" if row["computed_in"] == "float" else "dequantized"
        if "conv" in row["layer"]:
            node = convolutions[f"unet.{row['layer']}.weight_{kind}"]
            assert kind == "float" or makers[node.input[0]] == "DequantizeLinear"
    named = quantized(tiny_onnx, tmp_path, samples=8, keep=SENSITIVE)
    assert result.lineage[-1].metrics["sqnr_db"] > named.lineage[-1].metrics["sqnr_db"]


def test_as_few_layers_as_a_psnr_takes(tiny_onnx: Path, tmp_path: Path):
    tries = {}
    for psnr in (10.0, 30.0):
        details = (
            quantized(tiny_onnx, tmp_path, samples=8, minutes=0.03, keep={"psnr": psnr}).lineage[-1].details
        )
        tries[psnr] = {row["layers"]: row["psnr_db"] for row in details["pictures"]}
        floats = [row for row in details["sensitivity"] if row["computed_in"] == "float"]
        assert len(floats) == min(count for count, found in tries[psnr].items() if found >= psnr)
    assert set(tries[10.0]) == {0}
    with pytest.raises(ArtifactError, match=r"psnr: 149} cannot be met: with \d+ of \d+ layers .* dB"):
        quantized(tiny_onnx, tmp_path / "never", samples=8, minutes=0.03, keep={"psnr": 149})
    assert not list((tmp_path / "never" / "run").glob("*-quantize-*"))


def test_where_time_is_short_modules_are_measured_together(tiny_onnx: Path, tmp_path: Path):
    result = quantized(tiny_onnx, tmp_path, samples=8, minutes=1e-6, keep={"share": 0.4})
    rows = result.lineage[-1].details["sensitivity"]
    assert {row["layer"] for row in rows} == {"unet"} or len(rows) < 10
    assert sum(row["work"] for row in rows) == pytest.approx(1)


def test_a_runtime_that_computes_garbage_is_named(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    openvino = pytest.importorskip("tunekit.runtime.openvino")
    run = openvino.OpenVinoGraph.run

    def shuffled(graph: Any, feeds: Any) -> Any:
        return {name: np.flip(value, -1).copy() for name, value in run(graph, feeds).items()}

    monkeypatch.setattr(openvino.OpenVinoGraph, "run", shuffled)
    with pytest.raises(ArtifactError, match=r"unet runs in openvino and gives garbage .*onnxruntime"):
        quantized(tiny_onnx, tmp_path, mode="weight_only")
    assert not list((tmp_path / "run").glob("*-quantize-*"))
    # Nothing that OpenVINO is to run, and what is to run it is not here.
    made = quantized(tiny_onnx, tmp_path, mode="weight_only", target="tensorrt")
    if not gpu_answers():
        assert made.lineage[-1].details["unseen"].endswith("TensorRT is not here")


def test_without_prompts_there_is_nothing_to_measure_on(tiny_onnx: Path, tmp_path: Path):
    context = Context(run_dir=tmp_path / "run", device="cpu", say=lambda line: None)
    with pytest.raises(ChainError, match=r"no prompts to measure ranges on.*preview: {prompts"):
        run_chain([Quantize()], open_artifact(tiny_onnx, family="sd15"), context)
    assert not (tmp_path / "run").exists()


# Settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "dynamic", "samples": 8}, "samples: has no effect: mode is dynamic"),
        ({"target": "cuda", "ranges": "mse"}, "ranges: has no effect: mode is weight_only"),
        ({"mode": "dynamic", "keep": {"psnr": 40}}, "keep: has no effect: mode is dynamic"),
        ({"keep": ["conv_in"], "minutes": 2}, "minutes: has no effect: keep names the layers"),
        ({"target": "tensorrt", "activations": "uint8"}, "activations: uint8 is not what target tensorrt"),
        ({"keep": {"psnr": 40, "share": 0.1}}, "takes either psnr"),
        ({"samples": 2}, "samples: must be at least 4"),
        ({"mode": "dynamic", "activations": "int8"}, "activations: has no effect"),
        ({"mode": "weight_only", "reduce_range": True}, "reduce_range: has no effect"),
        ({"group": 64}, "group: has no effect"),
        ({"rotate": True}, "rotate: has no effect: mode is not dynamic"),
        ({"scheme": "int4", "group": 9}, "group: must be a multiple of 2"),
        ({"scheme": "int5"}, "scheme"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ChainError, match=message):
        parse_chain([{"quantize": settings}])


@pytest.mark.parametrize(
    ("settings", "format", "message"),
    [
        ({"mode": "static"}, "torch", "has mode static, which is for ONNX"),
        (
            {"mode": "dynamic", "scheme": "int4"},
            "torch",
            "has mode dynamic, which is for int8 and fp8, and scheme int4",
        ),
        ({"mode": "dynamic", "scheme": "fp8", "rotate": True}, "torch", "sets rotate, which is for int8"),
        ({"mode": "dynamic", "rotate": True}, "onnx", "sets rotate, which is for torch"),
        ({"scheme": "int4_svd"}, "onnx", "has scheme int4_svd, which is for torch"),
        ({"scheme": "int4", "mode": "static"}, "onnx", "has mode static, which is for int8, and scheme int4"),
        ({"scheme": "int4", "group": 48}, "onnx", "has group 48; an ONNX model takes 16, 32"),
        ({"scheme": "int4", "target": "tensorrt"}, "onnx", "has scheme int4, which TensorRT does not read"),
    ],
)
def test_what_a_format_cannot_have_is_refused(settings: dict[str, Any], format: str, message: str):
    with pytest.raises(ChainError, match=message):
        check_chain(parse_chain([{"quantize": settings}]), format)


@pytest.mark.parametrize(
    ("capability", "why"), [(None, "there is none here"), ((8, 6), "the RTX 3060 does not")]
)
def test_fp8_is_for_cards_that_compute_in_it(
    capability: tuple[int, int] | None, why: str, monkeypatch: pytest.MonkeyPatch
):
    if capability is not None:
        card = SimpleNamespace(torch_device="cuda:0", title="RTX 3060")
        monkeypatch.setattr("tunekit.hardware.probe", lambda device: card)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    elif torch.cuda.is_available():
        pytest.skip("there is a card")
    chain = parse_chain([{"quantize": {"scheme": "fp8", "mode": "dynamic"}}])
    with pytest.raises(
        ChainError, match=rf"compute in 8-bit floats .*, and {why}; take scheme int8"
    ) as caught:
        check_chain(chain, "torch")
    assert len(str(caught.value).splitlines()) == 1


def test_a_star_stands_for_any_letters():
    names = ["up_blocks.0.attn2", "up_blocks.0.attn2.to_k", "up_blocks.1.attn1", "mid_block.attn2"]
    assert [under(name, ["*.attn2"], names) for name in names] == [True, True, False, True]
    assert [under(name, ["up_blocks.-1.*"], names) for name in names] == [False, False, True, False]
    assert unmatched(["*.attn2", "up_blocks.*.to_k"], names) is None
    assert 'did you mean "attn1"' in (unmatched(["*.atn1"], names) or "")


def test_negative_indices_count_from_the_end():
    names = ["up_blocks.0.conv", "up_blocks.2.conv", "up_blocks.10.conv", "conv_in"]
    assert resolve("up_blocks.-1", names) == "up_blocks.10"
    assert resolve("up_blocks.-2.conv", names) == "up_blocks.9.conv"
    assert resolve("conv_in", names) == "conv_in"
    assert unmatched(["up_blocks.-1", "conv_in"], names) is None


# Nothing done, and weights elsewhere -----------------------------------------------------------------------


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of an ONNX folder without its record, its graphs rewritten by `change(model, path)`."""
    shutil.copytree(source, target)
    (target / "artifact.json").unlink()
    for path in sorted(target.glob("*/model.onnx")):
        change(onnx.load(path), path)
    return target


def test_success_with_nothing_done_is_an_error(results: dict[str, Artifact], tiny_onnx: Path, tmp_path: Path):
    with pytest.raises(ChainError, match="quantized already, by quantize"):  # in a chain of its own
        quantized(Path(results["weight_only"].source), tmp_path / "twice")

    def by_others(model: onnx.ModelProto, path: Path) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
                )
        onnx.save(model, path)

    halves = changed(tiny_onnx, tmp_path / "halves", by_others)
    with pytest.raises(ArtifactError, match=r"no weights that could be quantized: they are float16"):
        quantized(halves, tmp_path / "half", mode="weight_only")
    with pytest.raises(ArtifactError, match="nothing of the unet would be computed in int8"):
        every = ["down_blocks", "mid_block", "up_blocks", "time_embedding"]
        quantized(tiny_onnx, tmp_path, mode="dynamic", keep=every)
    with pytest.raises(ChainError, match=r'"up_blockz.9" names nothing: .* did you mean "up_blocks"'):
        quantized(tiny_onnx, tmp_path, mode="dynamic", keep=["up_blockz.9"])
    assert not any(path.is_dir() for path in tmp_path.glob("*/run/*"))


def one_file(model: onnx.ModelProto, path: Path, name: str) -> None:
    onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=64)


LAYOUTS: dict[str, Callable[[onnx.ModelProto, Path], None]] = {
    "weights.pb": lambda model, path: one_file(model, path, "weights.pb"),
    "model.onnx.data": lambda model, path: one_file(model, path, "model.onnx.data"),
    "one per tensor": lambda model, path: onnx.save(
        model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64
    ),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "links"])
def test_weights_lie_wherever_others_put_them(
    layout: str, results: dict[str, Artifact], tiny_onnx: Path, tmp_path: Path
):
    source = changed(tiny_onnx, tmp_path / "source", LAYOUTS.get(layout, LAYOUTS["weights.pb"]))
    if layout == "links":  # as the hub's cache has it
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
            path.rename(blobs / str(number))
            path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    result = quantized(source, tmp_path, samples=8, components=PARTS, keep=SENSITIVE)
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    for component in ("unet", "vae_decoder", "vae_encoder"):  # no stale weights beside the new ones
        assert sorted(path.name for path in Path(result.source, component).iterdir()) == [
            "config.json",
            "model.onnx",
        ]
    wanted = results["static"].lineage[-1].metrics
    made = result.lineage[-1].metrics
    assert made["sqnr_db"] == pytest.approx(wanted["sqnr_db"], abs=1e-3)
    assert not Path(result.source, "unet", "config.json").is_symlink()
    assert psnr_db(draw(result), draw(tiny_onnx)) > 20


def test_weights_that_are_missing_or_outside_are_refused(tiny_onnx: Path, tmp_path: Path):
    source = changed(tiny_onnx, tmp_path / "source", LAYOUTS["weights.pb"])
    weights = source / "unet" / "weights.pb"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(ModelError, match="too short"):
        quantized(source, tmp_path, mode="weight_only")
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights\.pb are missing"):
        quantized(source, tmp_path, mode="weight_only")
    graph = onnx.load(source / "unet" / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.pb"
    (source / "weights.pb").write_bytes(content)
    onnx.save(graph, source / "unet" / "model.onnx")
    with pytest.raises(ModelError, match="not in its folder"):
        quantized(source, tmp_path)
