"""The memory of a training run, phase by phase: its own code, run on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunekit import optimizers
from tunekit.adapters import add_adapter
from tunekit.config import (
    AdapterConfig,
    DataConfig,
    DreamboothData,
    ModelConfig,
    PreviewConfig,
    TrainConfig,
)
from tunekit.families import blueprint_of
from tunekit.families.blueprint import Blueprint, Inputs, meta
from tunekit.families.family import DTYPES
from tunekit.memory.levers import apply_levers, checkpoint_units, trained
from tunekit.memory.trace import Target, Trace, Tracer

WEIGHTS, ADAPTER, GRADIENTS, STATE = "base weights", "adapter", "gradients", "optimizer state"
TRAINED = "weights"
"""All weights, where they are trained themselves."""
STAYS = (WEIGHTS, ADAPTER, TRAINED, STATE)
"""What is there between two steps."""


@dataclass(frozen=True)
class Job:
    """What is trained, apart from how it is made to fit.

    Attributes:
        blueprint: of the family, at the size of the base.
        adapter: None trains all weights.
        optimizer: a row of `optimizers`.
        precision: "fp32", "bf16" or "fp16" arithmetic.
        size: (height, width) of the largest bucket in pixels.
        max_grad_norm: whether gradients are clipped.
        preview: (height, width) of previews in pixels; None without.
        guided: whether previews use guidance, which doubles their rows.
    """

    blueprint: Blueprint
    adapter: AdapterConfig | None
    optimizer: str = "adamw"
    precision: str = "fp32"
    size: tuple[int, int] = (512, 512)
    max_grad_norm: float | None = 1.0
    preview: tuple[int, int] | None = None
    guided: bool = True

    @property
    def autocast(self) -> torch.dtype | None:
        """What the denoiser's arithmetic is lowered to."""
        return None if self.precision == "fp32" else DTYPES[self.precision]

    def latents(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the latents of a picture."""
        factor = self.blueprint.vae_factor
        return size[0] // factor, size[1] // factor


def job_of(
    model: ModelConfig,
    data: DataConfig | DreamboothData,
    adapter: AdapterConfig | None,
    train: TrainConfig,
    preview: PreviewConfig,
    precision: str,
) -> Job:
    """The job of a training config's sections.

    Raises:
        ConfigError, ModelError: see `families.blueprint_of`.
    """
    side = data.resolution
    drawn = (preview.height or side, preview.width or side) if preview.prompts else None
    return Job(
        blueprint_of(model.family, model.source),
        adapter,
        train.optimizer,
        precision,
        (side, side),
        train.max_grad_norm,
        drawn,
        preview.guidance > 1,
    )


@dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps.

    Attributes:
        trace: phases "first forward", "first backward", "first optimizer", then the same without "first".
        units: module paths of the checkpointing units, in the order in which they run.
    """

    trace: Trace
    units: tuple[str, ...]


def trace_step(
    job: Job,
    target: Target,
    *,
    micro_batch: int,
    accumulation: int = 1,
    checkpointed: bool | Collection[str] = False,
) -> StepTrace:
    """Follows two optimizer steps.

    Args:
        target: whose allocations are predicted.
        micro_batch: samples per forward.
        accumulation: forwards per optimizer step; beyond the second nothing new is held.
        checkpointed: see `levers.checkpoint_units`.
    """
    denoiser = adapted(job)
    parameters = trained(denoiser)
    optimizer = optimizers.build(job.optimizer, parameters, lr=1e-4, device="meta")
    tracer = Tracer(target, autocast=job.autocast)
    units = _watch_units(denoiser, checkpointed, tracer)
    batch = job.blueprint.inputs(job.blueprint, micro_batch, *job.latents(job.size))
    with tracer:
        tracer.label([p for p in denoiser.parameters() if not p.requires_grad], WEIGHTS)
        tracer.label(denoiser.buffers(), WEIGHTS)
        tracer.label(parameters, ADAPTER if job.adapter else TRAINED)
        for first in ("first ", ""):
            for _ in range(min(accumulation, 2)):
                tracer.place = 0
                with tracer.phase(f"{first}forward"):
                    loss = _loss(denoiser, batch, tracer)
                with tracer.phase(f"{first}backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                tracer.label([p.grad for p in parameters if p.grad is not None], GRADIENTS)
            tracer.place = 0
            with tracer.phase(f"{first}optimizer"):
                if job.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
                _update(optimizer, fused=target.name in optimizers.find(job.optimizer).fused_on)
                tracer.label(_state(optimizer), STATE)
                optimizer.zero_grad(set_to_none=True)
    return StepTrace(tracer.trace(), tuple(units))


def adapted(job: Job, device: str = "meta", checkpointed: bool | Collection[str] = False) -> nn.Module:
    """The denoiser as it is trained: adapter and levers on it; with random weights on a real device."""
    denoiser = job.blueprint.denoiser.build(device)
    apply_levers(denoiser, job.precision, checkpointed, frozen=job.adapter is not None)
    if job.adapter:
        add_adapter(denoiser, job.adapter, job.blueprint.lora_targets)
    return denoiser.to(device).train()


def _loss(denoiser: nn.Module, batch: Inputs, tracer: Tracer) -> Tensor:
    """Noise on the latents, the prediction, and its weighted squared error, as the recipes have it."""
    name, *_ = batch
    latents = torch.empty_like(batch[name])
    noise = torch.empty_like(latents)
    tracer.label([latents, noise], "inputs")
    noisy = latents * 0.5 + noise * 0.5
    made = denoiser(**{**batch, name: noisy}, return_dict=False)[0]
    squared = (made.float() - noise[:, : made.shape[1]].float()).square()
    return squared.flatten(1).mean(1).sum()


def trace_preview(job: Job, target: Target, *, held: int) -> Trace:
    """Follows one preview: a call of the denoiser, then the VAE's decoder in float32.

    Args:
        held: bytes of the trained weights and optimizer state that stay meanwhile, beside the base's.
    """
    if job.preview is None:
        raise ValueError("this job draws no previews")
    denoiser = job.blueprint.denoiser.build()
    apply_levers(denoiser, job.precision, False, frozen=job.adapter is not None)
    vae = job.blueprint.vae.build()
    height, width = job.latents(job.preview)
    with Tracer(target, autocast=job.autocast) as tracer, torch.no_grad():
        tracer.label(denoiser.parameters(), WEIGHTS)
        kept = [meta(held, dtype=torch.uint8)] if held else []
        tracer.label(kept, STATE)
        tracer.label(vae.parameters(), "VAE")
        with tracer.phase("preview forward"):
            rows = job.blueprint.inputs(job.blueprint, 2 if job.guided else 1, height, width)
            made = denoiser(**rows, return_dict=False)[0].float()
            del made, rows
    with Tracer(target) as decoder, torch.no_grad():
        decoder.label(denoiser.parameters(), WEIGHTS)
        decoder.label(kept, STATE)
        decoder.label(vae.parameters(), "VAE")
        with decoder.phase("preview decode"):
            channels = int(job.blueprint.vae.config.get("latent_channels", 4))
            pixels = vae.decode(meta(1, channels, height, width)).sample
            pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
            del pixels
    return _after(tracer.trace(), decoder.trace())


def trace_encode(job: Job, target: Target) -> Trace:
    """Follows the encoding of a caption and a picture, with all encoders on the device."""
    vae = job.blueprint.vae.build()
    encoders = [part.build().to(DTYPES[part.precision]) for part in job.blueprint.encoders]
    with Tracer(target) as tracer, torch.no_grad():
        tracer.label(vae.parameters(), "VAE")
        for encoder in encoders:
            tracer.label(encoder.parameters(), "text encoders")
        with tracer.phase("encode"):
            moments = vae.encode(meta(1, 3, *job.size)).latent_dist
            del moments
            for encoder, tokens in zip(encoders, job.blueprint.tokens, strict=True):
                told = encoder(meta(1, tokens, dtype=torch.int64))
                del told
    return tracer.trace()


def _watch_units(denoiser: nn.Module, checkpointed: bool | Collection[str], tracer: Tracer) -> list[str]:
    """Tells the tracer which unit's forward or backward pass runs; returns the units as they come up."""
    units: list[str] = []

    def on_unit(name: str, run: Callable[[], Any]) -> Any:
        if name not in units:
            units.append(name)
        number = units.index(name)
        tracer.place = 2 * number + 1
        made = run()
        tracer.place = 2 * number + 2
        for tensor in made if isinstance(made, tuple) else (made,):
            if tensor is not None and tensor.requires_grad:
                # Its gradient is there, so the unit's backward pass begins.
                tensor.register_hook(lambda _: setattr(tracer, "place", 2 * number + 1))
        return made

    checkpoint_units(denoiser, checkpointed, on_unit=on_unit)
    return units


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, *, fused: bool) -> None:
    """One optimizer step; by AdamW's fused kernel, which torch refuses to meta tensors, if there is one."""
    if not fused:
        optimizer.step()
        return
    for group in optimizer.param_groups:
        learned = [p for p in group["params"] if p.grad is not None]
        for parameter in learned:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device="meta")
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            learned,
            [p.grad for p in learned],
            *([optimizer.state[p][name] for p in learned] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [optimizer.state[p]["step"] for p in learned],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.device.type == "meta":
                yield value


def _after(one: Trace, other: Trace) -> Trace:
    """One trace, then another, with nothing of the first left."""
    shift = 1 + max(one.categories, default=-1)
    moved = [e._replace(storage=e.storage + shift) if e.storage >= 0 else e for e in other.events]
    live: dict[int, int] = {}
    for event in one.events:
        live[event.storage] = live.get(event.storage, 0) + event.size
    phase = one.events[-1].phase
    gone = [one.events[0]._replace(storage=s, size=-size, phase=phase) for s, size in live.items() if size]
    categories = {**one.categories, **{number + shift: name for number, name in other.categories.items()}}
    return Trace((*one.events, *gone, *moved), categories, (*one.work, *other.work))
