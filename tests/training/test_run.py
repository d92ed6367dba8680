"""The accelerator of a run, and the denoiser with its memory levers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tunekit import families
from tunekit.adapters import add_adapter
from tunekit.config import AdapterConfig, MemoryConfig
from tunekit.errors import DeviceError
from tunekit.training.run import close_accelerator, open_accelerator, prepare_denoiser

FAMILY = families.get("sd15")


@pytest.fixture(autouse=True)
def clean_accelerate() -> Iterator[None]:
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fp16_on_the_cpu_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"memory\.precision=fp16 needs a GPU.*\n.*bf16"):
        open_accelerator(MemoryConfig(precision="fp16", device="cpu"), 4)


def test_precisions_follow_each_other_in_one_process() -> None:
    for precision, expected in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = open_accelerator(MemoryConfig(precision=precision, device="cpu"), 4)
        assert accelerator.mixed_precision == expected
        assert accelerator.device.type == "cpu"
        close_accelerator(accelerator)
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_adapter_tensor_moves(kind: str, checkpointing: bool, precision: str) -> None:
    """Behind frozen inputs the reentrant kind of checkpointing would give no gradients at all."""
    pipeline = FAMILY.tiny()
    memory = MemoryConfig(precision=precision, gradient_checkpointing=checkpointing, device="cpu")
    accelerator = open_accelerator(memory, 2)
    denoiser = prepare_denoiser(FAMILY.denoiser(pipeline), memory, frozen=True, device=accelerator.device)
    assert next(denoiser.parameters()).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    named = add_adapter(denoiser, AdapterConfig(kind=kind, rank=2, alpha=2.0), FAMILY.lora_targets)
    assert all(parameter.dtype == torch.float32 for _, parameter in named)
    before = {name: parameter.detach().clone() for name, parameter in named}
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-2, weight_decay=0)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    model.train()
    generator = torch.Generator().manual_seed(0)
    conditioning = FAMILY.encode_prompt(pipeline, ["one", "two"])
    for _ in range(2):  # lora_B starts at zero, so lora_A moves from the second step on
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        prediction = FAMILY.denoise(model, noisy, torch.tensor([10, 700]), conditioning)
        accelerator.backward(prediction.float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, parameter in named if torch.equal(parameter, before[name])]
    assert still == []


def test_checkpointing_does_not_change_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        pipeline = FAMILY.tiny()
        memory = MemoryConfig(gradient_checkpointing=checkpointing, device="cpu")
        denoiser = prepare_denoiser(pipeline.unet, memory, frozen=False, device=torch.device("cpu"))
        denoiser.train()
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        conditioning = FAMILY.encode_prompt(pipeline, ["one"])
        FAMILY.denoise(denoiser, noisy, torch.tensor([10]), conditioning).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in denoiser.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1])
