"""Where weights come from, and what is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tunekit import families, layers
from tunekit.errors import ModelError, OutputError, TunekitError
from tunekit.families.loading import source_files
from tunekit.resources import Source

FAMILY = families.get("sd15")
UNET = "diffusion_pytorch_model"


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that may be damaged."""
    return shutil.copytree(tiny_source, tmp_path / "model")


def load(source: Any, dtypes: Any = torch.float32, *, pack: str = "", **how: Any) -> Any:
    return FAMILY.load(Source(str(source), **how), dtypes, pack=pack)


def refused(source: Any, *, pack: str = "", **how: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, pack=pack, **how)
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
    ("content", "words"), [("{", "not JSON"), ("[]", "settings by name"), ("{}", "_class_name")]
)
def test_a_damaged_index(folder: Path, content: str, words: str) -> None:
    (folder / "model_index.json").write_text(content)
    assert words in refused(folder)


def test_another_pipeline_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "PixArtSigmaPipeline"))
    message = refused(folder)
    assert "PixArtSigmaPipeline" in message and "Stable Diffusion 1.x" in message
    with pytest.raises(ModelError, match=r"no family loads the pipeline class .PixArt.*\n.*known:.*FluxPipe"):
        families.detect(str(folder))


@pytest.mark.parametrize(
    ("name", "expected"), [("FluxPipeline", "flux"), ("StableDiffusion3Pipeline", "sd3")]
)
def test_a_pipeline_of_a_family_that_is_planned_only(folder: Path, name: str, expected: str) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", name))
    assert families.detect(str(folder)) == expected
    assert name in refused(folder)


@pytest.mark.parametrize("name", families.runnable())
def test_the_family_of_a_folder_is_told(name: str, tmp_path: Path) -> None:
    """Stable Diffusion 1 and 2 share their pipeline's class; the U-Net's configuration tells them apart."""
    family = families.get(name)
    family.save(family.tiny(), tmp_path / "model")
    assert families.detect(tmp_path / "model") == name
    assert families.detect(Source(str(tmp_path / "model"))) == name
    kind = family.facts.pipeline_class
    others = [other for other in families.runnable() if families.get(other).facts.pipeline_class != kind]
    for other in others:
        with pytest.raises(ModelError, match=f"holds a {kind}, which is not"):
            families.get(other).load(str(tmp_path / "model"))


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
    loaded = load(folder, variant="fp16")
    assert torch.equal(loaded.unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)


# --- types, shards and packing ----------------------------------------------------------------------------


def halved(name: str, folder: Path) -> Any:
    """A tiny pipeline of a family, and its files in float16, as bases are published."""
    family = families.get(name)
    made = family.tiny()
    for part in family.facts.components:
        if part.role != "scheduler":
            getattr(made, part.name).half()
    family.save(made, folder)
    return made


def networks(family: families.Family, pipeline: Any) -> dict[str, torch.nn.Module]:
    return {p.name: getattr(pipeline, p.name) for p in family.facts.components if p.role != "scheduler"}


def shard(folder: Path, family: families.Family, variant: str | None = None) -> dict[str, int]:
    """Write the weights of all networks again, each in four files at least; returns in how many."""
    pipeline = family.load(str(folder))
    counts = {}
    for name, network in networks(family, pipeline).items():
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        sizes = sorted(tensor.nbytes for tensor in network.state_dict().values())
        quarter = sum(sizes[:-1]) // 4  # the largest, which may be most of it, fills one by itself
        network.save_pretrained(folder / name, max_shard_size=quarter, variant=variant)
        counts[name] = len(list((folder / name).glob("*.safetensors")))
    return counts


@pytest.mark.parametrize("name", families.runnable())
def test_each_component_is_read_in_its_own_type(name: str, tmp_path: Path) -> None:
    family = families.get(name)
    made = networks(family, halved(name, tmp_path))
    wanted = family.facts.dtypes(torch.bfloat16)
    loaded = family.load(str(tmp_path), wanted)
    assert wanted[family.facts.denoiser_name] == torch.bfloat16 and wanted["vae"] == torch.float32
    for part, network in networks(family, loaded).items():
        for key, value in network.state_dict().items():
            kind = wanted[part] if value.is_floating_point() else torch.int64  # such as a count of batches
            assert value.dtype == kind, f"{part}.{key}"
            assert torch.equal(value, made[part].state_dict()[key].to(kind)), f"{part}.{key}"


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", families.runnable())
def test_shards_are_read_like_one_file(name: str, variant: str | None, tmp_path: Path) -> None:
    family = families.get(name)
    family.save(family.tiny(), tmp_path)
    counts = shard(tmp_path, family, variant)
    print(name, counts)
    assert min(counts.values()) > 3
    source = Source(str(tmp_path), variant=variant)
    files = source_files(source, family.facts)
    for part, count in counts.items():
        assert len(files[part]) == count and all(file.is_file() for file in files[part])
    own = networks(family, family.tiny())
    for pack in ("", "int8"):
        loaded = networks(family, family.load(source, pack=pack))
        for part, network in loaded.items():
            expected = own[part]
            if pack and part == family.facts.denoiser_name:
                layers.quantize(expected, "int8", only=layers.block_linears(expected))
            for key, value in expected.state_dict().items():
                assert torch.equal(network.state_dict()[key], value), f"{part}.{key}"


def test_a_variant_that_one_component_lacks_is_read_without_it(folder: Path) -> None:
    """As diffusers does it: such as a text encoder that was never published in fp16."""
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    loaded = load(folder, variant="fp16", pack="int8")
    files = source_files(Source(str(folder), variant="fp16"), FAMILY.facts)
    assert [file.name for file in files["unet"]] == [f"{UNET}.fp16.safetensors"]
    assert [file.name for file in files["text_encoder"]] == ["model.safetensors"]
    assert files["vae"][0].name == f"{UNET}.safetensors" and files["scheduler"] == ()
    assert torch.equal(loaded.unet.conv_in.weight, FAMILY.tiny().unet.conv_in.weight)


def test_files_are_known_of_folders_alone(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    for source in ("tiny", "somebody/else", str(folder / "model.safetensors")):
        assert source_files(Source(source), FAMILY.facts) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("name", families.runnable())
def test_packed_while_read_is_packed_afterwards(
    name: str, scheme: layers.Scheme, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit, and from what the files say, whatever the rest of the network computes in."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    family = families.get(name)
    halved(name, tmp_path)
    whole = family.denoiser(family.load(str(tmp_path)))
    packed = layers.quantize(whole, scheme, only=layers.block_linears(whole))
    read = family.denoiser(family.load(str(tmp_path), family.facts.dtypes(dtype), pack=scheme))
    assert packed and {n for n, m in read.named_modules() if isinstance(m, layers.QuantLinear)} == set(packed)
    assert not read.training and not any(p.requires_grad for p in read.parameters())
    for key, value in whole.state_dict().items():
        other = read.state_dict()[key]
        if key.rpartition(".")[2] in ("packed", "scale"):
            assert other.dtype == value.dtype and torch.equal(other, value), key
        else:
            assert other.dtype == dtype and torch.equal(other, value.to(dtype)), key


def test_a_pruned_folder_is_packed_while_it_is_read(tmp_path: Path) -> None:
    pipeline = FAMILY.tiny()
    block = pipeline.unet.mid_block.attentions[0].transformer_blocks[0]
    wide, layer = block.ff.net[0].proj, block.ff.net[2]
    bias = torch.nn.Parameter(wide.bias[:64].detach())
    block.ff.net[0].proj = layers.resized(wide, wide.weight[:64].detach(), bias)
    block.ff.net[2] = layers.resized(layer, layer.weight[:, :32].detach(), layer.bias)
    FAMILY.save(pipeline, tmp_path)
    assert layers.has_custom_layers(tmp_path / "unet")
    read = load(tmp_path, pack="int8").unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    expected = layers.quantize_layer(block.ff.net[2], "int8")
    assert isinstance(read, layers.QuantLinear) and read.shape == (layer.out_features, 32)
    assert torch.equal(read.packed, expected.packed) and torch.equal(read.scale, expected.scale)


def test_what_is_packed_already_stays_as_it_is(tmp_path: Path) -> None:
    pipeline = FAMILY.tiny()
    layers.quantize(pipeline.unet, "int8", only=layers.block_linears(pipeline.unet))
    FAMILY.save(pipeline, tmp_path)
    read = load(tmp_path, pack="nf4").unet.state_dict()
    assert all(torch.equal(read[key], value) for key, value in pipeline.unet.state_dict().items())


def test_weights_that_do_not_fit_are_named_while_they_are_packed(folder: Path) -> None:
    edit(folder / "unet" / f"{UNET}.safetensors", lambda tensors: tensors.pop("conv_in.bias"))
    assert "missing conv_in.bias" in refused(folder, pack="int8")


MEASURE = """
import re, sys, threading, time
from pathlib import Path

import torch

from tunekit import families


def held():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])


family = families.get("sd15")
family.load(sys.argv[2], family.facts.dtypes(torch.bfloat16))  # imports, and whatever else is made once
before = highest = held()
done = threading.Event()


def watch():
    global highest
    while not done.wait(0.0005):
        highest = max(highest, held())


watcher = threading.Thread(target=watch)
watcher.start()
pipeline = family.load(sys.argv[1], family.facts.dtypes(torch.bfloat16), pack=sys.argv[3])
done.set()
watcher.join()
parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
size = sum(t.numel() * t.element_size() for part in parts for t in part.state_dict().values())
print(size, highest - before)
"""


@pytest.fixture(scope="module")
def medium(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with a U-Net of 250 MB in float16."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("medium")
    shutil.copytree(tiny_source, folder, dirs_exist_ok=True)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(192, 384, 640),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=32,
    )
    network.half().save_pretrained(folder / "unet")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("pack", ["", "int8"])
def test_loading_holds_little_more_than_the_model(medium: Path, tiny_source: Path, pack: str) -> None:
    """float16 files become bfloat16 tensor by tensor: the network is never there in float32."""
    # The allocator gives back at once what is freed, so that the kernel counts what is in use.
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(medium), str(tiny_source), pack],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    size, peak = (int(word) for word in ran.stdout.split())
    print(f"{pack or 'bf16'}: {size / 1e6:.0f} MB of weights, {peak / 1e6:.0f} MB at the highest")
    assert size > 200e6
    assert peak < 1.3 * size


# --- pickles ----------------------------------------------------------------------------------------------


def test_a_pickle_in_a_folder_is_refused(folder: Path) -> None:
    pickle = pickled(folder)
    message = refused(folder)
    assert str(pickle) in message and "any program" in message and "allow_pickle" in message


def test_a_pickle_is_opened_if_allowed(folder: Path) -> None:
    pickled(folder)
    loaded = load(folder, allow_pickle=True)
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
    same(load(file))
    assert load(file, torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_single_file_in_fp16_keeps_its_values(
    folder: Path, tiny_checkpoint: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Read as it was written, then each network is given its own type: rounded once at most."""
    halves = {key: tensor.half() for key, tensor in tiny_checkpoint.items()}
    file = folder.with_suffix(".safetensors")
    safetensors.torch.save_file(halves, file)
    wanted = FAMILY.facts.dtypes(dtype)
    loaded, own = load(file, wanted), FAMILY.tiny()
    for name in ("unet", "vae", "text_encoder"):
        kind = dtype if name == "unet" else torch.float32
        assert wanted[name] == kind
        for key, tensor in getattr(own, name).state_dict().items():
            read = getattr(loaded, name).state_dict()[key]
            assert read.dtype == kind
            assert torch.equal(read, tensor.half().to(kind)), f"{name}.{key}"


def test_a_single_file_of_two_types_loses_nothing(folder: Path, tiny_checkpoint: dict[str, Tensor]) -> None:
    """Merges have some parts in float32, such as the VAE."""
    mixed = {k: v if k.startswith("first_stage") else v.half() for k, v in tiny_checkpoint.items()}
    file = folder.with_suffix(".safetensors")
    safetensors.torch.save_file(mixed, file)
    loaded, own = load(file), FAMILY.tiny()
    for name in ("unet", "vae", "text_encoder"):
        for key, tensor in getattr(own, name).state_dict().items():
            expected = tensor if name == "vae" else tensor.half().float()
            assert torch.equal(getattr(loaded, name).state_dict()[key], expected), f"{name}.{key}"


def test_an_allowed_checkpoint_file(folder: Path, tiny_checkpoint: dict[str, Tensor]) -> None:
    file = folder.with_suffix(".ckpt")
    torch.save({"state_dict": tiny_checkpoint}, file)
    same(load(file, allow_pickle=True))


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
    FAMILY.save(load(tiny_source), tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tiny_source) not in file.read_text(encoding="utf-8"), file
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8"))


def test_saving_twice_gives_the_same_files(tiny_source: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    FAMILY.save(load(tiny_source), again)
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
    same(load(folder))
    short = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
    safetensors.torch.save_file(short, file, metadata={"format": "pt"})
    same(load(folder))
    half = load(folder, torch.bfloat16)
    assert half.text_encoder.dtype == torch.bfloat16 and not half.text_encoder.training


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4", "nf4"])
def test_quantized_layers_survive(tmp_path: Path, scheme: layers.Scheme) -> None:
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    pipeline = FAMILY.tiny()
    layers.quantize(pipeline.unet, scheme)
    draw = torch.Generator().manual_seed(0)
    noisy, timestep = torch.randn(1, 4, 16, 16, generator=draw), torch.tensor([5])
    known = FAMILY.encode_prompt(pipeline, ["a"])
    FAMILY.save(pipeline, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
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
