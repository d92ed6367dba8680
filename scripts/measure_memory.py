#!/usr/bin/env python3
"""Predicted against measured memory of real training steps; writes benchmarks/memory_<device>.json.

    python scripts/measure_memory.py                  # on the CPU: tiny and bundled models, a minute
    python scripts/measure_memory.py --device cuda    # SD 1.5 at 512 px and SDXL at 1024 px, random weights

A few optimizer steps run through the training loop, with each lever; a picture and a caption are encoded, a
preview is drawn. On the CPU the allocator's own record is read (not the size of the process), on a GPU
`max_memory_allocated` and `max_memory_reserved`. A grid, then ten configurations drawn at random, so that
nobody chose them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch import Tensor, nn
from tunekit.families.blueprint import Blueprint

from tunekit import families, hardware
from tunekit.config import AdapterConfig, TrainConfig
from tunekit.memory.allocator import replay
from tunekit.memory.job import Job, adapted, trace_encode, trace_preview, trace_step
from tunekit.memory.levers import Fitted, Levers, autocast_of, step_in_backward
from tunekit.memory.measure import Measured, Meter
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


@dataclass
class Same:
    """The same micro-batches in each step."""

    batch_size: int
    rows: Sequence[Rows]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the rows hold."""
        held = [(rows.noise, *rows.inputs.values()) for rows in self.rows]
        return [item for one in held for item in one if isinstance(item, Tensor)]

    def step(self, step: int, rank: int, processes: int) -> Sequence[Rows]:
        """See `training.loop.Batches`."""
        return self.rows


@dataclass
class Timed(Same):
    """Also times the steps on a GPU; the first three warm up."""

    started: float = 0.0
    seconds: float = 0.0

    def step(self, step: int, rank: int, processes: int) -> Sequence[Rows]:
        """Waits for the step before."""
        if step in (3, 7):
            torch.cuda.synchronize()
        if step == 3:
            self.started = time.perf_counter()
        elif step == 7:
            self.seconds = (time.perf_counter() - self.started) / 4
        return self.rows


def quiet(line: str) -> None:
    """Says nothing."""


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


def fixed(denoiser: Fitted) -> list[Tensor]:
    """What is on the device before a step: weights and masters, without what stays on the host."""
    host = {id(tensor) for tensor in denoiser.host.tensors} if denoiser.host else set()
    module = denoiser.module
    own = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in host]
    return [*own, *denoiser.parameters.values()]


def measured(
    job: Job, fitted: Fitted, batches: Same, loss: Callable[[nn.Module, Any], Tensor], device: str
) -> tuple[Measured, float]:
    """Peak of two optimizer steps, and seconds of a later one (of both on the CPU)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    in_backward = fitted.optimizer_in_backward
    optimizer = build(
        job.optimizer, fitted.parameters.values(), lr=1e-4, device=device, per_parameter=in_backward
    )
    if in_backward:
        step_in_backward(optimizer)
    settings = TrainConfig(
        max_steps=2 if device == "cpu" else 8,
        lr=1e-4,
        batch_size=batches.batch_size,
        max_grad_norm=job.max_grad_norm,
        log_every=1000,
    )
    meter = Meter(torch.device(device), lambda: [*fixed(fitted), *batches.tensors])
    rows = list(batches.rows)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision=autocast_of(job.precision, job.adapter)
        )
        if device != "cpu":
            torch.cuda.empty_cache()
            batches = Timed(batches.batch_size, rows)
        with meter.phase("step"):
            train(accelerator, fitted.module, optimizer, batches, loss, settings, fitted=fitted, say=quiet)
        seconds = batches.seconds if isinstance(batches, Timed) else 0.0
        return meter.measured["step"], seconds
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def compare(job: Job, micro_batch: int, accumulation: int, levers: Levers, device: str) -> dict[str, Any]:
    """One configuration, predicted and measured."""
    target = CPU if device == "cpu" else CUDA
    traced = trace_step(job, target, levers, micro_batch=micro_batch, accumulation=accumulation).trace
    predicted = traced.peak().size
    reserved = max(replay(traced.events).values()) if device != "cpu" else None
    torch.manual_seed(0)
    fitted = adapted(job, levers, device)
    inputs = real(job.blueprint.inputs(job.blueprint, micro_batch, *job.latents(job.size)), device)
    rows = Rows(["x"] * micro_batch, inputs, torch.zeros_like(next(iter(inputs.values()))))
    batches = Same(micro_batch * accumulation, [rows] * accumulation)
    found, seconds = measured(job, fitted, batches, loss, device)
    del fitted, inputs, rows, batches
    gc.collect()
    units = levers.checkpointed if isinstance(levers.checkpointed, bool) else len(levers.checkpointed)
    row = {
        "model": job.blueprint.name,
        "phase": "step",
        "trains": job.adapter.kind if job.adapter else "all weights",
        "size": job.size[0],
        "precision": job.precision,
        "base": levers.base,
        "optimizer": job.optimizer + (" in backward" if levers.optimizer_in_backward else ""),
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "checkpointed": units,
        "attention_kept": bool(levers.keep_attention),
        "offloaded": bool(levers.offloaded),
        "seconds_per_step": seconds or None,
        **errors_of(predicted, reserved, found),
    }
    print(json.dumps(row), flush=True)
    return row


def compare_phase(job: Job, phase: str, device: str) -> dict[str, Any]:
    """Encoding a picture and a caption, or drawing a preview: predicted and measured."""
    target = CPU if device == "cpu" else CUDA
    family = job.blueprint
    on = torch.device(device)
    vae = family.vae.build(device)
    if phase == "encode":
        predicted = trace_encode(job, target)
        encoders = [part.build(device if device == "cpu" else "cpu") for part in family.encoders]
        denoiser = family.denoiser.build("cpu")
        there = [vae, *encoders, denoiser] if device == "cpu" else [vae]
        meter = Meter(on, lambda: [t for m in there for t in (*m.parameters(), *m.buffers())])
        with meter.phase(phase, again=True), torch.no_grad():
            told = vae.encode(torch.zeros(1, 3, *job.size, device=device)).latent_dist
            del told
        if device != "cpu":
            vae.to("cpu")
            encoders = [encoder.to(device) for encoder in encoders]
        with meter.phase(phase, again=True), torch.no_grad():
            for encoder, tokens in zip(encoders, family.tokens, strict=True):
                said = encoder(torch.zeros(1, tokens, dtype=torch.long, device=device))
                del said
    else:
        predicted = trace_preview(job, target)
        fitted = adapted(job, Levers(job.precision), device)
        network = fitted.module.eval()
        meter = Meter(on, lambda: [*network.parameters(), *network.buffers(), *vae.parameters()])
        height, width = job.latents(job.preview or job.size)
        channels = int(family.vae.config.get("latent_channels", 4))
        with meter.phase(phase, again=True), torch.no_grad():
            rows = real(family.inputs(family, 2, height, width), device)
            made = network(**rows, return_dict=False)[0].float()
            del made, rows
        with meter.phase(phase, again=True), torch.no_grad():
            pixels = vae.decode(torch.zeros(1, channels, height, width, device=device)).sample
            pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
            del pixels
    reserved = max(replay(predicted.events).values()) if device != "cpu" else None
    row = {
        "model": family.name,
        "phase": phase,
        "size": job.size[0],
        "precision": job.precision,
        **errors_of(predicted.peak().size, reserved, meter.measured[phase]),
    }
    print(json.dumps(row), flush=True)
    return row


def errors_of(predicted: int, reserved: int | None, found: Measured) -> dict[str, Any]:
    """The figures of a row."""
    allocated, kept = found["peak_allocated_bytes"], found["peak_reserved_bytes"]
    assert allocated is not None
    return {
        "predicted_allocated_bytes": predicted,
        "predicted_reserved_bytes": reserved,
        "measured_allocated_bytes": allocated,
        "measured_reserved_bytes": kept,
        "error_allocated": round(predicted / allocated - 1, 5),
        "error_reserved": round(reserved / kept - 1, 5) if reserved and kept else None,
    }


def space(device: str) -> list[tuple[Blueprint, int]]:
    """Models and sides of pictures that are measured."""
    if device == "cpu":
        tiny, bundled = (families.blueprint_of("sd15", name) for name in ("tiny", "builtin/emoji-64"))
        return [(tiny, 64), (tiny, 128), (bundled, 64), (tiny_sdxl(), 64)]
    return [(families.BLUEPRINTS.get("sd15"), 512), (families.BLUEPRINTS.get("sdxl"), 1024)]


def tiny_sdxl() -> Blueprint:
    """SDXL's shape with few channels."""
    whole = families.BLUEPRINTS.get("sdxl")
    small = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": 2048,
    }
    denoiser = replace(whole.denoiser, config={**whole.denoiser.config, **small})
    return replace(whole, denoiser=denoiser)


ADAPTER = AdapterConfig(rank=16, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0"])


def grid(device: str) -> Iterator[dict[str, Any]]:
    """Every combination that matters of model, what is trained, batch, precision, base and checkpointing."""
    for model, side in space(device):
        for precision in ("fp32", "bf16") if device == "cpu" else ("bf16",):
            job = Job(model, ADAPTER, "adamw", precision, (side, side), preview=(side, side))
            for phase in ("encode", "preview"):
                yield compare_phase(job, phase, device)
            job = replace(job, preview=None)
            units = trace_step(job, CPU, micro_batch=1).units
            for size in (1, 4, 8) if device == "cpu" else (1, 4):
                for levers in (
                    Levers(precision),
                    Levers(precision, checkpointed=units[: len(units) // 2]),
                    Levers(precision, checkpointed=True),
                    Levers(precision, checkpointed=True, keep_attention=True),
                    Levers(precision, "int8", True),
                    Levers(precision, "nf4", True),
                    Levers(precision, "same", True, False, units),
                ):
                    yield compare(job, size, 1, levers, device)
        precision = "fp32" if device == "cpu" else "bf16"
        for size, optimizer in itertools.product((1, 4), ("adamw", "adamw8bit")):
            whole = Job(model, None, optimizer, precision, (side, side))
            if model.name == "sdxl" and device != "cpu" and (size > 1 or optimizer == "adamw"):
                continue  # more than an H100 has
            for twice in (False, True):
                yield compare(whole, size, 1, Levers(precision, checkpointed=twice), device)
            lone = replace(whole, max_grad_norm=None)
            levers = Levers(precision, checkpointed=True, optimizer_in_backward=True)
            yield compare(lone, size, 1, levers, device)


def drawn(device: str, seed: int) -> Iterator[dict[str, Any]]:
    """Ten configurations that nobody chose."""
    draw = random.Random(seed)
    for _ in range(10):
        model, side = draw.choice(space(device))
        learns = draw.choice(
            [ADAPTER, AdapterConfig(rank=8, alpha=8), AdapterConfig(kind="dora", rank=4, alpha=4)]
        )
        precision = draw.choice(["fp32", "bf16"])
        job = Job(model, learns, draw.choice(["adamw", "adamw8bit"]), precision, (side, side))
        size, accumulation = draw.choice([1, 2, 3, 6]), draw.choice([1, 2, 4])
        units = trace_step(job, CPU, micro_batch=1).units
        twice = tuple(name for name in units if draw.random() < 0.5)
        kept = tuple(name for name in twice if draw.random() < 0.5)
        base = draw.choice(["same", "int8", "nf4"])
        yield compare(job, size, accumulation, Levers(precision, base, twice, kept), device)


def dispatch_seconds(device: str) -> float:
    """What each operator takes longer where attention is kept: small ones, so that nothing else counts.

    The figure of `room.DISPATCH_SECONDS`: forward and backward pass of a block that keeps its attention
    against one that is just checkpointed, over the operators of both of its forward passes.
    """
    tiny = families.blueprint_of("sd15", "tiny")
    job = Job(tiny, ADAPTER, size=(16, 16))
    traced = trace_step(job, CPU, micro_batch=1).trace
    operators = sum(work.phase == "forward" and work.place % 2 for work in traced.work)
    inputs = real(tiny.inputs(tiny, 1, *job.latents(job.size)), device)
    steps = {}
    for kept in (False, True):
        module = adapted(job, Levers("fp32", checkpointed=True, keep_attention=kept), device).module

        def step(module: nn.Module = module) -> None:
            module(**inputs, return_dict=False)[0].square().mean().backward()
            if device != "cpu":
                torch.cuda.synchronize()

        step()
        steps[kept] = step
    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(30):  # side by side, against the noise
        for kept, step in steps.items():
            began = time.perf_counter()
            step()
            took[kept].append(time.perf_counter() - began)
    return (min(took[True]) - min(took[False])) / (2 * operators)


def one_row_a_line(content: dict[str, Any]) -> str:
    """JSON that a diff can be read of."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Measures the grid and ten random configurations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random configurations")
    args = parser.parse_args()
    rows = {"grid": list(grid(args.device)), "drawn_at_random": list(drawn(args.device, args.seed))}
    both = [row for part in rows.values() for row in part]
    errors = {}
    for kind, precision, phase in itertools.product(
        ("allocated", "reserved"), ("fp32", "bf16"), ("step", "encode", "preview")
    ):
        rows_of = [row for row in both if (row["precision"], row["phase"]) == (precision, phase)]
        found = sorted(row[f"error_{kind}"] for row in rows_of if row[f"error_{kind}"] is not None)
        if found:
            within = sum(abs(error) <= 0.01 for error in found)
            errors[f"{kind} {precision} {phase}"] = {
                "configurations": len(found),
                "least": found[0],
                "most": found[-1],
                "within_1_percent": within,
            }
            print(
                f"{kind}, {precision}, {phase}: {found[0]:+.2%} to {found[-1]:+.2%},"
                f" {within} of {len(found)} within 1 %"
            )
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": hardware.probe(args.device).title,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft)},
        "dispatch_seconds": dispatch_seconds(args.device),
        "errors": errors,
        **rows,
    }
    file = ROOT / f"benchmarks/memory_{args.device.partition(':')[0]}.json"
    file.write_text(one_row_a_line(content))
    print(file)


if __name__ == "__main__":
    main()
