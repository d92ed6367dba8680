"""A small part of scripts/measure_memory.py --device cuda: prediction against a GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tunekit import families, planning
from tunekit.config import AdapterConfig, load
from tunekit.diffusion.batch import Batch
from tunekit.memory.job import Job
from tunekit.memory.levers import Levers
from tunekit.memory.step import adapted, trace_step
from tunekit.memory.trace import CPU

pytestmark = pytest.mark.gpu

ADAPTER = AdapterConfig(rank=16, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0"])
BASE = families.sizes_of("sd15", families.planned("sd15").facts.default_source)


def job(adapter: AdapterConfig | None = ADAPTER, **fields: Any) -> Job:
    return Job(BASE, adapter, **{"precision": "bf16", "size": (512, 512), **fields})


@pytest.fixture(scope="module")
def units() -> tuple[str, ...]:
    return trace_step(replace(job(), size=(64, 64)), CPU).units


HALF, ALL = "half of the units", "all units"


def named(levers: Levers, units: tuple[str, ...]) -> Levers:
    """With module paths in place of `HALF` and `ALL`."""
    known = {HALF: units[: len(units) // 2], ALL: units}
    return replace(
        levers,
        gradient_checkpointing=known.get(levers.gradient_checkpointing, levers.gradient_checkpointing),
        offload=known.get(levers.offload, levers.offload),
    )


@pytest.mark.parametrize(
    ("what", "levers"),
    [
        (job(), Levers("bf16")),
        (job(precision="fp32"), Levers("fp32")),
        (job(precision="fp16"), Levers("fp16")),
        (job(), Levers("bf16", gradient_checkpointing=HALF)),
        (job(), Levers("bf16", gradient_checkpointing=True)),
        (job(), Levers("bf16", gradient_checkpointing=True, keep_attention=True)),
        (job(), Levers("bf16", "int8", gradient_checkpointing=True)),
        (job(), Levers("bf16", "fp8", gradient_checkpointing=True)),
        (job(), Levers("bf16", "nf4", gradient_checkpointing=True)),
        (job(), Levers("bf16", gradient_checkpointing=True, offload=ALL)),
        (job(None, optimizer="adamw8bit"), Levers("bf16", gradient_checkpointing=True)),
        (
            job(None, optimizer="adamw8bit", max_grad_norm=None),
            Levers("bf16", gradient_checkpointing=True, optimizer_in_backward=True),
        ),
    ],
    ids=lambda value: value.optimizer if isinstance(value, Job) else None,
)
def test_predicted_is_measured(script: Any, units: tuple[str, ...], what: Job, levers: Levers) -> None:
    """Allocated within 3 %, reserved within 5 %, never under by more than 1 %."""
    row = script.compare(what, named(levers, units), "cuda")
    assert -0.01 < row["error_allocated"] < 0.03
    assert -0.01 < row["error_reserved"] < 0.05


@pytest.mark.parametrize("phase", ["encode", "preview"])
def test_other_phases(script: Any, phase: str) -> None:
    row = script.compare_phase(job(preview=(512, 512)), phase, "cuda")
    assert -0.01 < row["error_allocated"] < 0.03


def test_step_times_are_in_the_predicted_order(script: Any, units: tuple[str, ...]) -> None:
    """Nothing checkpointed, a half, all."""
    times = [
        script.compare(job(), Levers("bf16", micro_batch=4, gradient_checkpointing=chosen), "cuda")[
            "seconds_per_step"
        ]
        for chosen in (False, units[: len(units) // 2], True)
    ]
    print([round(time / times[0], 3) for time in times])
    assert times == sorted(times)


def test_weights_that_visit_give_the_same_gradients(units: tuple[str, ...]) -> None:
    """Copies run on another stream than the computation; several passes, so that a race would show."""
    small = replace(job(precision="fp32"), size=(128, 128))
    torch.manual_seed(0)
    plain = adapted(small, Levers("fp32", gradient_checkpointing=True), "cuda")
    moved = adapted(small, Levers("fp32", gradient_checkpointing=True, offload=units), "cuda")
    state = {name: value.cpu() for name, value in copy.deepcopy(plain.module.state_dict()).items()}
    moved.module.load_state_dict(state)
    batch = small.batch(2)
    drawn = [
        {name: torch.randn(value.shape, device="cuda") for name, value in part.items()}
        for part in (batch.rows, batch.conditioning)
    ]
    drawn[0]["timesteps"] = torch.tensor([10.0, 900.0], device="cuda")
    batch = Batch(batch.ids, *drawn)
    for _ in range(4):
        gradients = []
        for fitted in (plain, moved):
            small.task_of(fitted).loss(fitted.module, batch)["loss"].mean().backward()
            gradients.append([p.grad.clone() for p in fitted.parameters.values()])
            for parameter in fitted.parameters.values():
                parameter.grad = None
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_plan_fits_in_a_capped_process() -> None:
    """The card is made small, and a run that was planned for it stays inside."""
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        loaded = load("sd15/lora", ("model.source=tiny", "data.resolution=64"), stand_in="(pictures)")
        _, plan = planning.settle(loaded.config)
        assert plan is not None
        total = torch.cuda.get_device_properties(0).total_memory
        assert plan.budget_bytes <= 0.1 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
