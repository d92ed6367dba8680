#!/usr/bin/env python3
"""Predicted against measured memory of real training steps; writes benchmarks/memory_<device>.json.

    python scripts/measure_memory.py                  # on the CPU: tiny and bundled models, a minute
    python scripts/measure_memory.py --device cuda    # SD 1.5 at 512 px and SDXL at 1024 px, random weights

A few optimizer steps of the recipes' own task run through the training loop, with each lever; a picture and
a caption are encoded, a preview is drawn. On the CPU the allocator's own record is read (not the size of the
process), on a GPU `max_memory_allocated` and `max_memory_reserved`. A grid, then ten configurations drawn at
random, so that nobody chose them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from torch import Tensor, nn

from tunekit import families, hardware
from tunekit.config import AdapterConfig, TrainConfig
from tunekit.diffusion.batch import Batch
from tunekit.families import Sizes
from tunekit.families.family import as_kept
from tunekit.memory.allocator import replay
from tunekit.memory.job import Job
from tunekit.memory.levers import Levers, autocast_of, step_in_backward
from tunekit.memory.measure import Measured, Meter
from tunekit.memory.phases import tensors, trace_encode, trace_preview
from tunekit.memory.step import adapted, trace_step
from tunekit.memory.trace import CPU, CUDA, Trace
from tunekit.optimizers import build
from tunekit.tasks import Task
from tunekit.training.loop import Hooks, train

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Same:
    """The same micro-batches in each step."""

    batch_size: int
    rows: Sequence[Batch]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the rows hold."""
        return [item for rows in self.rows for item in rows.tensors()]

    def step(self, step: int, rank: int, processes: int) -> Sequence[Batch]:
        """See `training.loop.Batches`."""
        return self.rows


@dataclass
class Timed(Same):
    """Also times the steps on a GPU; the first three warm up."""

    started: float = 0.0
    seconds: float = 0.0

    def step(self, step: int, rank: int, processes: int) -> Sequence[Batch]:
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


def real(values: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Tensors with data in place of those without: masks hide nothing, as they do while planning."""
    return {
        name: (torch.ones_like if value.dtype == torch.bool else torch.zeros_like)(value, device=device)
        for name, value in values.items()
    }


def real_batch(job: Job, count: int, device: str) -> Batch:
    """A micro-batch of a job, with data."""
    batch = job.batch(count)
    return Batch(batch.ids, real(batch.rows, device), real(batch.conditioning, device))


def fixed(task: Task) -> list[Tensor]:
    """What is on the device before a step: weights, masters and teachers, without what stays on the host."""
    fitted = task.fitted
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted.host else set()
    modules = [fitted.module, *(one for one in vars(task).values() if isinstance(one, nn.Module))]
    own = [t for module in modules for t in (*module.parameters(), *module.buffers()) if id(t) not in host]
    return [*own, *fitted.parameters.values()]


def measured(job: Job, task: Task, batches: Same, device: str) -> tuple[Measured, float]:
    """Peak of two optimizer steps, and seconds of a later one (of both on the CPU)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    fitted = task.fitted
    in_backward = fitted.optimizer_in_backward
    optimizer = build(
        job.optimizer, fitted.parameters.values(), lr=1e-4, device=device, per_parameter=in_backward
    )
    if in_backward:
        step_in_backward(optimizer, fitted)
    settings = TrainConfig(
        max_steps=2 if device == "cpu" else 8,
        lr=1e-4,
        batch_size=batches.batch_size,
        max_grad_norm=job.max_grad_norm,
        log_every=1000,
    )
    meter = Meter(torch.device(device), lambda: [*fixed(task), *batches.tensors])
    rows = list(batches.rows)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision=autocast_of(job.precision, job.adapter)
        )
        if device != "cpu":
            torch.cuda.empty_cache()
            batches = Timed(batches.batch_size, rows)
        with meter.phase("step"):
            train(accelerator, task, optimizer, batches, settings, Hooks(say=quiet))
        seconds = batches.seconds if isinstance(batches, Timed) else 0.0
        return meter.measured["step"], seconds
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def compare(job: Job, levers: Levers, device: str, *, rows: tuple[int, ...] = ()) -> dict[str, Any]:
    """One configuration, predicted and measured.

    Args:
        rows: of each forward of a step; default one micro-batch.
    """
    target, micro_batch = CPU if device == "cpu" else CUDA, levers.micro_batch or 1
    rows = rows or (micro_batch,)
    traced = trace_step(job, target, levers, rows=rows).trace
    predicted = traced.peak().size
    reserved = max(replay(traced.events).values()) if device != "cpu" else None
    torch.manual_seed(0)
    task = job.task_of(adapted(job, levers, device))
    batch = {count: real_batch(job, count, device) for count in rows}
    batches = Same(sum(rows), [batch[count] for count in rows])
    found, seconds = measured(job, task, batches, device)
    del task, batch, batches
    gc.collect()
    twice = levers.gradient_checkpointing
    row = {
        "model": job.sizes.family.name,
        "task": job.task,
        "phase": "step",
        "trains": job.adapter.kind if job.adapter else "all weights",
        "size": job.size[0],
        "precision": job.precision,
        "base_precision": levers.base_precision,
        "optimizer": job.optimizer + (" in backward" if levers.optimizer_in_backward else ""),
        "micro_batch": micro_batch,
        "accumulation": len(rows),
        "rows": list(rows),
        "gradient_checkpointing": twice if isinstance(twice, bool) else len(twice),
        "keep_attention": bool(levers.keep_attention),
        "offload": bool(levers.offload),
        "seconds_per_step": seconds or None,
        **errors_of(predicted, reserved, found),
    }
    print(json.dumps(row), flush=True)
    return row


def compare_phase(job: Job, phase: str, device: str) -> dict[str, Any]:
    """Encoding a picture and a caption, or drawing a preview: predicted and measured."""
    predicted, found = {"encode": encoding, "preview": previewing}[phase](job, device)
    reserved = max(replay(predicted.events).values()) if device != "cpu" else None
    row = {
        "model": job.sizes.family.name,
        "phase": phase,
        "size": job.size[0],
        "precision": job.precision,
        **errors_of(predicted.peak().size, reserved, found),
    }
    print(json.dumps(row), flush=True)
    return row


def encoding(job: Job, device: str) -> tuple[Trace, Measured]:
    """A picture, then a caption, as the family encodes them."""
    family, on_cpu = job.sizes.family, device == "cpu"
    pipeline = job.sizes.pipeline(device="cpu")
    encoders = [getattr(pipeline, part.name) for part in job.sizes.encoders]
    there = [pipeline.vae, *encoders, family.denoiser(pipeline).to(job.held)] if on_cpu else [pipeline.vae]
    pixels, tokens = torch.zeros(1, 3, *job.size), real(job.sizes.tokens(1), "cpu")
    meter = Meter(torch.device(device), lambda: [pixels, *tensors(*there)])
    pipeline.vae.to(device)
    with meter.phase("encode", again=True):
        moments = family.encode_image(pipeline, pixels)
        del moments
    if not on_cpu:
        pipeline.vae.to("cpu")
    for encoder in encoders:
        encoder.to(device)
    with meter.phase("encode", again=True):
        told = as_kept(family.encode_tokens(pipeline, tokens))
        del told
    return trace_encode(job, CPU if on_cpu else CUDA), meter.measured["encode"]


def previewing(job: Job, device: str) -> tuple[Trace, Measured]:
    """A call of the denoiser with guidance, then the decoder, as the family makes them."""
    family, preview = job.sizes.family, job.preview or job.size
    network = adapted(job, Levers(job.precision), device).module.eval()
    pipeline = job.sizes.pipeline(built={job.sizes.denoiser.name: network}, device="cpu")
    pipeline.vae.to(device)
    latents = real({"": job.sizes.latents(1, *preview)}, device)[""]
    told = real(job.told(2), device)
    meter = Meter(torch.device(device), lambda: [latents, *told.values(), *tensors(network, pipeline.vae)])
    with meter.phase("preview", again=True), torch.no_grad():
        rows = torch.cat([latents, latents])
        made = family.denoise(network, rows, torch.zeros(2, device=device), told).float()
        del made, rows
    told = {}
    with meter.phase("preview", again=True):
        pixels = family.decode(pipeline, latents)
        del pixels
    return trace_preview(job, CPU if device == "cpu" else CUDA), meter.measured["preview"]


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


def space(device: str) -> list[tuple[Sizes, int]]:
    """Models and sides of pictures that are measured."""
    if device == "cpu":
        tiny, bundled = (families.sizes_of("sd15", name) for name in ("tiny", "builtin/emoji-64"))
        others = [(families.sizes_of(name, "tiny"), 64) for name in families.runnable() if name != "sd15"]
        return [(tiny, 64), (tiny, 128), (bundled, 64), *others]
    return [(usual("sd15"), 512), (usual("sdxl"), 1024)]


def usual(family: str) -> Sizes:
    """The sizes of a family's usual base."""
    return families.sizes_of(family, families.planned(family).facts.default_source)


ADAPTER = AdapterConfig(rank=16, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0"])


def grid(device: str) -> Iterator[dict[str, Any]]:
    """Every combination that matters of model, what is trained, batch, precision, base and checkpointing."""
    for model, side in space(device):
        for precision in ("fp32", "bf16") if device == "cpu" else ("bf16",):
            job = Job(model, ADAPTER, "adamw", precision, (side, side), preview=(side, side))
            for phase in ("encode", "preview"):
                yield compare_phase(job, phase, device)
            job = replace(job, preview=None)
            units = trace_step(job, CPU).units
            for size in (1, 4, 8) if device == "cpu" else (1, 4):
                free = Levers(precision, micro_batch=size)
                every = replace(free, gradient_checkpointing=True)
                for levers in (
                    free,
                    replace(free, gradient_checkpointing=units[: len(units) // 2]),
                    every,
                    replace(every, keep_attention=True),
                    replace(every, base_precision="int8"),
                    replace(every, base_precision="nf4"),
                    replace(every, offload=units),
                ):
                    yield compare(job, levers, device)
        precision = "fp32" if device == "cpu" else "bf16"
        for size, optimizer in itertools.product((1, 4), ("adamw", "adamw8bit")):
            whole = Job(model, None, optimizer, precision, (side, side))
            if model.family.name == "sdxl" and device != "cpu" and (size > 1 or optimizer == "adamw"):
                continue  # more than an H100 has
            free = Levers(precision, micro_batch=size)
            every = replace(free, gradient_checkpointing=True)
            for levers in (free, every):
                yield compare(whole, levers, device)
                if size > 1:  # pictures of two shapes
                    yield compare(whole, levers, device, rows=(1, size - 1))
            lone = replace(whole, max_grad_norm=None)
            yield compare(lone, replace(every, optimizer_in_backward=True), device)


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
        units = trace_step(job, CPU).units
        twice = tuple(name for name in units if draw.random() < 0.5)
        kept = tuple(name for name in twice if draw.random() < 0.5)
        base = draw.choice(["same", "int8", "nf4"])
        levers = Levers(precision, base, size, twice, kept)
        yield compare(job, levers, device, rows=(size,) * accumulation)


def dispatch_seconds(device: str) -> float:
    """What each operator takes longer where attention is kept: small ones, so that nothing else counts.

    The figure of `room.DISPATCH_SECONDS`: forward and backward pass of a block that keeps its attention
    against one that is just checkpointed, over the operators of both of its forward passes.
    """
    job = Job(families.sizes_of("sd15", "tiny"), ADAPTER, size=(16, 16))
    traced = trace_step(job, CPU).trace
    operators = sum(work.phase == "forward" and work.place % 2 for work in traced.work)
    batch = real_batch(job, 1, device)
    steps = {}
    for kept in (False, True):
        levers = Levers("fp32", gradient_checkpointing=True, keep_attention=kept)
        task = job.task_of(adapted(job, levers, device))

        def step(task: Task = task) -> None:
            task.loss(task.fitted.module, batch)["loss"].mean().backward()
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
