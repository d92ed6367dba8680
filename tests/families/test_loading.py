"""Where weights come from, and what is refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tunekit import families, layers
from tunekit.errors import ModelError, OutputError, TunekitError

FAMILY = families.get("sd15")
UNET = "diffusion_pytorch_model"


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be damaged."""
    return shutil.copytree(tiny_source, tmp_path / "model")


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        FAMILY.load(str(source), **options)
    return str(caught.value)


def edit(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def pickled(folder: Path) -> Path:
    """Turn the U-Net's weights into a pickle, as old folders have them."""
    file = folder / "unet" / f"{UNET}.safetensors"
    pickle = file.with_suffix(".bin")
    torch.save(safetensors.torch.load_file(file), pickle)
    file.unlink()
    return pickle


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


# --- what is missing or wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "~/nowhere/at/all"])
def test_a_missing_folder(source: str) -> None:
    message = refused(source)
    assert source in message and "no such file or folder" in message


def test_an_unreachable_hub_id() -> None:
    message = refused("nobody-here/no-such-model")
    assert "nobody-here/no-such-model" in message
    assert "Hugging Face hub" in message and "is here either" in message


def test_a_hub_id_that_is_in_the_cache(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the hub's own files, as after a download."""
    import huggingface_hub.constants

    commit = "0" * 40
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert families.detect("somebody/tiny") == "sd15"
    same(FAMILY.load("somebody/tiny"))
    assert "Hugging Face hub" in refused("somebody/tiny", revision="other")


def test_an_unknown_builtin() -> None:
    assert "builtin/emojy" in refused("builtin/emojy")


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert str(tmp_path) in message and "model_index.json" in message
    with pytest.raises(ModelError, match="not a pipeline folder"):
        families.detect(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not JSON"), ("[]", "_class_name"), ("{}", "_class_name")]
)
def test_a_damaged_index(folder: Path, content: str, words: str) -> None:
    (folder / "model_index.json").write_text(content)
    assert words in refused(folder)


def test_another_pipeline_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    message = refused(folder)
    assert "FluxPipeline" in message and "Stable Diffusion 1.x" in message
    with pytest.raises(ModelError, match=r"no family loads the pipeline class .FluxPipeline.\n.*known:"):
        families.detect(str(folder))


def test_an_exported_model(folder: Path) -> None:
    (folder / "unet" / "model.onnx").write_bytes(b"")
    assert "unet is an ONNX graph" in refused(folder)


def test_a_missing_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert "vae" in refused(folder)


def test_a_truncated_weights_file(folder: Path) -> None:
    file = folder / "unet" / f"{UNET}.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(folder: Path, value: float) -> None:
    key = "mid_block.resnets.0.conv1.weight"
    edit(folder / "unet" / f"{UNET}.safetensors", lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    message = refused(folder)
    assert f"unet: tensor {key} holds NaN or infinity" in message


def test_a_variant_that_is_not_there(folder: Path) -> None:
    assert "fp16" in refused(folder, variant="fp16")


def test_a_variant(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    loaded = FAMILY.load(str(folder), variant="fp16")
    assert torch.equal(loaded.unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)


# --- pickles ----------------------------------------------------------------------------------------------


def test_a_pickle_in_a_folder_is_refused(folder: Path) -> None:
    pickle = pickled(folder)
    message = refused(folder)
    assert str(pickle) in message and "any program" in message and "allow_pickle" in message


def test_a_pickle_is_opened_if_allowed(folder: Path) -> None:
    pickled(folder)
    loaded = FAMILY.load(str(folder), allow_pickle=True)
    assert torch.equal(loaded.unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)


def test_an_allowed_pickle_still_runs_nothing(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"conv_in.weight": Trap(trace)}, pickled(folder))
    refused(folder, allow_pickle=True)
    assert not trace.exists()


def test_a_checkpoint_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({}, file)
    assert "any program" in refused(file)


def test_an_allowed_checkpoint_file_still_runs_nothing(tmp_path: Path) -> None:
    file, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    torch.save({"state_dict": Trap(trace)}, file)
    refused(file, allow_pickle=True)
    assert not trace.exists()


# --- single files -----------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_BLOCKS = {  # of tiny: two levels, one layer each, attention on the first
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
VAE_PARTS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """Name tiny's weights as the first Stable Diffusion checkpoints did."""
    state: dict[str, Tensor] = {}
    for key, tensor in pipeline.unet.state_dict().items():
        block = next(b for b in UNET_BLOCKS if key.startswith(b + "."))
        rest = key.removeprefix(block)
        if ".resnets." in key:
            part = next(p for p in RESNET if rest.startswith(f".{p}."))
            rest = rest.replace(part, RESNET[part], 1)
        state[f"model.diffusion_model.{UNET_BLOCKS[block]}{rest}"] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        name = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        for ours, theirs in VAE_PARTS.items():
            name = name.replace(ours, theirs)
        name = name.replace("down_blocks", "down").replace("resnets", "block")
        if "up_blocks." in name:  # counted from the other end
            index = int(name.split("up_blocks.")[1][0])
            name = name.replace(f"up_blocks.{index}", f"up.{len(pipeline.vae.decoder.up_blocks) - 1 - index}")
        convolution = ".attn_1." in name and tensor.ndim == 2
        state[f"first_stage_model.{name}"] = tensor[..., None, None] if convolution else tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        level = "" if key.startswith("text_model.") else "text_model."
        state[f"cond_stage_model.transformer.{level}{key}"] = tensor
    return {key: tensor.contiguous() for key, tensor in state.items()}


@pytest.fixture(scope="module")
def tiny_checkpoint() -> dict[str, Tensor]:
    return original_layout(FAMILY.tiny())


def same(pipeline: Any) -> None:
    own = FAMILY.tiny()
    for name in ("unet", "vae", "text_encoder"):
        read = getattr(pipeline, name).state_dict()
        for key, tensor in getattr(own, name).state_dict().items():
            assert torch.equal(read[key], tensor), f"{name}.{key}"
    prompts = ["a red cat"]
    ours, theirs = FAMILY.encode_prompt(own, prompts), FAMILY.encode_prompt(pipeline, prompts)
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_a_single_file_with_its_configs_beside_it(folder: Path, tiny_checkpoint: dict[str, Tensor]) -> None:
    file = folder.with_suffix(".safetensors")
    safetensors.torch.save_file(tiny_checkpoint, file)
    same(FAMILY.load(str(file)))
    assert FAMILY.load(str(file), dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_an_allowed_checkpoint_file(folder: Path, tiny_checkpoint: dict[str, Tensor]) -> None:
    file = folder.with_suffix(".ckpt")
    torch.save({"state_dict": tiny_checkpoint}, file)
    same(FAMILY.load(str(file), allow_pickle=True))


def test_a_single_file_without_configs_and_without_a_network(
    tmp_path: Path, tiny_checkpoint: dict[str, Tensor]
) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tiny_checkpoint, file)
    message = refused(file)
    assert str(file) in message and f"{tmp_path / 'model'}" in message


def test_a_single_file_does_not_say_its_family(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"does not say its family\n.*--family"):
        families.detect(str(file))


def test_a_file_that_holds_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.write_text("hello")
    assert "not a weights file" in refused(file)


# --- saving -----------------------------------------------------------------------------------------------


def test_no_path_of_this_machine_is_written(tiny_source: Path, tmp_path: Path) -> None:
    FAMILY.save(FAMILY.load(str(tiny_source)), tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tiny_source) not in file.read_text(encoding="utf-8"), file
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8"))


def test_saving_twice_gives_the_same_files(tiny_source: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    FAMILY.save(FAMILY.load(str(tiny_source)), again)
    files = sorted(p.relative_to(tiny_source) for p in tiny_source.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for file in files:
        if file.parts[0] != "tokenizer":  # transformers 4 spells its special tokens in two ways
            assert (tiny_source / file).read_bytes() == (again / file).read_bytes(), file


def test_text_encoders_of_either_spelling(folder: Path) -> None:
    """transformers 5 leaves a level out of the names; files are written with it and read either way."""
    file = folder / "text_encoder" / "model.safetensors"
    named = safetensors.torch.load_file(file)
    assert all(key.startswith("text_model.") for key in named)
    same(FAMILY.load(str(folder)))
    short = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
    safetensors.torch.save_file(short, file, metadata={"format": "pt"})
    same(FAMILY.load(str(folder)))
    half = FAMILY.load(str(folder), dtype=torch.bfloat16)
    assert half.text_encoder.dtype == torch.bfloat16 and not half.text_encoder.training


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_quantized_layers_survive(tmp_path: Path, scheme: layers.Scheme) -> None:
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    pipeline = FAMILY.tiny()
    layers.quantize(pipeline.unet, scheme)
    draw = torch.Generator().manual_seed(0)
    noisy, timestep = torch.randn(1, 4, 16, 16, generator=draw), torch.tensor([5])
    known = FAMILY.encode_prompt(pipeline, ["a"])
    FAMILY.save(pipeline, tmp_path / "packed")
    loaded = FAMILY.load(str(tmp_path / "packed"))
    assert isinstance(loaded.unet.conv_out, layers.QuantConv2d)
    with torch.no_grad():
        expected = FAMILY.denoise(pipeline.unet, noisy, timestep, known)
        assert torch.equal(FAMILY.denoise(loaded.unet, noisy, timestep, known), expected)
    size = (tmp_path / "packed" / "unet" / f"{UNET}.safetensors").stat().st_size
    assert size < 0.4 * sum(p.numel() * 4 for p in FAMILY.tiny().unet.parameters())


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        FAMILY.save(FAMILY.tiny(), tmp_path / "file" / "model")


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(TunekitError, match='did you mean "sd15"'):
        families.get("sd1.5")
