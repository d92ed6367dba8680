#!/usr/bin/env python3
"""Predicted against measured memory of real training steps; writes benchmarks/memory_<device>.json.

    python scripts/measure_memory.py                  # on the CPU: tiny and bundled models, a minute
    python scripts/measure_memory.py --device cuda    # SD 1.5 at 512 px and SDXL at 1024 px, random weights

Two optimizer steps run through the training loop. On the CPU the allocator's own record is read (not the size
of the process), on a GPU `max_memory_allocated` and `max_memory_reserved`. A grid, then ten configurations
drawn at random, so that nobody chose them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch import Tensor, nn

from tunekit import families, hardware
from tunekit.config import AdapterConfig, TrainConfig
from tunekit.families.blueprint import Blueprint
from tunekit.memory.allocator import replay
from tunekit.memory.job import Job, adapted, trace_step
from tunekit.memory.levers import trained
from tunekit.memory.trace import CPU, CUDA
from tunekit.optimizers import build
from tunekit.training.loop import train, weighted_mse

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Rows:
    """One micro-batch of anything."""

    ids: Sequence[str]
    inputs: dict[str, Any]
    noise: Tensor

    def to(self, device: torch.device) -> Rows:
        """They are where they should be."""
        return self


@dataclass(frozen=True)
class Same:
    """The same micro-batches in each step."""

    batch_size: int
    rows: Sequence[Rows]

    def step(self, step: int, rank: int, processes: int) -> Sequence[Rows]:
        """See `training.loop.Batches`."""
        return self.rows


def real(value: Any, device: str) -> Any:
    """Tensors with data in place of those without."""
    if isinstance(value, dict):
        return {key: real(item, device) for key, item in value.items()}
    return torch.zeros_like(value, device=device)


def loss(model: nn.Module, batch: Rows) -> Tensor:
    """Noise, prediction, error, as the recipes have them."""
    name, *_ = batch.inputs
    noisy = batch.inputs[name] * 0.5 + batch.noise * 0.5
    made = model(**{**batch.inputs, name: noisy}, return_dict=False)[0]
    return weighted_mse(made, batch.noise, torch.ones(len(made), device=made.device))


def measured(
    job: Job,
    denoiser: nn.Module,
    batches: Same,
    loss: Callable[[nn.Module, Any], Tensor],
    device: str,
) -> dict[str, Any]:
    """Peak of two optimizer steps in bytes, `allocated` and `reserved` (None on the CPU), and seconds."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    optimizer = build(job.optimizer, trained(denoiser), lr=1e-4, device=device)
    settings = TrainConfig(max_steps=2, lr=1e-4, batch_size=batches.batch_size)
    mixed = "no" if job.precision == "fp32" else job.precision

    def steps() -> None:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed)
        train(accelerator, denoiser, optimizer, batches, loss, settings, say=lambda line: None)

    started = time.perf_counter()
    try:
        if device == "cpu":
            return {"allocated": _peak_on_the_cpu(steps, denoiser), "reserved": None, "seconds": None}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        steps()
        torch.cuda.synchronize()
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "seconds": (time.perf_counter() - started) / 2,
        }
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def _peak_on_the_cpu(steps: Callable[[], None], denoiser: nn.Module) -> int:
    there = sum(t.numel() * t.element_size() for t in (*denoiser.parameters(), *denoiser.buffers()))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        steps()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return there + peak


def compare(
    job: Job, micro_batch: int, accumulation: int, checkpointed: bool | Collection[str], device: str
) -> dict[str, Any]:
    """One configuration, predicted and measured."""
    target = CPU if device == "cpu" else CUDA
    traced = trace_step(
        job, target, micro_batch=micro_batch, accumulation=accumulation, checkpointed=checkpointed
    ).trace
    predicted = traced.peak().size
    reserved = max(replay(traced.events).values()) if device != "cpu" else None
    torch.manual_seed(0)
    denoiser = adapted(job, device, checkpointed)
    inputs = real(job.blueprint.inputs(job.blueprint, micro_batch, *job.latents(job.size)), device)
    rows = Rows(["x"] * micro_batch, inputs, torch.zeros_like(next(iter(inputs.values()))))
    found = measured(job, denoiser, Same(micro_batch * accumulation, [rows] * accumulation), loss, device)
    if device == "cpu":  # they were there before the record began
        given = [rows.noise, *(t for t in inputs.values() if isinstance(t, Tensor))]
        found["allocated"] += sum(t.numel() * t.element_size() for t in given)
    del denoiser, inputs, rows
    gc.collect()
    row = {
        "model": job.blueprint.name,
        "trains": "adapter" if job.adapter else "all weights",
        "size": job.size[0],
        "precision": job.precision,
        "optimizer": job.optimizer,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "checkpointed": checkpointed if isinstance(checkpointed, bool) else len(checkpointed),
        "predicted_allocated_bytes": predicted,
        "predicted_reserved_bytes": reserved,
        "measured_allocated_bytes": found["allocated"],
        "measured_reserved_bytes": found["reserved"],
        "seconds_per_step": found["seconds"],
        "error_allocated": round(predicted / found["allocated"] - 1, 5),
        "error_reserved": round(reserved / found["reserved"] - 1, 5) if reserved else None,
    }
    print(json.dumps(row), flush=True)
    return row


def space(device: str) -> list[tuple[Blueprint, int, str]]:
    """Model, side of the pictures, and precision of what is measured."""
    if device == "cpu":
        tiny, bundled = (families.blueprint_of("sd15", name) for name in ("tiny", "builtin/emoji-64"))
        return [(tiny, 64, "fp32"), (tiny, 128, "fp32"), (bundled, 64, "fp32")]
    made = [families.BLUEPRINTS.get(name) for name in ("sd15", "sdxl")]
    return [(made[0], 512, "bf16"), (made[0], 512, "fp32"), (made[1], 1024, "bf16")]


def main() -> None:
    """Measures the grid and ten random configurations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random configurations")
    args = parser.parse_args()
    device = args.device
    adapter = AdapterConfig(rank=16, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0"])

    def job(model: Blueprint, side: int, precision: str, learns: AdapterConfig | None, how: str) -> Job:
        return Job(model, learns, how, precision, (side, side))

    grid = []
    for (model, side, precision), learns, size, twice in itertools.product(
        space(device), (adapter, None), (1, 4), (False, True)
    ):
        if device == "cpu" or learns is not None or model.name == "sd15":
            grid.append(compare(job(model, side, precision, learns, "adamw"), size, 1, twice, device))
    draw = random.Random(args.seed)
    drawn = []
    for _ in range(10):
        model, side, precision = draw.choice(space(device))
        learns = draw.choice(
            [adapter, AdapterConfig(rank=8, alpha=8), AdapterConfig(kind="dora", rank=4, alpha=4)]
        )
        chosen = job(model, side, precision, learns, draw.choice(["adamw", "adamw8bit"]))
        size, accumulation = draw.choice([1, 2, 3, 6]), draw.choice([1, 2, 4])
        units = trace_step(chosen, CPU, micro_batch=1).units
        twice = tuple(name for name in units if draw.random() < 0.5)
        drawn.append(compare(chosen, size, accumulation, twice, device))
    errors = [row["error_allocated"] for row in (*grid, *drawn)]
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": hardware.probe(device).title,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft)},
        "error_allocated": {"least": min(errors), "most": max(errors)},
        "grid": grid,
        "drawn_at_random": drawn,
    }
    file = ROOT / f"benchmarks/memory_{device.partition(':')[0]}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{file}: errors of allocated {min(errors):+.2%} to {max(errors):+.2%}")


if __name__ == "__main__":
    main()
