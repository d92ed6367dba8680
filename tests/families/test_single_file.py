"""One file with a whole model, as Stable Diffusion was published: written, read, and told from others."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from tunekit import families, layers
from tunekit.errors import ModelError
from tunekit.families import loading, single_file, unet
from tunekit.families.sd15 import ABSENT
from tunekit.resources import Source

NAMES = ["sd15", "sd2", "sdxl"]


def networks(family: Any, pipeline: Any) -> dict[str, nn.Module]:
    return {p.name: getattr(pipeline, p.name) for p in family.facts.components if p.role != "scheduler"}


def full(family: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
    return dict.fromkeys((part.name for part in family.facts.components), dtype)


@pytest.fixture
def written(tiny_sources: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """`written("sdxl")`: the tiny pipeline as one file, its configs in the folder of its name."""

    def write(name: str) -> Path:
        family = families.get(name)
        folder = shutil.copytree(tiny_sources(name), tmp_path / name)
        for file in folder.glob("*/*.safetensors"):
            file.unlink()
        file = tmp_path / f"{name}.safetensors"
        single_file.save_single_file(family.tiny(), file, family.facts, full(family), title="mine")
        return file

    return write


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_here_and_by_diffusers(name: str, written: Callable[[str], Path]) -> None:
    import diffusers

    family, file = families.get(name), written(name)
    assert family.look(str(file)) == [] and families.detect(file) == name
    plain = getattr(diffusers, family.facts.pipeline_class)
    theirs = plain.from_single_file(str(file), config=str(file.with_suffix("")))
    own = networks(family, family.tiny())
    for pipeline in (family.load(str(file)), theirs):
        for part, network in networks(family, pipeline).items():
            state = network.state_dict()
            assert state.keys() == own[part].state_dict().keys()
            for key, value in own[part].state_dict().items():
                assert torch.equal(state[key], value), f"{part}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_those_of_the_published_files(name: str) -> None:
    """At the real size, without data: diffusers' own conversion finds every tensor, in its shape."""
    family = families.get(name)
    for part in family.facts.components:
        if part.role == "scheduler":
            continue
        network = part.build()
        state = single_file.published(part, network)
        assert all(key.startswith(part.published) for key in state)
        if part.role == "denoiser":
            made = single_file_utils.convert_ldm_unet_checkpoint(state, dict(network.config))
        elif part.role == "vae":
            made = single_file_utils.convert_ldm_vae_checkpoint(state, dict(network.config))
        elif part.published.endswith(single_file.OPEN_CLIP):
            made = single_file_utils.convert_open_clip_checkpoint(network, state, part.published)
        else:
            made = single_file_utils.convert_ldm_clip_checkpoint(state, remove_prefix=part.published)
        made = {key.removeprefix("text_model."): value for key, value in made.items()}
        for key, value in network.state_dict().items():
            shape = made[key.removeprefix("text_model.")].shape
            assert shape == value.shape, f"{part.name}.{key}"


def test_well_known_names() -> None:
    """Of v1-5-pruned-emaonly, v2-1_768-ema-pruned and sd_xl_base_1.0."""
    known = {
        "sd15": {
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
            "first_stage_model.decoder.up.3.block.0.norm1.weight": (512,),
            "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        },
        "sd2": {
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.positional_embedding": (77, 1024),
            "cond_stage_model.model.text_projection": (1024, 1024),
            "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320),
        },
        "sdxl": {
            "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.bias": (1280,),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        },
    }
    for name, tensors in known.items():
        state: dict[str, Tensor] = {}
        for part in families.get(name).facts.components:
            if part.role != "scheduler":
                state |= single_file.published(part, part.build())
        for key, shape in tensors.items():
            assert tuple(state[key].shape) == shape, key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sd15", "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "first_stage_model.decoder.mid.attn_1.k.weight"),
        ("sd15", "model.diffusion_model.middle_block.1.proj_in.weight"),
    ],
)
def test_a_tensor_that_is_not_there_is_named(name: str, key: str, written: Callable[[str], Path]) -> None:
    family, file = families.get(name), written(name)
    tensors = safetensors.torch.load_file(file)
    tensors[f"{key}.other"] = tensors.pop(key)
    safetensors.torch.save_file(tensors, file)
    (problem,) = family.look(str(file))
    assert "missing" in problem.message and ".other" in problem.message and problem.where == str(file)
    with pytest.raises(ModelError, match="missing"):
        family.load(str(file))


def test_what_is_no_part_of_the_model_is_left(written: Callable[[str], Path]) -> None:
    family, file = families.get("sd15"), written("sd15")
    tensors = safetensors.torch.load_file(file)
    extra = ["alphas_cumprod", "betas", "model_ema.decay", "sqrt_recip_alphas_cumprod", "global_step"]
    extra += ["cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight"]
    more = {name: torch.zeros(3) for name in extra}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    safetensors.torch.save_file({**tensors, **more, positions: torch.arange(48)[None]}, file)
    assert family.look(str(file)) == []
    safetensors.torch.save_file({**tensors, "control_model.x": torch.zeros(1)}, file)
    (problem,) = family.look(str(file))
    assert "no part of the model reads control_model.x" in problem.message


def test_it_is_packed_while_it_is_read(written: Callable[[str], Path]) -> None:
    family, file = families.get("sd15"), written("sd15")
    made = family.tiny().unet
    layers.quantize(made, "int8", only=layers.block_linears(made))
    read = family.load(str(file), pack="int8").unet.state_dict()
    assert all(torch.equal(read[key], value) for key, value in made.state_dict().items())


# --- without a network and without a folder beside it -----------------------------------------------------


def small(name: str) -> Any:
    """A family's facts with small networks, and CLIP's whole vocabulary."""
    facts = families.get(name).facts
    tiny = families.get(name).tiny()
    rows = []
    for part in facts.components:
        if part.role != "scheduler":
            config = getattr(tiny, part.name).config
            plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            if part.role == "text_encoder":
                plain |= {"vocab_size": 49408, "max_position_embeddings": 77}
            part = replace(part, config=plain)
        rows.append(part)
    return replace(facts, components=tuple(rows))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_alone_opens_at_once_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = small(name)
    made = {part.name: part.build("cpu") for part in facts.components}
    file = tmp_path / "alone.safetensors"
    pipeline = families.get(name).tiny()
    for part, network in made.items():
        setattr(pipeline, part, network)
    single_file.save_single_file(pipeline, file, facts, full(families.get(name), torch.float16))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was tried"))
    fixed = ABSENT if name != "sdxl" else {"add_watermarker": False}
    began = time.monotonic()
    opened = loading.load_pipeline(Source(str(file)), facts, fixed=fixed, misfits=unet.misfits)
    assert time.monotonic() - began < 20
    assert opened.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(opened.tokenizer) == 49408 and opened.tokenizer.model_max_length == 77
    for encoder in facts.encoders:
        padding = getattr(opened, encoder.tokenizer).pad_token_id
        assert padding == (0 if encoder.published.endswith(single_file.OPEN_CLIP) else 49407)
    assert type(opened.scheduler) is facts.component("scheduler").type
    assert torch.equal(opened.unet.conv_in.weight, made["unet"].conv_in.weight.half().float())


def header_only(file: Path, parts: Any, **changes: tuple[int, ...]) -> Path:
    """A file of the real size, with a header and a hole."""
    header, at = {}, 0
    for part in parts:
        for key, value in single_file.published(part, part.build()).items():
            shape = changes.get(key, tuple(value.shape))
            size = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
    raw = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + at)
    return file


def test_the_real_size_is_looked_at_by_its_header(tmp_path: Path) -> None:
    family = families.get("sd15")
    parts = [part for part in family.facts.components if part.role != "scheduler"]
    assert family.look(str(header_only(tmp_path / "base.safetensors", parts))) == []
    key = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = header_only(tmp_path / "inpainting.safetensors", parts, **{key: (320, 9, 3, 3)})
    first, second = family.look(str(inpainting))
    assert "an inpainting model" in first.message and "[320, 9, 3, 3]" in second.message


def test_sizes_that_are_not_the_usual_ones_ask_for_the_configs(written: Callable[[str], Path]) -> None:
    file = written("sd15")
    beside = file.with_suffix("")
    shutil.rmtree(beside)
    with pytest.raises(ModelError) as caught:
        families.get("sd15").load(str(file))
    assert str(beside) in str(caught.value) and "Stable Diffusion 1.5" in str(caught.value)


# --- what a file says of itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_x.lora_down.weight"], "a LoRA"),
        (["lora_unet_x.hada_w1_a"], "LoHa"),
        (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["emb_params"], "textual inversion"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "without text encoder"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE"),
        (["conditioner.embedders.0.model.ln_final.weight"], "refiner"),
        (["cond_stage_model.model.ln_final.weight"], "Stable Diffusion 2.x"),
        (["weight"], "not a model that is known"),
    ],
)
def test_what_is_no_model_is_told(names: list[str], words: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({name: torch.zeros(1) for name in names}, file)
    (problem,) = families.get("sd15").look(str(file))
    assert words in problem.message and "this needs Stable Diffusion 1.x" in problem.message


def test_a_file_without_its_vae_is_told(written: Callable[[str], Path]) -> None:
    family, file = families.get("sd15"), written("sd15")
    tensors = safetensors.torch.load_file(file)
    rest = {name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}
    safetensors.torch.save_file(rest, file)
    (problem,) = family.look(str(file))
    assert problem.message == "holds unet and text_encoder alone, without vae"
    assert "model.base" in str(problem.hint)


def test_a_model_of_another_family_is_told(written: Callable[[str], Path]) -> None:
    (problem,) = families.get("sd15").look(str(written("sdxl")))
    assert "is a Stable Diffusion XL model" in problem.message


@pytest.mark.parametrize(
    ("marks", "metadata", "changes"),
    [
        ([], {}, {}),
        (["v_pred"], {}, {"prediction_type": "v_prediction"}),
        (
            ["v_pred", "ztsnr"],
            {},
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
        ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ([], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ([], {"modelspec.architecture": "stable-diffusion-v2-512"}, {"prediction_type": "epsilon"}),
    ],
)
def test_what_it_predicts(marks: list[str], metadata: dict[str, str], changes: dict[str, Any]) -> None:
    assert single_file.schedule(dict.fromkeys(marks), metadata) == changes  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_it_predicts_is_written_and_read(name: str, prediction: str, tmp_path: Path) -> None:
    family = families.get(name)
    pipeline = family.tiny()
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    file = tmp_path / "x.safetensors"
    single_file.save_single_file(pipeline, file, family.facts, full(family))
    said = single_file.schedule(safetensors.torch.load_file(file), single_file.metadata_of(file))
    assert said == {"prediction_type": prediction}


def test_pruned_and_packed_models_are_not_written(tmp_path: Path) -> None:
    family = families.get("sd15")
    pipeline = family.tiny()
    layers.quantize(pipeline.unet, "int8")
    with pytest.raises(ModelError, match="pruned or packed"):
        single_file.save_single_file(pipeline, tmp_path / "x.safetensors", family.facts, full(family))
    assert list(tmp_path.iterdir()) == []
