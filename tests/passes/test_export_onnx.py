"""Torch to ONNX: the layout, the figures, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db, relative_error
from tunekit.errors import ChainError, MissingPackageError, ModelError
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.passes.export_onnx import check_inputs, export_component, graph_error
from tunekit.runtime import generate_pixels, open_runtime

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = {
    "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    "vae_encoder": (["sample"], ["latent_parameters"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
}


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_layout_and_names_are_those_that_other_programs_expect(tiny_onnx: Path) -> None:
    index = json.loads((tiny_onnx / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    # Tokenizers of transformers 4 know only these two files.
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tiny_onnx / "tokenizer").iterdir()}
    assert (tiny_onnx / "scheduler" / "scheduler_config.json").is_file()
    for component, (inputs, outputs) in SIGNATURES.items():
        graph = onnx.load(tiny_onnx / component / "model.onnx").graph
        assert [value.name for value in graph.input] == inputs
        assert [value.name for value in graph.output] == outputs
        assert index[component] == ["diffusers", "OnnxRuntimeModel"]
        assert not graph.value_info, "onnxruntime's quantizer trips over shapes in between"
    unet = {value.name: value for value in onnx.load(tiny_onnx / "unet" / "model.onnx").graph.input}
    assert axes(unet["sample"]) == ["batch", 4, "height", "width"]
    assert axes(unet["encoder_hidden_states"]) == ["batch", "sequence", 32]
    assert len(axes(unet["timestep"])) == 1
    text = onnx.load(tiny_onnx / "text_encoder" / "model.onnx").graph.input[0]
    assert text.type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert "time_cond_proj_dim" in json.loads((tiny_onnx / "unet" / "config.json").read_text())
    for vae in ("vae_encoder", "vae_decoder"):
        assert json.loads((tiny_onnx / vae / "config.json").read_text())["scaling_factor"] == 0.5


def test_graphs_do_not_tell_about_this_machine(tiny_onnx: Path) -> None:
    for file in tiny_onnx.glob("*/model.onnx"):
        content = file.read_bytes()
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content


def test_metrics_are_recorded(tiny_onnx: Path) -> None:
    artifact = Artifact.load(tiny_onnx)
    assert artifact.format == "onnx"
    assert artifact.step is not None
    metrics = artifact.step.metrics
    print({name: value for name, value in metrics.items() if "error" in name})
    assert 0 < metrics["relative_error"] <= 1e-4  # type: ignore[operator]
    assert metrics["size_bytes"] == artifact.size_bytes > 1_000_000
    assert metrics["nodes"] == sum(row["nodes"] for row in artifact.step.details["components"]) > 500
    assert {row["component"] for row in artifact.step.details["components"]} == set(SIGNATURES)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (3, 96, 40), (2, 8, 128)])
def test_components_equal_torch_at_other_sizes(
    tiny_source: Path, tiny_onnx: Path, batch: int, height: int, width: int
) -> None:
    torch_side, onnx_side = open_runtime(tiny_source, family="sd15"), open_runtime(tiny_onnx)
    texts = ["a red cat", "the moon", ""][:batch]
    known = torch_side.encode_prompt(texts)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, *torch_side.latent_shape(height, width), generator=generator)
    pixels = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    errors = {
        "text_encoder": relative_error(
            onnx_side.encode_prompt(texts)["encoder_hidden_states"], known["encoder_hidden_states"]
        ),
        "unet": max(
            relative_error(onnx_side.denoise(latents, step, known), torch_side.denoise(latents, step, known))
            for step in (999, 500, 1)
        ),
        "vae_encoder": relative_error(onnx_side.encode_image(pixels), torch_side.encode_image(pixels)),
        "vae_decoder": relative_error(onnx_side.decode(latents), torch_side.decode(latents)),
    }
    print(f"{batch} x {height} x {width}:", {name: f"{error:.2g}" for name, error in errors.items()})
    assert max(errors.values()) <= 1e-4


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_pictures_equal_torch(tiny_source: Path, tiny_onnx: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    sampling = SamplingConfig(steps=12, guidance=6.0, height=48, width=80)
    prompts = ["a red cat", "the moon", "a house"]
    eager, graphs = open_runtime(tiny_source, family="sd15"), open_runtime(tiny_onnx, provider=provider)
    wanted, drawn = (generate_pixels(side, prompts, sampling, seeds=[1, 2, 3]) for side in (eager, graphs))
    psnr = psnr_db(drawn, wanted)
    print(f"{provider}: {psnr:.1f} dB")
    assert psnr >= 60


def test_pruned_in_fp16(tiny_source: Path, tmp_path: Path) -> None:
    """Shapes that differ from the config, and half precision, in one export."""
    chain = parse_chain(
        [{"prune": {"ratio": 0.3, "importance": "magnitude"}}, {"export_onnx": {"dtype": "fp16"}}]
    )
    source = open_artifact(tiny_source, family="sd15")
    sampling = SamplingConfig(steps=4, height=32, width=32)
    made = run_chain(chain, source, Context(run_dir=tmp_path, prompts=("a cat",), sampling=sampling))
    assert made.path is not None
    assert made.step is not None
    print(made.step.metrics)
    assert 1e-6 < made.step.metrics["relative_error"] < 1e-2  # type: ignore[operator]
    graph = onnx.load(made.path / "unet" / "model.onnx").graph
    types = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 16}
    assert types == {onnx.TensorProto.FLOAT16}
    full = onnx.load(made.path / "vae_decoder" / "model.onnx").graph
    assert full.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    drawn = generate_pixels(open_runtime(made), ["a cat"], seeds=[1])
    wanted = generate_pixels(open_runtime(next(tmp_path.glob("01-prune-*"))), ["a cat"], seeds=[1])
    assert drawn.shape[-2:] == (32, 32)
    assert psnr_db(drawn, wanted) > 40


def test_weights_above_the_threshold_go_beside_the_graph(tmp_path: Path) -> None:
    family = families.get("sd15")
    component = family.export_components(family.tiny())[0]
    inputs = check_inputs(component)
    with torch.no_grad():
        expected = component.module(*inputs.values())
    folder = tmp_path / "large"
    export_component(component, folder, external_data_threshold=1000)
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx_data"}
    assert not onnx.load(folder / "model.onnx", load_external_data=False).graph.value_info
    assert (folder / "model.onnx_data").stat().st_size > 100_000
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert graph_error(moved / "model.onnx", inputs, expected) <= 1e-4
    # The check itself must be able to fail.
    assert graph_error(moved / "model.onnx", inputs, tuple(x * 1.01 for x in expected)) > 1e-3
    assert np.isnan(graph_error(moved / "model.onnx", inputs, tuple(x * float("nan") for x in expected)))


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"optimize\[1\] \(export_onnx\).*put quantize behind it"):
        run_chain(
            parse_chain(["quantize", "export_onnx"]),
            open_artifact("tiny", family="sd15"),
            Context(run_dir=tmp_path),
        )
    family = families.get("sd15")
    pipeline = family.tiny()
    layers.quantize(family.denoiser(pipeline), "int8")
    family.save(pipeline, tmp_path / "packed")
    source = open_artifact(tmp_path / "packed", family="sd15")
    with pytest.raises(ModelError, match="packed to few bits"):
        run_chain(parse_chain(["export_onnx"]), source, Context(run_dir=tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*export_onnx*")), "nothing half-written is left"


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingPackageError) as raised:
        run_chain(
            parse_chain(["export_onnx"]), open_artifact("tiny", family="sd15"), Context(run_dir=tmp_path)
        )
    assert str(raised.value) == 'ONNX export needs the package "onnxscript": pip install "tunekit[onnx]"'
