"""Files as other programs write them, with names written out from their layouts: each means what it says.

Each is of the usual base at its full width, with one layer of every kind.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import families
from tunekit.adapters import Lora
from tunekit.adapters.delta import changeable, weight_shape
from tunekit.adapters.layouts import parse
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError

State = dict[str, Tensor]
RANK, ALPHA = 3, 1.5
KOHYA, PEFT, OLD = ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")
DOUBLE, SINGLE = "transformer_blocks.1", "single_transformer_blocks.1"
QKV, ADDED = [f"{DOUBLE}.attn.to_{of}" for of in "qkv"], [f"{DOUBLE}.attn.add_{of}_proj" for of in "qkv"]
IN_SINGLE = [f"{SINGLE}.attn.to_{of}" for of in "qkv"]

# Family and program -> how the two matrices are called, and layer -> modules whose rows it has.
FLUX1 = {
    "double_blocks.1.img_attn.qkv": QKV,
    "double_blocks.1.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.1.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.1.img_mod.lin": [f"{DOUBLE}.norm1.linear"],
    "double_blocks.1.txt_attn.qkv": ADDED,
    "double_blocks.1.txt_mlp.2": [f"{DOUBLE}.ff_context.net.2"],
    "single_blocks.1.linear1": [*IN_SINGLE, f"{SINGLE}.proj_mlp"],
    "single_blocks.1.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.1.modulation.lin": [f"{SINGLE}.norm.linear"],
    "txt_in": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
}
SD3 = {
    "joint_blocks.1.x_block.attn.qkv": QKV,
    "joint_blocks.1.x_block.attn2.qkv": [f"{DOUBLE}.attn2.to_{of}" for of in "qkv"],
    "joint_blocks.1.x_block.mlp.fc1": [f"{DOUBLE}.ff.net.0.proj"],
    "joint_blocks.1.context_block.attn.qkv": ADDED,
    "joint_blocks.1.context_block.attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "joint_blocks.1.context_block.adaLN_modulation.1": [f"{DOUBLE}.norm1_context.linear"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
}
CHROMA = {key: modules for key, modules in FLUX1.items() if ".mod" not in key and "_mod" not in key} | {
    "distilled_guidance_layer.layers.1.in_layer": ["distilled_guidance_layer.layers.1.linear_1"]
}
FLUX2 = {
    "double_blocks.1.img_attn.qkv": QKV,
    "double_blocks.1.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "double_blocks.1.img_mlp.0": [f"{DOUBLE}.ff.linear_in"],
    "double_blocks.1.txt_mlp.2": [f"{DOUBLE}.ff_context.linear_out"],
    "single_blocks.1.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": [f"{SINGLE}.attn.to_out"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
}
ZIMAGE = {
    "layers.1.attention.qkv": [f"layers.1.attention.to_{of}" for of in "qkv"],
    "layers.1.attention.out": ["layers.1.attention.to_out.0"],
    "context_refiner.1.attention.qkv": [f"context_refiner.1.attention.to_{of}" for of in "qkv"],
    "noise_refiner.1.feed_forward.w1": ["noise_refiner.1.feed_forward.w1"],
    "layers.1.adaLN_modulation.0": ["layers.1.adaLN_modulation.0"],
    "x_embedder": ["all_x_embedder.2-1"],
    "final_layer.linear": ["all_final_layer.2-1.linear"],
}
KREA2 = {
    "blocks.1.attn.wq": [f"{DOUBLE}.attn.to_q"],
    "blocks.1.attn.gate": [f"{DOUBLE}.attn.to_gate"],
    "blocks.1.mlp.down": [f"{DOUBLE}.ff.down"],
    "txtfusion.refiner_blocks.1.attn.wo": ["text_fusion.refiner_blocks.1.attn.to_out.0"],
    "tmlp.0": ["time_embed.linear_1"],
}
XLABS = {
    "double_blocks.1.processor.qkv_lora1": QKV,
    "double_blocks.1.processor.proj_lora1": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.1.processor.qkv_lora2": ADDED,
    "double_blocks.1.processor.proj_lora2": [f"{DOUBLE}.attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": IN_SINGLE,
    "single_blocks.1.processor.proj_lora": [f"{SINGLE}.proj_out"],
}
SDXL = "transformer_blocks.0.attn2.to_k"
LAYERS = {
    "flux": FLUX1,
    "chroma": CHROMA,
    "sd3": SD3,
    "flux2": FLUX2,
    "zimage": ZIMAGE,
    "krea2": KREA2,
    "sdxl": {f"input_blocks.4.1.{SDXL}": [f"down_blocks.1.attentions.0.{SDXL}"]},
}
PREFIXES = {
    "kohya": ("lora_unet_{}", "_", KOHYA),
    "dotted": ("diffusion_model.{}", ".", PEFT),
    "dotted, kohya's ends": ("diffusion_model.{}", ".", KOHYA),
    "published": ("{}", ".", PEFT),
    "peft": ("base_model.model.{}", ".", PEFT),
}
OWN_NAMES = {
    "diffusers": ("transformer.{}", ".", PEFT),
    "old diffusers": ("transformer.{}", ".", OLD),
    "OneTrainer": ("lora_transformer_{}", "_", KOHYA),
    "SimpleTuner": ("lycoris_{}", "_", KOHYA),
    "musubi": ("lora_unet_{}", "_", KOHYA),
    "dotted": ("diffusion_model.{}", ".", PEFT),
}
HERE = [name for name in LAYERS if name in dict(families.FAMILIES.items())]


@cache
def network(name: str) -> Any:
    return families.planned(name).facts.denoiser.build()


def rows(name: str, modules: list[str]) -> tuple[int, int]:
    shapes = [weight_shape(network(name).get_submodule(path)) for path in modules]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def a_file(
    name: str, layers: dict[str, list[str]], style: tuple[str, str, tuple[str, str]], alpha: bool
) -> State:
    prefix, dot, (down, up) = style
    state = {}
    for layer, modules in layers.items():
        out, inside = rows(name, modules)
        key = prefix.format(layer.replace(".", dot))
        state |= {f"{key}.{down}.weight": drawn(RANK, inside), f"{key}.{up}.weight": drawn(out, RANK)}
        if alpha:
            state[f"{key}.alpha"] = torch.tensor(ALPHA)
    return state


def read(name: str, state: State, header: dict[str, str] | None = None) -> dict[str, Any]:
    family: Any = families.planned(name)
    modules = {"transformer": changeable(network(name))}
    return parse(state, header or {}, modules, family, "file")["transformer"]


def check(name: str, layers: dict[str, list[str]], found: dict[str, Any], alpha: bool) -> None:
    wanted = {}
    for modules in layers.values():
        out, inside = rows(name, modules)
        scale = ALPHA / RANK if alpha else 1.0
        parts = drawn(out, RANK).split([rows(name, [path])[0] for path in modules])
        wanted |= {path: (scale * up, drawn(RANK, inside)) for path, up in zip(modules, parts, strict=True)}
    assert found.keys() == wanted.keys()
    for path, (up, down) in wanted.items():
        delta = found[path]
        assert isinstance(delta, Lora)
        probe = drawn(down.shape[1], 2)
        given = delta.alpha / delta.rank * (delta.up @ (delta.down @ probe))
        assert relative_error(given, up @ (down @ probe)) < 1e-5


TRANSFORMERS = [name for name in HERE if families.planned(name).facts.denoiser_name == "transformer"]


@pytest.mark.parametrize("program", PREFIXES)
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("alpha", [True, False], ids=["alpha", "no alpha"])
def test_layers_as_they_were_published(name: str, program: str, alpha: bool) -> None:
    layers = LAYERS[name]
    check(name, layers, read(name, a_file(name, layers, PREFIXES[program], alpha)), alpha)


@pytest.mark.parametrize("program", OWN_NAMES)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_as_diffusers_has_them(name: str, program: str) -> None:
    layers = {path: [path] for modules in LAYERS[name].values() for path in modules}
    check(name, layers, read(name, a_file(name, layers, OWN_NAMES[program], True)), True)


def test_names_that_one_program_has_for_its_own() -> None:
    """XLabs: a key ends with `_lora1.down.weight`, and a single block's qkv is a part of its linear1."""
    state = {}
    for layer, modules in XLABS.items():
        out, inside = rows("flux", modules)
        state |= {f"{layer}.down.weight": drawn(RANK, inside), f"{layer}.up.weight": drawn(out, RANK)}
    check("flux", XLABS, read("flux", state), False)


@pytest.mark.parametrize(("name", "other"), [(a, b) for a in TRANSFORMERS for b in HERE if a != b])
@pytest.mark.parametrize("program", ["kohya", "dotted", "published"])
def test_a_file_of_another_family_is_refused_by_name(name: str, program: str, other: str) -> None:
    """Without a header: by names and, where two families share them, by sizes."""
    state = a_file(other, LAYERS[other], PREFIXES[program], True)
    with pytest.raises(AdapterError) as caught:
        read(name, state)
    assert f"looks like {families.planned(other).facts.title}" in str(caught.value)


def test_what_fits_by_its_shapes_is_still_of_the_family_that_its_header_names() -> None:
    layers = {path: [path] for path in QKV}
    state = a_file("flux", layers, OWN_NAMES["diffusers"], True)
    assert read("flux", state, {"ss_base_model_version": "flux1"})
    with pytest.raises(AdapterError, match=r"made for Stable Diffusion XL, and this is FLUX\.1"):
        read("flux", state, {"ss_base_model_version": "sdxl_base_v1-0"})
    both = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "flux-1-dev/lora"}
    assert read("flux", state, both)  # modelspec says more


def test_keys_that_are_not_understood_are_named() -> None:
    state = a_file("flux", FLUX1, PREFIXES["dotted"], False)
    strange = {"diffusion_model.double_blocks.77.img_attn.qkv.lora_A.weight": drawn(RANK, 3072)}
    with pytest.raises(AdapterError, match=r"1 of its keys name nothing in FLUX\.1: .*double_blocks\.77"):
        read("flux", {**state, **strange})
    lokr = {"diffusion_model.double_blocks.1.img_attn.qkv.lokr_w1": drawn(4, 4)}
    with pytest.raises(AdapterError, match="LoKr"):
        read("flux", {**state, **lokr})
