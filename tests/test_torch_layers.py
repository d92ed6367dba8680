"""tunekit/layers.py: packed weights, and layers that differ from the config."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tunekit import families, layers
from tunekit.config import AdapterConfig
from tunekit.errors import MissingPackageError, ModelError
from tunekit.passes.prunable import find

FAMILY = families.get("sd15")
SCHEMES = ["int8", "fp8", "int4", "nf4"]
# Relative error of normally distributed weights; theory for 8 bits is near 0.006, for 3 of mantissa near
# 0.026, for 4 bits near 0.09.
WEIGHT_ERROR = {"int8": 0.01, "fp8": 0.03, "int4": 0.10, "nf4": 0.11}
BITS = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4}
BOTH = [
    nn.Linear(96, 40),
    nn.Linear(32, 24, bias=False),
    nn.Conv2d(12, 20, 3, padding=1, stride=2),
    nn.Conv2d(16, 8, 1),
]


def normal(layer: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return layer


def example(layer: nn.Module) -> torch.Tensor:
    channels = layer.weight.shape[1]
    shape = (2, channels, 10, 10) if isinstance(layer, nn.Conv2d) else (2, 7, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).detach().norm() / reference.detach().norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", BOTH, ids=lambda layer: f"{type(layer).__name__}{list(layer.weight.shape)}")
def test_a_packed_weight_is_small_and_near(layer: nn.Module, scheme: layers.Scheme):
    layer = normal(layer)
    packed = layers.quantize_layer(layer, scheme)
    assert relative(packed.weight, layer.weight) < WEIGHT_ERROR[scheme]
    rows, columns = layer.weight.flatten(1).shape
    padded = -(-columns // 32) * 32  # rows of int4 are whole groups, nf4 is whole blocks
    assert packed.packed.nbytes <= rows * padded * BITS[scheme] / 8 + 32
    assert "weight" not in packed.state_dict() and isinstance(packed, type(layer))
    x = example(layer)
    assert relative(packed(x), layer(x)) < 1.5 * WEIGHT_ERROR[scheme]
    plain = layers.dequantize_layer(packed)
    assert torch.allclose(plain(x), packed(x), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", BOTH, ids=lambda layer: f"{type(layer).__name__}{list(layer.weight.shape)}")
def test_gradients_go_through_and_only_the_packed_weight_is_kept(layer: nn.Module, scheme: layers.Scheme):
    packed = layers.quantize_layer(normal(layer), scheme).requires_grad_(False)
    plain = layers.dequantize_layer(packed).requires_grad_(False)
    x = example(layer)
    kept: list[torch.Tensor] = []
    gradients = []
    for module in (packed, plain):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            output = module(leaf)
        if module is packed:
            assert not [t for t in kept if t.is_floating_point() and t.numel() >= layer.weight.numel()]
        output.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_values_on_the_grid_survive_exactly():
    layer = nn.Linear(64, 8)
    grid = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    grid[:, ::32] = -8.0  # the extreme of every group
    layer.weight.data = grid * 0.25
    assert torch.equal(layers.quantize_layer(layer, "int4").weight, layer.weight)
    layer.weight.data = torch.arange(-127, 129, 4).float().repeat(8, 1) / 127
    layer.weight.data[:, 0] = 1.0
    assert torch.allclose(layers.quantize_layer(layer, "int8").weight, layer.weight, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_all_zero_weight_stays_zero(scheme: layers.Scheme):
    layer = nn.Linear(64, 4)
    nn.init.zeros_(layer.weight)
    assert not layers.quantize_layer(layer, scheme).weight.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_leaves_scales_alone(scheme: layers.Scheme):
    packed = layers.quantize_layer(normal(nn.Linear(64, 16)), scheme)
    packed.scale.mul_(1e-6)  # half precision has no such numbers
    scale, values = packed.scale.clone(), packed.packed.clone()
    packed.half()
    assert packed.bias.dtype == torch.float16
    assert packed.scale.dtype == scale.dtype and torch.equal(packed.scale, scale)
    assert torch.equal(packed.packed, values)


def test_autocast_is_followed():
    packed = layers.quantize_layer(normal(nn.Linear(64, 16)), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("int8_dynamic", (2, 37, 96)),
        ("int8_rotated", (64, 96)),
        ("int8_dynamic", (96,)),
        ("fp8_dynamic", (64, 96)),
    ],
)
def test_a_kernel_gives_what_float_products_of_the_rounded_values_give(
    scheme: layers.Scheme, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """torch multiplies floats of 8 bits on a processor too, only slowly, which is enough to see it done."""
    packed = layers.quantize_layer(normal(nn.Linear(96, 48)), scheme).requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(layers, "_multiply", lambda x, weight: None)
    wanted = packed(x)
    monkeypatch.undo()
    if scheme == "fp8_dynamic":
        assert layers.hardware.multiplies_fp8(torch.device("cpu")) is False
        monkeypatch.setattr(layers.hardware, "multiplies_fp8", lambda device: True)
    assert torch.allclose(packed(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_overflows_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.full((32, 32), 32767))
    layers._multiplies_int8.cache_clear()
    assert not layers._multiplies_int8("cpu")
    monkeypatch.undo()
    layers._multiplies_int8.cache_clear()


def test_an_adapter_trains_on_a_packed_base():
    from tunekit.adapters import add_adapter

    pipeline = FAMILY.tiny()
    denoiser = FAMILY.denoiser(pipeline)
    layers.quantize(denoiser, "int4")
    parameters = add_adapter(denoiser, AdapterConfig(rank=2, alpha=2), FAMILY.facts.lora_targets)
    noisy, conditioning = torch.randn(1, 4, 16, 16), FAMILY.encode_prompt(pipeline, ["a"])
    for _ in range(2):  # lora_B starts at zero, so lora_A has no gradient before the second step
        FAMILY.denoise(denoiser, noisy, torch.tensor([5.0]), conditioning).square().mean().backward()
        with torch.no_grad():
            for _, parameter in parameters:
                parameter -= 0.1 * parameter.grad
    assert all(parameter.grad.abs().max() > 0 for _, parameter in parameters)
    assert all(not p.requires_grad for n, p in denoiser.named_parameters() if "lora" not in n)


def test_bitsandbytes_missing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"bitsandbytes.*install .*\[quant\]") as caught:
        layers.quantize_layer(nn.Linear(64, 4), "nf4")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_packed_is_left_alone():
    reflecting = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Linear(32, 32), reflecting, nn.GroupNorm(4, 16), nn.Linear(32, 32))
    assert layers.quantize(model, "int8", keep=["3"]) == ["0"]
    assert layers.quantize(model, "int8", keep=["-1"]) == []
    with pytest.raises(ModelError, match="GroupNorm cannot be quantized"):
        layers.quantize_layer(model[2], "int8")


def test_a_negative_index_counts_from_the_end():
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    assert layers.under("up_blocks.1.resnets.0.conv1", denoiser, ["up_blocks.-1"])
    assert layers.under("up_blocks.1", denoiser, ["up_blocks.-1"])
    assert not layers.under("up_blocks.0.resnets.0.conv1", denoiser, ["up_blocks.-1"])
    assert not layers.under("conv_in_more", denoiser, ["conv_in"])


# A model on disk -------------------------------------------------------------------------------------------


def outputs(denoiser: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    states = torch.randn(2, 9, 32, generator=generator)
    with torch.no_grad():
        return FAMILY.denoise(denoiser, noisy, torch.tensor([7, 700]), {"encoder_hidden_states": states})


def test_an_ordinary_model_needs_no_description(tmp_path: Path):
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    assert layers.describe(denoiser) is None
    layers.save_denoiser(denoiser, tmp_path)
    assert not layers.has_custom_layers(tmp_path)
    assert torch.equal(outputs(type(denoiser).from_pretrained(tmp_path)), outputs(denoiser))


def read(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The denoiser that `save_denoiser` wrote into a folder."""
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        made = FAMILY.facts.denoiser.type.from_config(config)
    layers.describe_onto(made, folder)
    tensors = safetensors.torch.load_file(folder / layers.WEIGHTS)
    return layers.read_weights(made, tensors.items(), dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_and_quantized_comes_back_the_same(tmp_path: Path, scheme: layers.Scheme):
    denoiser = FAMILY.denoiser(FAMILY.tiny()).requires_grad_(False)
    for item in find(denoiser, ["feed_forward", "heads", "resnet"]):
        item.keep(range(0, item.count, 2))
    layers.quantize(denoiser, scheme, keep=["conv_in"])
    layers.save_denoiser(denoiser, tmp_path)
    again = read(tmp_path)
    assert layers.has_custom_layers(tmp_path)
    assert layers.describe(again) == layers.describe(denoiser)
    assert torch.equal(outputs(again), outputs(denoiser))
    half = read(tmp_path, torch.float16)
    assert half.conv_in.weight.dtype == torch.float16
    assert half.conv_out.scale.dtype == denoiser.conv_out.scale.dtype


def test_quantizing_a_layer_is_undone_and_done_again():
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    layers.quantize(denoiser, "int8", keep=["conv_in"])
    described, wanted = layers.describe(denoiser), outputs(denoiser)
    packed = [name for name, layer in denoiser.named_modules() if hasattr(layer, "packed")]
    for name in packed:
        parent, _, leaf = name.rpartition(".")
        floats = layers.dequantize_layer(denoiser.get_submodule(name))
        setattr(denoiser.get_submodule(parent), leaf, floats)
    assert layers.describe(denoiser) is None and torch.allclose(outputs(denoiser), wanted, atol=1e-5)
    assert sorted(layers.quantize(denoiser, "int8", only=packed)) == sorted(packed)
    assert layers.describe(denoiser) == described
    assert torch.allclose(outputs(denoiser), wanted, atol=1e-4)


def test_a_description_of_another_model_is_refused(tmp_path: Path):
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    layers.quantize(denoiser, "int8")
    layers.save_denoiser(denoiser, tmp_path)
    described = json.loads((tmp_path / layers.FILE).read_text())
    for broken, message in (
        ({**described, "version": 99}, "version 99"),
        ({**described, "shapes": {"no.such.block": {"heads": 1}}}, "no.such.block"),
        ({**described, "quantized": {}}, "do not fit"),
    ):
        (tmp_path / layers.FILE).write_text(json.dumps(broken))
        with pytest.raises(ModelError, match=message):
            read(tmp_path)


def test_the_stored_type_is_read_from_the_files(tmp_path: Path):
    denoiser = FAMILY.denoiser(FAMILY.tiny())
    assert layers.stored_dtype(tmp_path) == torch.float32
    layers.save_denoiser(denoiser.half(), tmp_path)
    assert layers.stored_dtype(tmp_path) == torch.float16
