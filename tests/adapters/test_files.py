"""The files of an adapter: what they say, and which are refused."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from tunekit import families
from tunekit.adapters import (
    adapter_file,
    load_adapter,
    merge_adapter,
    read_adapter,
)
from tunekit.config import AdapterConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError, OutputError
from tunekit.families import Family

Trained = Callable[[Family, AdapterConfig], Any]
Save = Callable[..., tuple[Path, Path]]
Predict = Callable[[Family, Any], Tensor]
Load = Callable[[Any, Path], None]

PEFT = "pytorch_lora_weights.safetensors"
KOHYA = "style.kohya.safetensors"
LORA, DORA = AdapterConfig(rank=4, alpha=10.0), AdapterConfig(kind="dora", rank=4, alpha=3.0)
SD15 = families.get("sd15")
SAID = {  # what kohya's tools and modelspec call the bases
    "sd15": ("sd_v1", "False", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "True", "stable-diffusion-v2-768-v/lora"),
    "sdxl": ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    "flux": ("flux1", "False", "flux-1-dev/lora"),
}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
State = dict[str, Tensor]


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("name", SAID)
def test_what_the_bases_are_called(name: str) -> None:
    facts = families.planned(name).facts
    architecture = f"{facts.modelspec_architecture}/lora"
    assert (facts.ss_base_model_version, str(facts.ss_v2), architecture) == SAID[name]


def test_the_headers_say_what_other_programs_ask(
    family: Family, tmp_path: Path, trained: Trained, save: Save
) -> None:
    facts, name = family.facts, family.facts.denoiser_name
    peft, other = save(tmp_path, trained(family, LORA), family, LORA, base_source="owner/base")
    settings = json.loads(header(peft)["lora_adapter_metadata"])
    assert settings[f"{name}.r"] == settings[f"{name}.lora_alpha"] == 4  # alpha / rank is within the weights
    assert settings[f"{name}.use_dora"] is False
    said = header(other)
    assert (said["ss_base_model_version"], said["ss_v2"]) == (facts.ss_base_model_version, str(facts.ss_v2))
    assert said["ss_network_module"] == "networks.lora"
    alpha = "4.0" if facts.denoiser.dotted else "10.0"  # it is within those weights too
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", alpha)
    for said in (header(peft), header(other)):
        assert said["format"] == "pt"
        assert said["modelspec.sai_model_spec"] == "1.0.1"
        assert said["modelspec.architecture"] == f"{facts.modelspec_architecture}/lora"
        assert said["modelspec.title"] == "A style"
        assert said["ss_sd_model_name"] == "owner/base"


def test_the_modelspec_hash_is_that_of_the_tensors(tmp_path: Path, trained: Trained, save: Save) -> None:
    for file in save(tmp_path, trained(SD15, LORA), SD15, LORA):
        content = file.read_bytes()
        tensors = content[8 + int.from_bytes(content[:8], "little") :]
        assert header(file)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_nothing_private_is_written(tmp_path: Path, tiny_source: Path, trained: Trained, save: Save) -> None:
    for base in (str(tiny_source), "./models/secret", "~/secret", "a/secret/model"):
        files = save(tmp_path / "out", trained(SD15, LORA), SD15, LORA, base_source=base)
        for file in files:
            assert "secret" not in str(header(file)) and str(tiny_source) not in str(header(file))
            assert str(tmp_path) not in str(header(file))


def test_saving_again_gives_the_same_files(tmp_path: Path, trained: Trained, save: Save) -> None:
    for folder in ("one", "two"):
        save(tmp_path / folder, trained(SD15, DORA), SD15, DORA)
    for file in (PEFT, KOHYA):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained, save: Save
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="no space left"):
        save(tmp_path / "out", trained(SD15, LORA), SD15, LORA)
    assert list((tmp_path / "out").iterdir()) == []


def test_there_must_be_an_adapter_to_save(tmp_path: Path, save: Save) -> None:
    with pytest.raises(AdapterError, match="no adapter in the denoiser"):
        save(tmp_path, SD15.tiny(), SD15, LORA)


# What is refused --------------------------------------------------------------------------------------------


def write(file: Path, state: State, **metadata: Any) -> Path:
    safetensors.torch.save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, file, metadata=metadata or None
    )
    return file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, trained: Trained, save: Save) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder, trained(SD15, DORA), SD15, DORA)
    return folder


def refused(source: Path, **options: Any) -> str:
    pipeline = SD15.tiny()
    before = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        merge_adapter(pipeline, SD15, source, **options)
    assert all(torch.equal(before[key], tensor) for key, tensor in pipeline.unet.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",  # Flux, kohya
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",  # SD3 and Flux, PEFT
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",  # SDXL
        "unet.down_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",  # a larger U-Net
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",  # a second text encoder
    ],
)
def test_keys_of_another_family(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "other.safetensors", {key: torch.zeros(2, 32)})
    message = refused(file)
    assert message.count("\n") == 1
    assert str(file) in message and key in message and "another model family" in message


@pytest.fixture(scope="module")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, save: Save
) -> dict[str, tuple[Any, tuple[Path, Path]]]:
    """Family -> a base that nothing changes, and both files of an adapter."""
    made = {}
    for name in families.runnable():
        family = families.get(name)
        files = save(tmp_path_factory.mktemp(name), trained(family, LORA), family, LORA)
        made[name] = family.tiny(), files
    return made


@pytest.mark.parametrize(("base", "other"), list(permutations(families.runnable(), 2)))
def test_an_adapter_of_another_family_is_refused_by_name(
    base: str, other: str, adapters: dict[str, tuple[Any, tuple[Path, Path]]]
) -> None:
    family, made_for = families.get(base), families.get(other)
    for file in adapters[other][1]:
        with pytest.raises(AdapterError) as caught:
            read_adapter(adapters[base][0], family, file)
        message = str(caught.value)
        assert f"made for {made_for.facts.title}, and this is {family.facts.title}" in message
        assert str(file) in message and message.count("\n") == 1


def damaged(good: Path, tmp_path: Path, change: Callable[[State], Any], file: str = PEFT) -> Path:
    state = safetensors.torch.load_file(good / file)
    change(state)
    return write(tmp_path / "a.safetensors", state, **header(good / file))


@pytest.mark.parametrize("file", [PEFT, KOHYA])
def test_damaged_files(good: Path, tmp_path: Path, file: str) -> None:
    key = next(
        key
        for key in safetensors.torch.load_file(good / file)
        if key.endswith(("lora_B.weight", "lora_up.weight"))
    )

    def nan(state: State) -> None:
        state[key].view(-1)[0] = float("nan")

    assert f"{key} holds NaN" in refused(damaged(good, tmp_path, nan, file))
    assert "has no lora_" in refused(damaged(good, tmp_path, lambda state: state.pop(key), file))
    wide = damaged(
        good,
        tmp_path,
        lambda state: state.update({key: state[key].repeat(2, *[1] * (state[key].ndim - 1))}),
        file,
    )
    assert "another base" in refused(wide)
    if file == PEFT:  # its header says that all modules have one
        magnitude = next(k for k in safetensors.torch.load_file(good / file) if "magnitude" in k)
        without = damaged(good, tmp_path, lambda state: state.pop(magnitude), file)
        assert "say DoRA, and 1 modules of unet have no lora_magnitude_vector" in refused(without)


def test_what_is_no_adapter(tmp_path: Path, tiny_source: Path, trained: Trained) -> None:
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "found none" in refused(tmp_path)
    text = tmp_path / "a.safetensors"
    text.write_text("hello")
    assert "not a safetensors file" in refused(text)
    assert "no LoRA or DoRA adapter" in refused(tiny_source / "unet" / "diffusion_pytorch_model.safetensors")
    state = {f"unet.{LAYER}.lora_{part}.weight": torch.zeros(32, 32) for part in "AB"}
    assert "not JSON" in refused(write(tmp_path / "a.safetensors", state, lora_adapter_metadata="{"))


def test_a_folder_with_one_file_or_many(good: Path, tmp_path: Path) -> None:
    assert adapter_file(good) == good / PEFT
    shutil.copy(good / KOHYA, tmp_path / "one.safetensors")
    assert adapter_file(tmp_path) == tmp_path / "one.safetensors"
    shutil.copy(good / KOHYA, tmp_path / "two.safetensors")
    with pytest.raises(AdapterError, match=r"found one\.safetensors, two\.safetensors"):
        adapter_file(tmp_path)


def test_pickles(good: Path, tmp_path: Path, predict: Predict) -> None:
    file = tmp_path / "a.bin"
    torch.save(safetensors.torch.load_file(good / KOHYA), file)
    assert "any program" in refused(file)
    pipeline = SD15.tiny()
    merge_adapter(pipeline, SD15, file, allow_pickle=True)
    expected = SD15.tiny()
    merge_adapter(expected, SD15, good)
    assert relative_error(predict(SD15, pipeline), predict(SD15, expected)) < 1e-6

    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    torch.save({"weight": Trap()}, file)
    assert "more than weights" in refused(file, allow_pickle=True)
    assert not trace.exists()


def test_nothing_is_logged_about_unused_keys(
    good: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        load_adapter(SD15.tiny(), SD15, good)
    assert not caplog.records and not capsys.readouterr().err


def test_who_applies_a_dora_of_kohya_rightly_is_said(
    tmp_path: Path, trained: Trained, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scale is that of LyCORIS: |W + BA| by rows. Others use other lengths, or none."""
    _, kohya = save(tmp_path, trained(SD15, DORA), SD15, DORA, name="said")
    said = header(kohya)
    assert said["ss_network_module"] == "lycoris.kohya"
    assert json.loads(said["ss_network_args"])["dora_wd"] == "True"
    for text in (said["modelspec.usage_hint"], capsys.readouterr().err):
        assert "LyCORIS" in text and "ComfyUI" in text and "merged model" in text
    _, plain = save(tmp_path, trained(SD15, LORA), SD15, LORA)
    assert "modelspec.usage_hint" not in header(plain) and not capsys.readouterr().err


def test_facts_of_the_training_are_in_the_kohya_file(tmp_path: Path, trained: Trained, save: Save) -> None:
    conv = AdapterConfig(rank=4, alpha=2.0, targets=["conv1"])
    peft, kohya = save(tmp_path, trained(SD15, conv), SD15, conv, facts={"ss_steps": "20"})
    said = header(kohya)
    assert said["ss_steps"] == "20" and "ss_steps" not in header(peft)
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2.0"}
