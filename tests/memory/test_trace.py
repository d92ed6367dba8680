"""What is predicted on tensors without data is what a real run takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.adapters import add_adapter
from tunekit.config import AdapterConfig, TrainConfig
from tunekit.families.blueprint import Blueprint
from tunekit.memory.job import Job, trace_encode, trace_preview, trace_step
from tunekit.memory.levers import apply_levers, checkpoint_units, trained
from tunekit.memory.trace import CPU, CUDA, Tracer
from tunekit.optimizers import build
from tunekit.training.loop import train, weighted_mse

ADAPTER = AdapterConfig(rank=4, alpha=4)
SIZE = (64, 64)


@pytest.fixture(scope="module")
def tiny() -> Blueprint:
    return families.blueprint_of("sd15", "tiny")


@dataclass
class Rows:
    ids: Sequence[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    told: Tensor

    def to(self, device: torch.device) -> Rows:
        return self


@dataclass
class Same:
    """The same samples in each step."""

    batch_size: int
    rows: list[Rows]

    def step(self, step: int, rank: int, processes: int) -> list[Rows]:
        return self.rows


def measured(job: Job, micro_batch: int, accumulation: int, checkpointed: Any) -> int:
    """Peak of bytes that the CPU allocator has handed out during two steps of the real loop."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    family = families.get("sd15")
    pipeline = family.tiny()
    denoiser, objective = family.denoiser(pipeline), family.objective(pipeline)
    apply_levers(denoiser, job.precision, checkpointed, frozen=job.adapter is not None)
    if job.adapter:
        add_adapter(denoiser, job.adapter, family.lora_targets)
    h, w = job.latents(job.size)
    tokens, width = job.blueprint.tokens[0], int(job.blueprint.denoiser.config["cross_attention_dim"])
    rows = [
        Rows(
            ["x"] * micro_batch,
            torch.randn(micro_batch, 4, h, w),
            torch.randn(micro_batch, 4, h, w),
            torch.zeros(micro_batch, dtype=torch.long),
            torch.randn(micro_batch, tokens, width),
        )
        for _ in range(accumulation)
    ]

    def loss(model: nn.Module, batch: Rows) -> Tensor:
        noisy, target, weight = objective.sample(batch.latents, batch.noise, batch.timesteps)
        known = {"encoder_hidden_states": batch.told}
        return weighted_mse(family.denoise(model, noisy, batch.timesteps, known), target, weight)

    optimizer = build(job.optimizer, trained(denoiser), lr=1e-4)
    static = sum(t.numel() * t.element_size() for t in (*denoiser.parameters(), *denoiser.buffers()))
    inputs = sum(t.numel() * t.element_size() for t in (rows[0].latents, rows[0].noise, rows[0].told))
    settings = TrainConfig(max_steps=2, lr=1e-4, batch_size=micro_batch * accumulation)
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            train(
                Accelerator(cpu=True),
                denoiser,
                optimizer,
                Same(micro_batch * accumulation, rows),
                loss,
                settings,
                say=lambda line: None,
            )
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return static + inputs + peak


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("micro_batch", "accumulation"), [(1, 1), (2, 2), (8, 1)])
def test_prediction_equals_a_real_run_on_the_cpu(
    tiny: Blueprint, adapter: AdapterConfig | None, checkpointed: bool, micro_batch: int, accumulation: int
) -> None:
    job = Job(tiny, adapter, size=SIZE)
    traced = trace_step(
        job, CPU, micro_batch=micro_batch, accumulation=accumulation, checkpointed=checkpointed
    )
    predicted = traced.trace.peak().size
    real = measured(job, micro_batch, accumulation, checkpointed)
    print(f"predicted {predicted:,}, measured {real:,} bytes: {predicted / real - 1:+.2%}")
    assert abs(predicted / real - 1) < 0.01


def test_a_part_of_the_units(tiny: Blueprint) -> None:
    job = Job(tiny, ADAPTER, size=SIZE)
    units = trace_step(job, CPU, micro_batch=4).units
    chosen = units[:3] + units[-2:]
    predicted = trace_step(job, CPU, micro_batch=4, checkpointed=chosen).trace.peak().size
    real = measured(job, 4, 1, chosen)
    print(f"{len(chosen)} of {len(units)} units: {predicted / real - 1:+.2%}")
    assert abs(predicted / real - 1) < 0.01


def test_checkpointed_units_change_no_gradient(tiny: Blueprint) -> None:
    family = families.get("sd15")
    denoiser = family.denoiser(family.tiny()).train()
    other = copy.deepcopy(denoiser)
    names = [name for name, module in denoiser.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    checkpoint_units(other, names[::2])
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 48, 32)
    for module in (denoiser, other):
        module(*inputs, return_dict=False)[0].square().mean().backward()
    for (name, one), two in zip(denoiser.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name


def test_random_units_draw_the_same_twice(tiny: Blueprint) -> None:
    family = families.get("sd15")
    gradients = []
    for checkpointed in (False, True):
        denoiser = apply_levers(family.denoiser(family.tiny()), "fp32", checkpointed, frozen=True)
        add_adapter(denoiser, AdapterConfig(rank=4, alpha=4, dropout=0.5), family.lora_targets)
        denoiser.train()
        torch.manual_seed(0)
        inputs = torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 48, 32)
        denoiser(*inputs, return_dict=False)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in trained(denoiser)])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_bytes_are_affine_in_the_micro_batch(tiny: Blueprint) -> None:
    job = Job(tiny, ADAPTER, size=SIZE)
    one, two, four = (trace_step(job, CPU, micro_batch=b).trace.peak().size for b in (1, 2, 4))
    assert four == pytest.approx(one + 3 * (two - one), rel=1e-3)


def test_the_ledger_adds_up_and_names_what_is_there(tiny: Blueprint) -> None:
    trace = trace_step(Job(tiny, ADAPTER, precision="bf16", size=SIZE), CUDA, micro_batch=2).trace
    peak = trace.peak()
    assert sum(peak.ledger.values()) == peak.size
    assert {"base weights", "adapter", "optimizer state", "activations"} <= set(peak.ledger)
    second = trace.peak("optimizer").ledger
    assert second["gradients"] == pytest.approx(second["adapter"], rel=0.01)
    assert second["optimizer state"] == pytest.approx(2 * second["adapter"], rel=0.05)
    assert trace.phases()[0] == "start"


def test_attention_keeps_no_score_matrix_unless_the_card_has_no_kernel(tiny: Blueprint) -> None:
    job = Job(tiny, ADAPTER, precision="bf16", size=(128, 128))
    flash, efficient, mathematical = (
        trace_step(job, replace(CUDA, attention=kind), micro_batch=1).trace.peak().size
        for kind in ("flash", "efficient", "math")
    )
    assert flash == pytest.approx(efficient, rel=0.02)
    assert mathematical > 1.5 * flash


def test_autocast_keeps_less_than_float32(tiny: Blueprint) -> None:
    full, half = (
        trace_step(Job(tiny, ADAPTER, precision=name, size=SIZE), CUDA, micro_batch=4).trace.peak().size
        for name in ("fp32", "bf16")
    )
    assert half < 0.8 * full


def test_previews_and_encoding(tiny: Blueprint) -> None:
    job = Job(tiny, ADAPTER, size=SIZE, preview=SIZE)
    preview = trace_preview(job, CUDA, held=1_000_000)
    assert preview.phases() == ["start", "preview forward", "preview decode"]
    assert preview.peak("preview decode").ledger["VAE"] > 0
    assert preview.peak().ledger["optimizer state"] >= 1_000_000
    assert trace_encode(job, CUDA).peak("encode").ledger["text encoders"] > 0


def test_a_storage_is_born_once_and_dies_once() -> None:
    with Tracer(CPU) as tracer:
        made = torch.empty(1000)
        view = made[10:]
        del made
        view.mul_(2)
        del view
    sizes = [event.size for event in tracer.events if abs(event.size) == 4000]
    assert sizes == [4000, -4000]
