"""A file with a transformer or a U-Net alone, as it is published and found, and a base for the rest."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunekit import families, layers, workspace
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import ModelConfig, validate
from tunekit.errors import ArtifactError, ConfigError, MissingPackageError, ModelError
from tunekit.families import loading, single_file
from tunekit.memory.stored import Stored, stored
from tunekit.resources import Source
from tunekit.running import weights_of

Tensors = dict[str, Tensor]


# What each transformer is called where it was published, written out by hand. -----------------------------


def blocks(own: Tensors, name: str) -> list[int]:
    return sorted({int(key.split(".")[1]) for key in own if key.startswith(f"{name}.")})


def flux_names(own: Tensors) -> Tensors:
    """https://github.com/black-forest-labs/flux/blob/main/src/flux/model.py"""
    made: Tensors = {}

    def put(theirs: str, *ours: str) -> None:
        for leaf in ("weight", "bias"):
            parts = [own[f"{path}.{leaf}"] for path in ours if f"{path}.{leaf}" in own]
            if parts:  # Chroma lacks some
                made[f"{theirs}.{leaf}"] = torch.cat(parts)

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    embedders = {"time": "timestep", "vector": "text", "guidance": "guidance"}
    for theirs, ours in embedders.items():
        put(f"{theirs}_in.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        put(f"{theirs}_in.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    for i in blocks(own, "transformer_blocks"):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{a}.img_mod.lin", f"{b}.norm1.linear")
        put(f"{a}.txt_mod.lin", f"{b}.norm1_context.linear")
        put(f"{a}.img_attn.qkv", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v")
        put(f"{a}.txt_attn.qkv", f"{b}.attn.add_q_proj", f"{b}.attn.add_k_proj", f"{b}.attn.add_v_proj")
        put(f"{a}.img_attn.proj", f"{b}.attn.to_out.0")
        put(f"{a}.txt_attn.proj", f"{b}.attn.to_add_out")
        put(f"{a}.img_mlp.0", f"{b}.ff.net.0.proj")
        put(f"{a}.img_mlp.2", f"{b}.ff.net.2")
        put(f"{a}.txt_mlp.0", f"{b}.ff_context.net.0.proj")
        put(f"{a}.txt_mlp.2", f"{b}.ff_context.net.2")
        made[f"{a}.img_attn.norm.query_norm.scale"] = own[f"{b}.attn.norm_q.weight"]
        made[f"{a}.img_attn.norm.key_norm.scale"] = own[f"{b}.attn.norm_k.weight"]
        made[f"{a}.txt_attn.norm.query_norm.scale"] = own[f"{b}.attn.norm_added_q.weight"]
        made[f"{a}.txt_attn.norm.key_norm.scale"] = own[f"{b}.attn.norm_added_k.weight"]
    for i in blocks(own, "single_transformer_blocks"):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{a}.modulation.lin", f"{b}.norm.linear")
        put(f"{a}.linear1", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v", f"{b}.proj_mlp")
        put(f"{a}.linear2", f"{b}.proj_out")
        made[f"{a}.norm.query_norm.scale"] = own[f"{b}.attn.norm_q.weight"]
        made[f"{a}.norm.key_norm.scale"] = own[f"{b}.attn.norm_k.weight"]
    put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias") if "norm_out.linear.weight" in own else ():
        scale, shift = own[f"norm_out.linear.{leaf}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return made


def chroma_names(own: Tensors) -> Tensors:
    """https://github.com/lodestone-rock/flow/tree/master/src/models/chroma"""
    made = {key: value for key, value in own.items() if key.startswith("distilled_guidance_layer.")}
    for name in [name for name in made if ".layers." in name or ".norms." in name]:
        value = made.pop(name)
        name = name.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
        made[name.replace(".weight", ".scale") if ".norms." in name else name] = value
    return made | flux_names(own)


def flux2_names(own: Tensors) -> Tensors:
    """https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py"""
    made: Tensors = {}

    def put(theirs: str, *ours: str) -> None:
        made[f"{theirs}.weight"] = torch.cat([own[f"{path}.weight"] for path in ours])

    def attention(theirs: str, ours: str, added: str = "") -> None:
        made[f"{theirs}norm.query_norm.scale"] = own[f"{ours}.attn.norm_{added}q.weight"]
        made[f"{theirs}norm.key_norm.scale"] = own[f"{ours}.attn.norm_{added}k.weight"]

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    put("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1")
    put("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2")
    for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        put(f"{kind}.lin", f"{kind}.linear")
    for i in blocks(own, "transformer_blocks"):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{a}.img_attn.qkv", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v")
        put(f"{a}.txt_attn.qkv", f"{b}.attn.add_q_proj", f"{b}.attn.add_k_proj", f"{b}.attn.add_v_proj")
        put(f"{a}.img_attn.proj", f"{b}.attn.to_out.0")
        put(f"{a}.txt_attn.proj", f"{b}.attn.to_add_out")
        put(f"{a}.img_mlp.0", f"{b}.ff.linear_in")
        put(f"{a}.img_mlp.2", f"{b}.ff.linear_out")
        put(f"{a}.txt_mlp.0", f"{b}.ff_context.linear_in")
        put(f"{a}.txt_mlp.2", f"{b}.ff_context.linear_out")
        attention(f"{a}.img_attn.", b)
        attention(f"{a}.txt_attn.", b, "added_")
    for i in blocks(own, "single_transformer_blocks"):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{a}.linear1", f"{b}.attn.to_qkv_mlp_proj")
        put(f"{a}.linear2", f"{b}.attn.to_out")
        attention(f"{a}.", b)
    put("final_layer.linear", "proj_out")
    scale, shift = own["norm_out.linear.weight"].chunk(2)
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    return made


def sd3_names(own: Tensors) -> Tensors:
    """https://github.com/Stability-AI/sd3.5/blob/main/mmditx.py"""
    made: Tensors = {"pos_embed": own["pos_embed.pos_embed"]}

    def put(theirs: str, *ours: str, swapped: bool = False) -> None:
        for leaf in ("weight", "bias"):
            parts = [own[f"{path}.{leaf}"] for path in ours if f"{path}.{leaf}" in own]
            if swapped:
                parts = list(reversed(parts[0].chunk(2)))
            if parts:
                made[f"{theirs}.{leaf}"] = torch.cat(parts)

    put("x_embedder.proj", "pos_embed.proj")
    put("context_embedder", "context_embedder")
    for number, linear in (("0", "linear_1"), ("2", "linear_2")):
        put(f"t_embedder.mlp.{number}", f"time_text_embed.timestep_embedder.{linear}")
        put(f"y_embedder.mlp.{number}", f"time_text_embed.text_embedder.{linear}")
    count = len(blocks(own, "transformer_blocks"))
    for i in range(count):
        b = f"transformer_blocks.{i}"
        for a, norm, to, out, feed, added in (
            ("x_block", "norm1", "to_{}", "to_out.0", "ff", ""),
            ("context_block", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "added_"),
        ):
            a = f"joint_blocks.{i}.{a}"
            # The text's modulation in the last block is that of an output: it gives shift and scale alone.
            last = i == count - 1 and bool(added)
            put(f"{a}.adaLN_modulation.1", f"{b}.{norm}.linear", swapped=last)
            put(f"{a}.attn.qkv", *(f"{b}.attn.{to.format(of)}" for of in "qkv"))
            put(f"{a}.attn.ln_q", f"{b}.attn.norm_{added}q")
            put(f"{a}.attn.ln_k", f"{b}.attn.norm_{added}k")
            put(f"{a}.attn.proj", f"{b}.attn.{out}")
            put(f"{a}.mlp.fc1", f"{b}.{feed}.net.0.proj")
            put(f"{a}.mlp.fc2", f"{b}.{feed}.net.2")
        a = f"joint_blocks.{i}.x_block.attn2"
        put(f"{a}.qkv", *(f"{b}.attn2.to_{of}" for of in "qkv"))
        put(f"{a}.ln_q", f"{b}.attn2.norm_q")
        put(f"{a}.ln_k", f"{b}.attn2.norm_k")
        put(f"{a}.proj", f"{b}.attn2.to_out.0")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    return made


def krea2_names(own: Tensors) -> Tensors:
    """https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/utils.py, krea2_to_diffusers"""
    inside = {
        ".attn.to_q.": ".attn.wq.",
        ".attn.to_k.": ".attn.wk.",
        ".attn.to_v.": ".attn.wv.",
        ".attn.to_out.0.": ".attn.wo.",
        ".attn.to_gate.": ".attn.gate.",
        ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
        ".attn.norm_k.weight": ".attn.qknorm.knorm.scale",
        ".ff.": ".mlp.",
        ".norm1.weight": ".prenorm.scale",
        ".norm2.weight": ".postnorm.scale",
        ".scale_shift_table": ".mod.lin",
    }
    outside = {
        "img_in.": "first.",
        "final_layer.linear.": "last.linear.",
        "final_layer.norm.weight": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
        "time_embed.linear_1.": "tmlp.0.",
        "time_embed.linear_2.": "tmlp.2.",
        "time_mod_proj.": "tproj.1.",
        "txt_in.norm.weight": "txtmlp.0.scale",
        "txt_in.linear_1.": "txtmlp.1.",
        "txt_in.linear_2.": "txtmlp.3.",
        "text_fusion.": "txtfusion.",
        "transformer_blocks.": "blocks.",
    }
    made = {}
    for name, value in own.items():
        begin = next(ours for ours in outside if name.startswith(ours))
        there = outside[begin] + name.removeprefix(begin)
        for ours, theirs in inside.items():
            there = there.replace(ours, theirs)
        made[there] = value.flatten() if there.endswith(".mod.lin") else value
    return made


def zimage_names(own: Tensors) -> Tensors:
    """https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/ldm/lumina/model.py"""
    made = {}
    for name, value in own.items():
        if ".attention.to_" in name and ".to_out." not in name:
            path = name.partition(".attention.")[0]
            parts = [own[f"{path}.attention.to_{of}.weight"] for of in "qkv"]
            made[f"{path}.attention.qkv.weight"] = torch.cat(parts)
            continue
        for ours, theirs in (
            (".attention.to_out.0.", ".attention.out."),
            (".attention.norm_q.", ".attention.q_norm."),
            (".attention.norm_k.", ".attention.k_norm."),
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
        ):
            name = name.replace(ours, theirs)
        made[name] = value
    return made


NAMES: dict[str, Callable[[Tensors], Tensors]] = {
    "flux": flux_names,
    "chroma": chroma_names,
    "flux2": flux2_names,
    "sd3": sd3_names,
    "krea2": krea2_names,
    "zimage": zimage_names,
}


@pytest.fixture
def bases(tiny_sources: Callable[[str], Path]) -> Callable[[str], Path]:
    """`bases("flux")`: a folder of the tiny pipeline. Only to be read."""
    for name in NAMES:
        families.get(name)
    return tiny_sources


def own_of(name: str, base: Path) -> Tensors:
    facts = families.get(name).facts
    return safetensors.torch.load_file(base / facts.denoiser_name / "diffusion_pytorch_model.safetensors")


def other(own: Tensors) -> Tensors:
    """Weights that differ from the base's."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(value.shape, generator=generator) for name, value in own.items()}


def load(name: str, source: Source, dtypes: Any = torch.float32, *, pack: Any = "") -> Any:
    return families.get(name).load(source, dtypes, pack=pack)


def look(name: str, source: Source) -> list[ModelError]:
    return families.get(name).look(source)


def without_weights(base: Path, name: str, to: Path) -> Path:
    """The base as it may be found: its own denoiser is not read, so its weights need not be there."""
    copy = shutil.copytree(base, to)
    for file in (copy / families.get(name).facts.denoiser_name).glob("*.safetensors"):
        file.unlink()
    return copy


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [
        ("", torch.bfloat16),
        ("model.diffusion_model.", torch.float16),
        ("diffusion_model.", torch.float32),
    ],
)
def test_a_transformer_alone_is_read_exactly(
    name: str, prefix: str, dtype: torch.dtype, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = without_weights(bases(name), name, tmp_path / "base")
    facts = families.get(name).facts
    own = {key: value.to(dtype) for key, value in other(own_of(name, bases(name))).items()}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({prefix + key: value for key, value in NAMES[name](own).items()}, file)
    source = Source(str(file), base=str(base))
    assert look(name, source) == []
    pipeline = load(name, source, {facts.denoiser_name: dtype})
    made = getattr(pipeline, facts.denoiser_name).state_dict()
    assert made.keys() == own.keys()
    for key, value in own.items():
        assert made[key].dtype == dtype and torch.equal(made[key], value), key
    assert pipeline.vae.decoder.conv_in.weight.dtype == torch.float32
    assert open_artifact(file).format == "torch" and families.detect(source) == name


def as_it_is(made: Tensors) -> None:
    """No change."""


def write(name: str, base: Path, file: Path, change: Callable[[Tensors], object] = as_it_is) -> Tensors:
    """Writes the base's transformer as one file, with changes; returns its tensors by their names here."""
    own = other(own_of(name, base))
    made = {key: value.contiguous() for key, value in NAMES[name](own).items()}
    change(made)
    safetensors.torch.save_file(made, file)
    return own


def as_fp8(made: Tensors, *, ending: str | None, by_row: bool = False) -> Tensors:
    """Matrices in 8 bits, as ComfyUI writes them; returns what they stand for, by published name."""
    meant = dict(made)
    for name in [name for name in made if name.endswith(".weight") and made[name].dim() == 2]:
        value = made[name]
        if ending is None:
            made[name] = value.to(torch.float8_e4m3fn)
            meant[name] = made[name].float()
            continue
        scale = (value.abs().amax(dim=1, keepdim=True) if by_row else value.abs().max()) / 448
        made[name] = (value / scale).to(torch.float8_e4m3fn)
        layer = name.removesuffix(".weight")
        made[f"{layer}{ending}"] = scale.float()
        made[f"{layer}.{'scale_input' if ending == '.scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
        meant[name] = made[name].float() * scale.float()
    return meant


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("ending", "by_row"),
    [(None, False), (".scale_weight", False), (".weight_scale", True)],
)
def test_eight_bits_are_read_with_their_scales(
    name: str, ending: str | None, by_row: bool, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file, meant = tmp_path / "fp8.safetensors", Tensors()

    def change(made: Tensors) -> None:
        meant.update(as_fp8(made, ending=ending, by_row=by_row))
        if ending == ".scale_weight":
            made["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        if ending == ".weight_scale":
            first = next(key.removesuffix(ending) for key in made if key.endswith(ending))
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            made[f"{first}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)

    own = write(name, bases(name), file, change)
    source = Source(str(file), base=str(bases(name)))
    assert look(name, source) == []
    denoiser = families.get(name).facts.denoiser_name
    made = getattr(load(name, source), denoiser).state_dict()
    again = NAMES[name](made)
    assert again.keys() == meant.keys()
    for key, value in meant.items():
        assert torch.equal(again[key], value), key
    for key, value in own.items():  # and it is the matrix that was meant, but for 3 bits of mantissa
        assert (made[key] - value).abs().max() <= value.abs().max() / 16, key
    packed = getattr(load(name, source, pack="fp8"), denoiser)  # which stays as it is, rounded once
    for path, layer in packed.named_modules():
        if isinstance(layer, layers.QuantLinear):
            assert layer.scheme == "fp8" and torch.equal(
                layer.dequantize(torch.float32), made[f"{path}.weight"]
            )


@pytest.mark.parametrize("pack", ["", "fp8"])
def test_what_is_no_number_in_eight_bits_is_found(
    pack: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file, block = tmp_path / "fp8.safetensors", "single_blocks.0.linear1.weight"

    def change(made: Tensors) -> None:
        as_fp8(made, ending=None)
        made[block].view(torch.uint8)[1, 2] = 255

    write("flux", bases("flux"), file, change)
    with pytest.raises(ModelError, match=r"transformer: tensor single_transformer_blocks\.0.*holds NaN"):
        load("flux", Source(str(file), base=str(bases("flux"))), pack=pack)


def test_a_format_that_is_not_known_is_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"

    def change(made: Tensors) -> None:
        made["img_in.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        made["txt_in.scale_weight"] = torch.ones(3)
        made["gone.scale_weight"] = torch.ones(1)

    write("flux", bases("flux"), file, change)
    (problem,) = look("flux", Source(str(file), base=str(bases("flux"))))
    assert "img_in is in nvfp4" in problem.message and "txt_in.scale_weight is [3]" in problem.message
    assert "gone.weight is not there" in problem.message

    mark = {"img_in.comfy_quant": torch.ones(3, dtype=torch.uint8)}
    write("flux", bases("flux"), file, lambda made: made.update(mark))
    (problem,) = look("flux", Source(str(file), base=str(bases("flux"))))
    assert "what it says of its quantized layers" in problem.message


# GGUF -----------------------------------------------------------------------------------------------------


def write_gguf(made: Tensors, file: Path, kind: str, architecture: str = "flux") -> Tensors:
    """Matrices in a type of ggml, the rest in float32; returns what they stand for."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(str(file), architecture)
    quant = gguf.GGMLQuantizationType[kind]
    writer.add_array("some.words", ["a", "b"])
    meant: Tensors = {}
    for name, value in made.items():
        block = gguf.GGML_QUANT_SIZES[quant][0]
        own = quant if value.dim() == 2 and value.shape[1] % block == 0 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(value.numpy().astype(np.float32), own)
        writer.add_tensor(name, raw, raw_dtype=own)
        meant[name] = torch.from_numpy(np.array(gguf.quants.dequantize(raw, own)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0"])
def test_gguf_is_read(name: str, kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    base = bases(name)
    own = other(own_of(name, base))
    meant = write_gguf({key: value.contiguous() for key, value in NAMES[name](own).items()}, file, kind)
    source = Source(str(file), base=str(base))
    assert look(name, source) == [] and families.detect(source) == name
    assert open_artifact(file).format == "torch"
    pipeline = load(name, source)
    again = NAMES[name](pipeline.transformer.state_dict())
    for key, value in meant.items():
        assert torch.equal(again[key], value), key
    packed = load(name, source, pack="int8").transformer
    path = layers.block_linears(pipeline.transformer)[0]
    layer, plain = packed.get_submodule(path), pipeline.transformer.get_submodule(path).weight
    assert isinstance(layer, layers.QuantLinear)
    assert (layer.weight - plain).abs().max() <= plain.abs().max() / 250


def test_gguf_without_its_package_says_how_to_get_it(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    file = tmp_path / "model.gguf"
    write_gguf(NAMES["flux"](own_of("flux", bases("flux"))), file, "F32")
    for module in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"GGUF files need.*pip install") as caught:
        look("flux", Source(str(file), base=str(bases("flux"))))
    assert "gguf" in str(caught.value)


@pytest.mark.parametrize("cut", [0, 3, 8, 20, 40, 200, 2000, -1])
def test_a_gguf_that_is_cut(cut: int, bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(NAMES["flux"](own_of("flux", bases("flux"))), file, "F16")
    file.write_bytes(file.read_bytes()[:cut])
    (problem,) = look("flux", Source(str(file), base=str(bases("flux"))))
    assert type(problem) is ModelError and problem.where == str(file) and problem.hint


def test_a_gguf_of_a_type_that_is_not_known(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(NAMES["flux"](own_of("flux", bases("flux"))), file, "F16")
    raw = file.read_bytes()
    name = b"img_in.weight"
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    file.write_bytes(raw[:at] + struct.pack("<I", 250) + raw[at + 4 :])
    (problem,) = look("flux", Source(str(file), base=str(bases("flux"))))
    assert "1 of its tensors are of a type that cannot be read: number 250" in problem.message


def test_a_gguf_of_something_else(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf({"blk.0.attn_q.weight": torch.ones(4, 4)}, file, "F16", "llama")
    (problem,) = look("flux", Source(str(file), base=str(bases("flux"))))
    assert 'says "llama"' in problem.message and "this needs FLUX.1" in problem.message


QUIET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def fuzzed(tmp_path: Path) -> Path:
    """A place for a file, used again and again."""
    return tmp_path / "fuzzed.gguf"


@pytest.fixture
def gguf_bytes(bases: Callable[[str], Path], tmp_path: Path) -> bytes:
    file = tmp_path / "whole.gguf"
    write_gguf(NAMES["flux"](own_of("flux", bases("flux"))), file, "F16")
    return file.read_bytes()


@QUIET
@given(data=st.data())
def test_any_header_of_gguf_is_read_or_named(
    bases: Callable[[str], Path], gguf_bytes: bytes, fuzzed: Path, data: Any
) -> None:
    raw = bytearray(gguf_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 4000))
        if data.draw(st.booleans()):
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        else:
            raw[at : at + 1] = data.draw(st.binary(max_size=3))
    fuzzed.write_bytes(raw)
    problems = look("flux", Source(str(fuzzed), base=str(bases("flux"))))
    assert all(type(problem) is ModelError and problem.where for problem in problems)


# What is wrong, and what it is called ---------------------------------------------------------------------


def test_without_a_base_one_line_says_what_to_set(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "flux1-dev.safetensors"
    write("flux", bases("flux"), file)
    (problem,) = look("flux", Source(str(file)))
    assert problem.message == "holds transformer alone, without vae, text_encoder and text_encoder_2"
    assert problem.hint and "model.base" in problem.hint and "black-forest-labs/FLUX.1-dev" in problem.hint
    with pytest.raises(ModelError, match="holds transformer alone"):
        load("flux", Source(str(file)))


def test_a_base_without_effect_is_an_error(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_sources("sd15")
    (problem,) = look("sd15", Source(str(folder), base=str(folder)))
    assert "model.base has no effect" in problem.message and problem.key == "model.base"
    family, file = families.get("sd15"), tmp_path / "whole.safetensors"
    dtypes = {part.name: torch.float32 for part in family.facts.components}
    single_file.save_single_file(family.tiny(), file, family.facts, dtypes)
    with pytest.raises(ModelError, match=r"model\.base has no effect"):
        load("sd15", Source(str(file), base=str(folder)))
    with pytest.raises(ConfigError, match=r"base: has no effect: model.source is tiny"):
        validate(ModelConfig, {"family": "sd15", "source": "tiny", "base": "x"}, lambda key: "here")
    with pytest.raises(ArtifactError, match="no effect on a model in onnx"):
        Artifact(None, None, "onnx", "sd15", "x").with_base("y")


def test_the_wrong_base_is_told(
    bases: Callable[[str], Path], tiny_sources: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    write("flux", bases("flux"), file)
    (problem,) = look("flux", Source(str(file), base=str(tiny_sources("sd15"))))
    assert "holds a StableDiffusionPipeline, which is not FLUX.1" in problem.message
    assert problem.key == "model.base"
    (problem,) = look("flux", Source(str(file), base=str(tmp_path)))
    assert "model_index.json" in problem.message and problem.key == "model.base"
    (problem,) = look("flux", Source(str(file), base=str(file)))
    assert "is one file" in problem.message and problem.key == "model.base"
    larger = shutil.copytree(bases("flux"), tmp_path / "larger")
    config = larger / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 9}))
    (problem,) = look("flux", Source(str(file), base=str(larger)))
    assert "missing transformer_blocks." in problem.message and str(larger) in str(problem.hint)
    (problem,) = look("sd15", Source(str(file), base=str(tiny_sources("sd15"))))
    assert "is a FLUX.1 model, and this needs Stable Diffusion 1.x" in problem.message


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_unknown_or_of_another_shape_is_named(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file, base = tmp_path / "x.safetensors", bases(name)
    source = Source(str(file), base=str(base))
    denoiser = families.get(name).facts.denoiser_name
    keys = list(NAMES[name](own_of(name, base)))
    marks = families.get(name).facts.denoiser.marks
    weights = [key for key in keys if key.endswith(".weight") and key not in marks]
    fused = next((key for key in weights if "qkv" in key), weights[0])
    last = next(key for key in reversed(keys) if key not in marks)

    def said(change: Callable[[Tensors], object]) -> str:
        write(name, base, file, change)
        (problem,) = look(name, source)
        with pytest.raises(ModelError) as caught:
            load(name, source)
        assert problem.message in str(caught.value) and problem.where == str(file)
        return problem.message

    text = said(lambda made: made.pop(last))
    assert denoiser in text and "missing" in text
    text = said(lambda made: made.update({f"{last}.other": made.pop(last)}))
    assert "missing" in text and f"no layer reads {last}.other" in text
    assert "no layer reads extra" in said(lambda made: made.update(extra=torch.zeros(1)))
    text = said(lambda made: made.update({fused: made[fused][1:].clone()}))
    assert f"{fused} is [" in text and "should be" in text
    text = said(lambda made: made.update({fused: made[fused].to(torch.int8)}))
    assert f"{fused} holds I8" in text
    file.write_bytes(file.read_bytes()[:-100])
    (problem,) = look(name, source)
    assert "cannot be read as safetensors" in problem.message


@pytest.mark.parametrize("name", NAMES)
def test_names_of_diffusers_are_told(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(own_of(name, bases(name)), file)
    (problem,) = look(name, Source(str(file), base=str(bases(name))))
    assert "with the names of diffusers" in problem.message
    assert "transformer/diffusion_pytorch_model.safetensors" in str(problem.hint)


def test_a_base_that_lacks_something_is_told(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """T5 is large, and left out where people pass folders on."""
    file = tmp_path / "x.safetensors"
    write("flux", bases("flux"), file)
    base = shutil.copytree(bases("flux"), tmp_path / "base")
    (base / "text_encoder_2" / "model.safetensors").unlink()
    (problem,) = look("flux", Source(str(file), base=str(base)))
    assert problem.message == "its weights are missing" and "text_encoder_2" in str(problem.where)
    shutil.rmtree(base / "text_encoder_2")
    (problem,) = look("flux", Source(str(file), base=str(base)))
    assert problem.message == "its component text_encoder_2 is missing"


# Stable Diffusion -----------------------------------------------------------------------------------------


def stable_file(name: str, file: Path, *prefixes: str, **more: Tensor) -> Tensors:
    """A file of the tiny pipeline in the published layout; of it, what begins so."""
    family = families.get(name)
    dtypes = {part.name: torch.float32 for part in family.facts.components}
    single_file.save_single_file(family.tiny(), file, family.facts, dtypes)
    made = {
        key: value for key, value in safetensors.torch.load_file(file).items() if key.startswith(prefixes)
    }
    safetensors.torch.save_file({**made, **more}, file)
    return made


@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_unet_alone(name: str, bare: bool, tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    file, base = tmp_path / "unet.safetensors", tiny_sources(name)
    made = stable_file(name, file, "model.diffusion_model.")
    if bare:
        made = {key.removeprefix("model.diffusion_model."): value for key, value in made.items()}
        safetensors.torch.save_file(made, file)
    (problem,) = look(name, Source(str(file)))
    assert "holds unet alone, without vae" in problem.message and "model.base" in str(problem)
    unet = load_looked(name, Source(str(file), base=str(without_weights(base, name, tmp_path / "base")))).unet
    for key, value in families.get(name).tiny().unet.state_dict().items():
        assert torch.equal(unet.state_dict()[key], value), key
    with pytest.raises(ModelError, match=r"name it: model\.family"):
        families.detect(Source(str(file), base=str(base)))


def load_looked(name: str, source: Source) -> Any:
    assert families.get(name).look(source) == []
    return families.get(name).load(source)


def test_a_vae_that_is_not_there_is_the_bases(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    file, base = tmp_path / "no-vae.safetensors", str(tiny_sources("sd15"))
    averages = {f"model_ema.diffusion_model{i}": torch.zeros(2) for i in range(3)}
    stable_file("sd15", file, "model.", "cond_stage_model.", **averages)
    source = Source(str(file), base=base)
    made = load_looked("sd15", source)
    own = families.get("sd15").tiny()
    for part in ("unet", "vae", "text_encoder"):
        for key, value in getattr(own, part).state_dict().items():
            assert torch.equal(getattr(made, part).state_dict()[key], value), f"{part}.{key}"
    facts = families.get("sd15").facts
    (line,) = loading.left_out(source, facts)
    assert "3 tensors are a second average of the weights (EMA)" in line
    listed = loading.source_files(source, facts)
    assert [name for name, files in listed.items() if files] == [
        "vae"
    ]  # the others are in one file, and are known by their content


def test_an_inpainting_unet_is_refused_by_name(tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    file, base = tmp_path / "inpainting.safetensors", str(tiny_sources("sd15"))
    made = stable_file("sd15", file, "model.diffusion_model.")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    taken = made[first]
    made[first] = torch.cat([taken, taken, taken[:, :1]], dim=1)
    safetensors.torch.save_file(made, file)
    problems = families.get("sd15").look(Source(str(file), base=base))
    assert "an inpainting model" in problems[0].message


def test_what_else_lies_in_a_file_is_said(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The files of whole models that ComfyUI opens as checkpoints."""
    file = tmp_path / "all.safetensors"
    made = NAMES["flux"](own_of("flux", bases("flux")))
    made = {f"model.diffusion_model.{key}": value for key, value in made.items()}
    more = {"text_encoders.t5xxl.transformer.x.weight": torch.ones(1), "vae.decoder.x.bias": torch.ones(1)}
    safetensors.torch.save_file({**made, **more}, file)
    source = Source(str(file), base=str(bases("flux")))
    assert look("flux", source) == []
    (line,) = loading.left_out(source, families.get("flux").facts)
    assert line == "text_encoders, vae: not read, as model.base has them in their place"


# Folders that lack a component ----------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["weights", "folder"])
def test_a_component_that_a_folder_lacks_is_the_bases(
    lacking: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases("flux"), tmp_path / "model")
    if lacking == "folder":
        for part in ("text_encoder_2", "tokenizer_2"):
            shutil.rmtree(folder / part)
    else:
        (folder / "text_encoder_2" / "model.safetensors").unlink()
    (problem,) = [p for p in look("flux", Source(str(folder))) if "tokenizer" not in str(p)]
    assert "missing" in problem.message and "text_encoder_2" in str(problem)
    source = Source(str(folder), base=str(bases("flux")))
    assert look("flux", source) == []
    made = load("flux", source).text_encoder_2.state_dict()
    whole = load("flux", Source(str(bases("flux")))).text_encoder_2.state_dict()
    assert all(torch.equal(made[key], value) for key, value in whole.items())
    files = loading.source_files(source, families.get("flux").facts)
    assert files["text_encoder_2"][0].is_relative_to(bases("flux"))
    assert files["transformer"][0].is_relative_to(folder)


# Planning, records ----------------------------------------------------------------------------------------


def test_sizes_and_files_are_those_of_both(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write("flux", bases("flux"), file, lambda made: as_fp8(made, ending=".scale_weight"))
    source = Source(str(file), base=str(without_weights(bases("flux"), "flux", tmp_path / "base")))
    sizes = families.sizes_of("flux", source)
    tiny = families.get("flux").tiny().transformer.config
    assert sizes.denoiser.config["num_layers"] == tiny.num_layers and not sizes.assumed
    known = stored(sizes, source)
    assert known["transformer"] == Stored("other", file.stat().st_size)
    assert known["text_encoder_2"].dtype == "fp32"
    assert stored(sizes, Source(str(file), base="owner/name"))["vae"] == Stored("bf16")
    shutil.rmtree(tmp_path / "base" / "transformer")
    assert families.sizes_of("flux", source).denoiser.config["num_layers"] == 19  # the usual base's


def test_how_it_was_opened_is_recorded(tmp_path: Path) -> None:
    opened = validate(
        ModelConfig, {"family": "flux", "source": "x.safetensors", "base": "owner/name"}, lambda key: "here"
    ).opened
    assert opened == Source("x.safetensors", base="owner/name") and opened.is_special
    (tmp_path / "w.safetensors").write_bytes(b"x")
    made = Artifact(
        tmp_path, tmp_path, "adapter", "flux", str(tmp_path), base="x.safetensors", opened=opened
    ).write()
    assert made.model_source == opened


# Written ---------------------------------------------------------------------------------------------------

PUBLISHED = [name for name in families.runnable() if families.get(name).facts.denoiser.marks]


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_reads_the_names_and_rows_at_real_size(name: str) -> None:
    """Its own conversion of published files gives every tensor back; each has all rows, and one column."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    part = families.get(name).facts.denoiser
    known = SINGLE_FILE_LOADABLE_CLASSES[part.classes.partition(":")[2]]["checkpoint_mapping_fn"]
    network = part.build()
    numbers = iter(range(10**6))
    own = {
        key: (torch.arange(len(value)) + 7.0 * next(numbers)).reshape(-1, *[1] * (value.dim() - 1))
        for key, value in network.state_dict().items()
    }
    state = single_file.published(part, SimpleNamespace(state_dict=lambda: own))  # type: ignore[arg-type]
    assert all(part.published + mark in state for mark in part.marks)
    if name in NAMES:  # published without what is before them in a whole checkpoint
        state = {key.removeprefix(part.published): value for key, value in state.items()}
    made = known(checkpoint=state, config=dict(network.config))
    for key, value in own.items():
        assert torch.equal(made[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_has_the_published_names_and_is_read(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    family, file = families.get(name), tmp_path / "mine.safetensors"
    facts, pipeline = family.facts, family.tiny(seed=3)
    dtypes = {part.name: torch.bfloat16 for part in facts.components}
    single_file.save_single_file(pipeline, file, facts, dtypes, title="mine")
    own = {key: value.to(torch.bfloat16) for key, value in pipeline.transformer.state_dict().items()}
    byhand = NAMES[name](own)
    written = safetensors.torch.load_file(file)
    assert written.keys() == byhand.keys()
    assert all(torch.equal(written[key], value) for key, value in byhand.items())
    assert single_file.metadata_of(file)["modelspec.architecture"] == facts.modelspec_architecture
    ours = load(name, Source(str(file), base=str(bases(name))), torch.bfloat16).transformer
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in own.items())


# A run ----------------------------------------------------------------------------------------------------


def test_a_base_of_the_hub_is_read_without_its_denoiser(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the hub's own files, as after a download."""
    import huggingface_hub.constants

    file, commit = tmp_path / "x.safetensors", "0" * 40
    own = write("flux", bases("flux"), file)
    repository = tmp_path / "models--somebody--flux"
    there = without_weights(bases("flux"), "flux", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    source = Source(str(file), base="somebody/flux")
    assert look("flux", source) == []  # nothing is known of it
    made = load("flux", source).transformer.state_dict()
    assert all(torch.equal(made[key], value) for key, value in own.items())
    facts = families.get("flux").facts
    listed = weights_of(source, facts)
    assert listed[0] == file and there / "text_encoder_2" / "model.safetensors" in listed
    (problem,) = look("flux", Source(str(file)))
    assert "holds transformer alone" in problem.message


def test_check_and_plan_know_the_base(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file, base = tmp_path / "x.safetensors", bases("flux")
    write("flux", base, file)
    common = [
        f"model.source={file}",
        f"data.path={tmp_path / 'none'}",
        f"runs={tmp_path}",
        "model.variant=null",
    ]

    def said(*more: str) -> list[str]:
        rows = workspace.check("flux/lora", [*common, *more]).problems
        return [row.message for row in rows if row.key in ("model.source", "model.base")]

    assert "holds transformer alone" in said()[0]
    assert said(f"model.base={base}") == []
    assert "which is not FLUX.1" in said("model.base=builtin/emoji-64")[0]
    assert "model.base has no effect" in said(f"model.source={base}", f"model.base={base}")[0]
    notes = workspace.check("flux/lora", [*common, f"model.base={base}", "model.revision=x"]).notes
    assert any("revision=x has no effect" in note for note in notes)


@pytest.mark.parametrize("times", [2, 6])
def test_a_transformer_that_takes_more_is_refused_by_name(
    times: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """FLUX.1 Fill, Canny and Depth, whose files have the same names."""
    file = tmp_path / "x.safetensors"

    def wider(made: Tensors) -> None:
        made["img_in.weight"] = made["img_in.weight"].repeat(1, times)

    write("flux", bases("flux"), file, wider)
    first, second = look("flux", Source(str(file), base=str(bases("flux"))))
    assert {2: "Canny, Depth", 6: "an inpainting model (Fill)"}[times] in first.message
    assert "img_in.weight is [" in second.message


def test_stable_diffusion_3_as_it_was_published(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Transformer and VAE in one file; the text encoders are apart, and T5 may be left out."""
    file, facts = tmp_path / "sd3.safetensors", families.get("sd3").facts
    whole = load("sd3", Source(str(bases("sd3"))))
    own = {part: getattr(whole, part) for part in ("transformer", "vae")}
    made: Tensors = {}
    for part, network in own.items():
        made |= single_file.published(facts.component(part), network)
    safetensors.torch.save_file({key: value.contiguous() for key, value in made.items()}, file)
    (problem,) = look("sd3", Source(str(file)))
    assert problem.message.startswith("holds transformer and vae alone, without text_encoder, text_encoder_2")
    base = without_weights(bases("sd3"), "sd3", tmp_path / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    index = json.loads((base / "model_index.json").read_text())
    index |= {key: [None, None] for key in ("text_encoder_3", "tokenizer_3")}
    (base / "model_index.json").write_text(json.dumps(index))
    source = Source(str(file), base=str(base))
    assert look("sd3", source) == []
    pipeline = load("sd3", source)
    assert pipeline.text_encoder_3 is None and pipeline.text_encoder_2 is not None
    for part, network in own.items():
        again = getattr(pipeline, part).state_dict()
        assert all(torch.equal(again[key], value) for key, value in network.state_dict().items()), part
