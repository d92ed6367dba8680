"""Adapters mean the same in the model, in both files, and in plain diffusers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from tunekit import families, layers
from tunekit.adapters import (
    Delta,
    adapter_file,
    adapter_state,
    add_adapter,
    load_adapter,
    load_adapter_state,
    merge_adapter,
    read_adapter,
    save_adapter,
    to_kohya,
)
from tunekit.config import AdapterConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.errors import AdapterError, OutputError
from tunekit.families import Family
from tunekit.runtime import generate_pixels, torch_runtime

PEFT = "pytorch_lora_weights.safetensors"
KOHYA = "style.kohya.safetensors"
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "time_emb_proj"]
CONFIGS = {
    "lora": AdapterConfig(rank=4, alpha=10.0),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=3.0),
    "lora on convolutions": AdapterConfig(rank=3, alpha=4.0, targets=["to_q", *CONVOLUTIONS]),
    "dora on convolutions": AdapterConfig(kind="dora", rank=3, targets=["to_q", *CONVOLUTIONS]),
}
SD15 = families.get("sd15")


def train(parameters: list[tuple[str, torch.nn.Parameter]], seed: int = 0) -> None:
    """Move every parameter, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def trained(family: Family, config: AdapterConfig, base: Any = None) -> Any:
    pipeline = base or family.tiny()
    train(add_adapter(family.denoiser(pipeline), config, family.lora_targets))
    family.denoiser(pipeline).eval()
    return pipeline


def save(
    folder: Path, pipeline: Any, family: Family, config: AdapterConfig, **options: Any
) -> tuple[Path, Path]:
    return save_adapter(
        folder, family.denoiser(pipeline), family, config, **{"name": "style", "title": "A style", **options}
    )


@torch.no_grad()
def predict(family: Family, pipeline: Any) -> Tensor:
    shape = family.latent_shape(pipeline, *family.default_size(pipeline))
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    known = family.encode_prompt(pipeline, ["a", "b"])
    return family.denoise(family.denoiser(pipeline), noisy, torch.tensor([9, 800]), known)


# --- every family -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=families.FAMILIES.names())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_trains_in_fp32(family: Family, kind: str) -> None:
    pipeline = family.tiny()
    before = predict(family, pipeline)
    parameters = add_adapter(family.denoiser(pipeline), AdapterConfig(kind=kind, rank=2), family.lora_targets)
    assert relative_error(predict(family, pipeline), before) < 1e-6
    assert {p.dtype for _, p in parameters} == {torch.float32}
    trainable = {n for n, p in family.denoiser(pipeline).named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in parameters}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_base_keeps_an_fp32_adapter(family: Family, dtype: torch.dtype) -> None:
    pipeline = family.load("tiny", dtype=dtype)
    parameters = add_adapter(family.denoiser(pipeline), AdapterConfig(rank=2), family.lora_targets)
    assert {p.dtype for _, p in parameters} == {torch.float32}
    assert next(p.dtype for p in family.denoiser(pipeline).parameters() if not p.requires_grad) == dtype


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_adapter_tensor_gets_a_gradient(family: Family, kind: str) -> None:
    pipeline = trained(family, AdapterConfig(kind=kind, rank=2))
    denoiser = family.denoiser(pipeline)
    shape = family.latent_shape(pipeline, *family.default_size(pipeline))
    noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    family.denoise(
        denoiser, noisy, torch.tensor([9]), family.encode_prompt(pipeline, ["a"])
    ).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initial_weights_depend_on_the_seed_and_the_path_alone(family: Family) -> None:
    def state(seed: int, targets: list[str] | None = None) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # the global state is of no influence
        denoiser = family.denoiser(family.tiny())
        add_adapter(denoiser, AdapterConfig(rank=2, targets=targets), family.lora_targets, seed=seed)
        return adapter_state(denoiser)

    before = torch.random.get_rng_state()
    first, again, other = state(0), state(0), state(1)
    torch.random.set_rng_state(before)
    fewer = state(0, [family.lora_targets[0]])
    downs = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not torch.equal(first[key], other[key]) for key in downs)
    assert all(torch.equal(first[key], tensor) for key, tensor in fewer.items()) and len(fewer) < len(first)
    bound = 1 / first[downs[0]].flatten(1).shape[1] ** 0.5  # Kaiming with a = sqrt(5)
    assert 0.8 * bound < first[downs[0]].abs().max() <= bound


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("file", [PEFT, KOHYA])
def test_both_files_give_back_what_was_trained(family: Family, kind: str, file: str, tmp_path: Path) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=10.0)
    pipeline = trained(family, config)
    save(tmp_path, pipeline, family, config)
    loaded, merged = family.tiny(), family.tiny()
    load_adapter(loaded, family, tmp_path / file)
    expected = predict(family, pipeline)
    assert torch.equal(predict(family, loaded), expected)
    count = merge_adapter(merged, family, tmp_path / file)
    assert count == sum("lora_A" in key for key in adapter_state(family.denoiser(pipeline)))
    assert relative_error(predict(family, merged), expected) < 1e-5
    assert relative_error(predict(family, family.tiny()), expected) > 0.05


def test_state_goes_out_and_in(family: Family) -> None:
    pipeline = trained(family, CONFIGS["dora"])
    state = {key: tensor.clone() for key, tensor in adapter_state(family.denoiser(pipeline)).items()}
    fresh = family.tiny()
    add_adapter(family.denoiser(fresh), CONFIGS["dora"], family.lora_targets)
    load_adapter_state(family.denoiser(fresh), state)
    assert torch.equal(predict(family, fresh), predict(family, pipeline))
    key = next(iter(state))
    with pytest.raises(AdapterError, match=r"shape \[1\]"):
        load_adapter_state(family.denoiser(fresh), {**state, key: torch.zeros(1)})
    del state[key]
    with pytest.raises(AdapterError, match=key.replace(".", r"\.")):
        load_adapter_state(family.denoiser(fresh), state)


# --- plain diffusers --------------------------------------------------------------------------------------


def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(5)
    return pipeline(
        "a cat", num_inference_steps=2, guidance_scale=3.0, generator=draw, output_type="pt"
    ).images


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained adapter, by the name of its config."""
    folder = tmp_path_factory.mktemp("saved") / request.param
    save(folder, trained(SD15, CONFIGS[request.param]), SD15, CONFIGS[request.param])
    return folder


@pytest.fixture(scope="module")
def of_base(tiny_source: Path) -> Tensor:
    return picture(SD15.load(str(tiny_source)))


def load_in_diffusers(pipeline: Any, adapter: Path) -> None:
    import diffusers

    if diffusers.__version__ >= "0.42":
        pipeline.load_lora_weights(str(adapter))
    else:  # asks for the name when there is no network
        file = adapter / PEFT if adapter.is_dir() else adapter
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)


@pytest.mark.parametrize("file", ["", PEFT, KOHYA], ids=["folder", "peft", "kohya"])
def test_plain_diffusers_draws_the_same(tiny_source: Path, of_base: Tensor, saved: Path, file: str) -> None:
    from diffusers import StableDiffusionPipeline

    if saved.name.startswith("dora") and file == KOHYA:
        pytest.skip("diffusers leaves the DoRA scale out of kohya files")
    loaded = SD15.load(str(tiny_source))
    load_adapter(loaded, SD15, saved / file)
    ours = generate_pixels(torch_runtime(SD15, loaded), ["a cat"], seeds=[5], steps=2, guidance=3.0)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_source, safety_checker=None)
    load_in_diffusers(pipeline, saved / file)
    theirs = picture(pipeline)
    print(f"largest difference {(ours - theirs).abs().max():.1e}")
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - of_base).abs().max() > 0.1


@pytest.mark.parametrize("file", [PEFT, KOHYA])
def test_alpha_other_than_rank_has_its_effect_in_plain_diffusers(tmp_path: Path, file: str) -> None:
    """The update of a layer, by hand, against what diffusers folds into the weight."""
    config = AdapterConfig(rank=4, alpha=10.0)
    pipeline = trained(SD15, config)
    state = adapter_state(pipeline.unet)
    save(tmp_path, pipeline, SD15, config)
    merged = SD15.tiny()
    load_in_diffusers(merged, tmp_path / file)
    merged.fuse_lora()
    merged.unload_lora_weights()
    before, after = SD15.tiny().unet.state_dict(), merged.unet.state_dict()
    for path in sorted({key.rsplit(".lora_", 1)[0] for key in state}):
        down, up = state[f"{path}.lora_A.weight"].flatten(1), state[f"{path}.lora_B.weight"].flatten(1)
        update = after[f"{path}.weight"] - before[f"{path}.weight"]
        assert relative_error(update.flatten(1), 10.0 / 4 * up @ down) < 1e-5, path


# --- the files --------------------------------------------------------------------------------------------


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_the_headers_say_what_other_programs_ask(tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=10.0)
    peft, kohya = save(tmp_path, trained(SD15, config), SD15, config, base_source="owner/base")
    said = json.loads(header(peft)["lora_adapter_metadata"])
    assert said["unet.r"] == 4 and said["unet.lora_alpha"] == 10.0 and said["unet.use_dora"] is False
    assert header(peft)["format"] == "pt"
    said = header(kohya)
    assert said["ss_base_model_version"] == "sd_v1"
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_v2"]) == ("4", "10.0", "False")
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.title"] == "A style"
    assert said["ss_sd_model_name"] == "owner/base"


def test_the_modelspec_hash_is_that_of_the_tensors(tmp_path: Path) -> None:
    import hashlib

    _, kohya = save(tmp_path, trained(SD15, CONFIGS["lora"]), SD15, CONFIGS["lora"])
    content = kohya.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert header(kohya)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_nothing_private_is_written(tmp_path: Path, tiny_source: Path) -> None:
    for base in (str(tiny_source), "./models/secret", "~/secret", "a/secret/model"):
        files = save(
            tmp_path / "out", trained(SD15, CONFIGS["lora"]), SD15, CONFIGS["lora"], base_source=base
        )
        for file in files:
            assert "secret" not in str(header(file)) and str(tiny_source) not in str(header(file))
            assert str(tmp_path) not in str(header(file))


def test_kohya_names_and_shapes(tmp_path: Path) -> None:
    config = AdapterConfig(kind="dora", rank=4, alpha=10.0, targets=["to_q", "conv1"])
    _, file = save(tmp_path, trained(SD15, config), SD15, config)
    state = safetensors.torch.load_file(file)
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert state[f"{linear}.lora_down.weight"].shape == (4, 32)
    assert state[f"{linear}.lora_up.weight"].shape == (32, 4)
    assert state[f"{linear}.dora_scale"].shape == (32, 1)
    assert state[f"{linear}.alpha"].shape == () and state[f"{linear}.alpha"] == 10
    convolution = "lora_unet_mid_block_resnets_0_conv1"
    assert state[f"{convolution}.lora_down.weight"].shape == (4, 64, 3, 3)
    assert state[f"{convolution}.lora_up.weight"].shape == (64, 4, 1, 1)
    assert state[f"{convolution}.dora_scale"].shape == (64, 1, 1, 1)
    assert all(key.startswith("lora_unet_") for key in state)


def test_saving_again_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save(tmp_path / folder, trained(SD15, CONFIGS["dora"]), SD15, CONFIGS["dora"])
    for file in (PEFT, KOHYA):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write_bytes(path, content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="no space left"):
        save(tmp_path / "out", trained(SD15, CONFIGS["lora"]), SD15, CONFIGS["lora"])
    assert list((tmp_path / "out").iterdir()) == []


def test_there_must_be_an_adapter_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter in the denoiser"):
        save(tmp_path, SD15.tiny(), SD15, CONFIGS["lora"])


# --- files of others --------------------------------------------------------------------------------------

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.1.self_attn.q_proj"
State = dict[str, Tensor]


def random_pair(rank: int, rows: int = 32, columns: int = 32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)


def write(file: Path, state: State, **metadata: Any) -> Path:
    safetensors.torch.save_file(
        {k: t.contiguous() for k, t in state.items()}, file, metadata=metadata or None
    )
    return file


def only(deltas: dict[str, dict[str, Delta]]) -> Delta:
    ((_, updates),) = deltas.items()
    ((_, delta),) = updates.items()
    return delta


@pytest.mark.parametrize(("alpha", "expected"), [(None, 6.0), (1.5, 1.5)])
def test_kohya_alpha(tmp_path: Path, alpha: float | None, expected: float) -> None:
    name = "lora_unet_" + LAYER.replace(".", "_")
    down, up = random_pair(6)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(alpha)
    delta = only(read_adapter(SD15.tiny(), SD15, write(tmp_path / "a.safetensors", state)))
    assert (delta.rank, delta.alpha) == (6, expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6.0),
        ({"lora_alpha": 3}, 3.0),
        ({"lora_alpha": 3, "alpha_pattern": {LAYER: 12}}, 12.0),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 5, "to_k": 7}}, 5.0),
        ({"lora_alpha": 3, "use_rslora": True}, 3.0 * 6**0.5),
    ],
)
def test_peft_alpha(tmp_path: Path, settings: dict[str, Any], expected: float) -> None:
    down, up = random_pair(6)
    state = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    extra = (
        {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
        if settings
        else {}
    )
    delta = only(read_adapter(SD15.tiny(), SD15, write(tmp_path / "a.safetensors", state, **extra)))
    assert delta.alpha == pytest.approx(expected)


def test_ranks_and_alphas_may_differ_by_layer(tmp_path: Path) -> None:
    state: State = {}
    for path, rank, alpha in ((LAYER, 2, 1.0), (LAYER.replace("to_q", "to_k"), 4, 8.0)):
        name = "lora_unet_" + path.replace(".", "_")
        down, up = random_pair(rank)
        state |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    file = write(tmp_path / "a.safetensors", state)
    loaded, merged = SD15.tiny(), SD15.tiny()
    load_adapter(loaded, SD15, file)
    assert merge_adapter(merged, SD15, file) == 2
    assert relative_error(predict(SD15, loaded), predict(SD15, merged)) < 1e-5
    assert to_kohya(read_adapter(SD15.tiny(), SD15, file), SD15).keys() == state.keys()


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "text_encoder."])
def test_text_encoder_adapters_of_either_spelling(tmp_path: Path, prefix: str) -> None:
    """Files say `text_model`, which is a level of the module in transformers 4 and none in transformers 5."""
    down, up = random_pair(2)
    if prefix.startswith("lora"):
        name = prefix + f"text_model.{TEXT}".replace(".", "_")
        state = {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(2.0),
        }
    else:
        name = f"{prefix}text_model.{TEXT}"
        state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    file = write(tmp_path / "a.safetensors", state)
    loaded, merged, base = SD15.tiny(), SD15.tiny(), SD15.tiny()
    load_adapter(loaded, SD15, file)
    merge_adapter(merged, SD15, file)

    def encode(pipeline: Any) -> Tensor:
        return SD15.encode_prompt(pipeline, ["a"])["encoder_hidden_states"]

    assert relative_error(encode(loaded), encode(merged)) < 1e-5
    assert relative_error(encode(loaded), encode(base)) > 0.01


def test_a_quantized_base_takes_an_adapter(tmp_path: Path) -> None:
    config = CONFIGS["lora"]
    save(tmp_path, trained(SD15, config), SD15, config)

    def packed() -> Any:
        pipeline = SD15.tiny()
        layers.quantize(pipeline.unet, "int8")
        return pipeline

    loaded, merged = packed(), packed()
    load_adapter(loaded, SD15, tmp_path)
    merge_adapter(merged, SD15, tmp_path)
    module = merged.unet.get_submodule(LAYER)
    assert isinstance(module, layers.QuantLinear) and module.scheme == "int8"
    assert relative_error(predict(SD15, merged), predict(SD15, loaded)) < 0.02
    assert relative_error(predict(SD15, merged), predict(SD15, packed())) > 0.1


# --- what is refused --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder, trained(SD15, CONFIGS["dora"]), SD15, CONFIGS["dora"])
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
def test_an_adapter_of_another_family(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "other.safetensors", {key: torch.zeros(2, 32)})
    message = refused(file)
    assert message.count("\n") == 1
    assert str(file) in message and key in message and "another model family" in message


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
    magnitude = next(
        k for k in safetensors.torch.load_file(good / file) if "magnitude" in k or "dora_scale" in k
    )
    assert "some have none" in refused(damaged(good, tmp_path, lambda state: state.pop(magnitude), file))


def test_what_is_no_adapter(tmp_path: Path, tiny_source: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "found none" in refused(tmp_path)
    text = tmp_path / "a.safetensors"
    text.write_text("hello")
    assert "not a safetensors file" in refused(text)
    assert "no LoRA or DoRA adapter" in refused(tiny_source / "unet" / "diffusion_pytorch_model.safetensors")
    down, up = random_pair(2)
    state = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    assert "not JSON" in refused(write(tmp_path / "a.safetensors", state, lora_adapter_metadata="{"))
    with pytest.raises(AdapterError, match="there is an adapter in this model already"):
        add_adapter(trained(SD15, CONFIGS["lora"]).unet, CONFIGS["lora"], SD15.lora_targets)


def test_a_folder_with_one_file_or_many(good: Path, tmp_path: Path) -> None:
    assert adapter_file(good) == good / PEFT
    shutil.copy(good / KOHYA, tmp_path / "one.safetensors")
    assert adapter_file(tmp_path) == tmp_path / "one.safetensors"
    shutil.copy(good / KOHYA, tmp_path / "two.safetensors")
    with pytest.raises(AdapterError, match=r"found one\.safetensors, two\.safetensors"):
        adapter_file(tmp_path)


def test_pickles(good: Path, tmp_path: Path) -> None:
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


def test_a_target_that_is_not_there() -> None:
    with pytest.raises(AdapterError, match=r'target "to_qq".*\n.*to_q'):
        add_adapter(SD15.tiny().unet, AdapterConfig(targets=["to_qq"]), SD15.lora_targets)


def test_nothing_is_logged_about_unused_keys(good: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_adapter(SD15.tiny(), SD15, good)
    assert not caplog.records
