"""The accelerator of a run, and the denoiser with its memory levers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tunekit import families
from tunekit.config import AdapterConfig, MemoryConfig
from tunekit.errors import DeviceError
from tunekit.families import Family, Frame
from tunekit.memory.levers import Fitted, Levers, fit
from tunekit.training.run import close_accelerator, open_accelerator

FAMILY = families.get("sd15")
ADAPTER = AdapterConfig(rank=2, alpha=2.0)


@pytest.fixture(autouse=True)
def clean_accelerate() -> Iterator[None]:
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


def fitted(
    family: Family, pipeline: Any, memory: MemoryConfig, adapter: AdapterConfig | None, seed: int = 0
) -> Fitted:
    levers = Levers.of(memory)
    return fit(family.denoiser(pipeline), adapter, family.facts, levers, device="cpu", seed=seed)


def predicted(
    family: Family, pipeline: Any, model: Any, noisy: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    """What a denoiser makes of latents at timesteps of their own."""
    frames = Frame.whole(*family.default_size(pipeline)).rows(len(prompts))
    told = family.conditioning(family.encode_prompt(pipeline, prompts), frames)
    return family.denoise(model, noisy, torch.tensor([10.0, 700.0])[: len(noisy)], told)


def test_fp16_on_the_cpu_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"memory\.precision=fp16 needs a GPU.*\n.*bf16"):
        open_accelerator(MemoryConfig(precision="fp16", device="cpu"), 4)


@pytest.mark.parametrize(
    ("adapter", "mixed"), [(ADAPTER, "no"), (None, "bf16")], ids=["float32 masters", "autocast"]
)
def test_precisions_follow_each_other_in_one_process(adapter: AdapterConfig | None, mixed: str) -> None:
    """A bf16 adapter has float32 masters and needs no autocast; all weights in bf16 do."""
    for precision, expected in (("bf16", mixed), ("fp32", "no")):
        accelerator = open_accelerator(MemoryConfig(precision=precision, device="cpu"), 4, adapter)
        assert accelerator.mixed_precision == expected
        assert accelerator.device.type == "cpu"
        close_accelerator(accelerator)
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_adapter_tensor_moves(
    family: Family,
    kind: str,
    checkpointing: bool,
    precision: str,
    unread: Callable[[Family], frozenset[str]],
) -> None:
    """Behind frozen inputs the reentrant kind of checkpointing would give no gradients at all."""
    pipeline = family.tiny()
    memory = MemoryConfig(precision=precision, gradient_checkpointing=checkpointing, device="cpu")
    adapter = AdapterConfig(kind=kind, rank=2, alpha=2.0)
    accelerator = open_accelerator(memory, 2, adapter)
    made = fitted(family, pipeline, memory, adapter)
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {parameter.dtype for parameter in made.module.parameters()} == {low}
    assert all(parameter.dtype == torch.float32 for parameter in made.parameters.values())
    assert made.has_masters == (precision == "bf16")
    learned = {name for name, parameter in made.module.named_parameters() if parameter.requires_grad}
    assert learned == set(made.parameters)
    before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
    optimizer = torch.optim.AdamW(made.parameters.values(), lr=1e-2, weight_decay=0)
    model, optimizer = accelerator.prepare(made.module, optimizer)
    model.train()
    generator, shape = torch.Generator().manual_seed(0), family.latent_shape(pipeline, 32, 32)
    for _ in range(2):  # lora_B starts at zero, so lora_A moves from the second step on
        noisy = torch.randn(2, *shape, generator=generator)
        prediction = predicted(family, pipeline, model, noisy, ["one", "two"])
        accelerator.backward(prediction.float().square().mean())
        optimizer.step()
        made.write_back()
        optimizer.zero_grad()
    still = [name for name, parameter in made.parameters.items() if torch.equal(parameter, before[name])]
    assert {name.partition(".lora_")[0] for name in still} <= unread(family)
    for name, parameter in made.module.named_parameters():
        if name in learned:
            assert torch.equal(parameter, made.parameters[name].to(low)), name


def test_the_seed_decides_the_first_weights_of_the_adapter() -> None:
    memory = MemoryConfig(device="cpu")
    one, same, other = (
        fitted(FAMILY, FAMILY.tiny(), memory, ADAPTER, seed=seed).parameters for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_checkpointing_does_not_change_gradients(family: Family) -> None:
    gradients = []
    for checkpointing in (False, True):
        pipeline = family.tiny()
        memory = MemoryConfig(gradient_checkpointing=checkpointing, device="cpu")
        denoiser = fitted(family, pipeline, memory, None).module
        denoiser.train()
        shape = family.latent_shape(pipeline, 32, 32)
        noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        predicted(family, pipeline, denoiser, noisy, ["one"]).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in denoiser.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1])
