"""The memory of a training run, phase by phase: its own code, run on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from tunekit import optimizers
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
from tunekit.memory.levers import Fitted, Levers, OnUnit, autocast_of, fit, step_in_backward, tile_vae
from tunekit.memory.trace import Target, Trace, Tracer

WEIGHTS, ADAPTER, GRADIENTS, STATE = "base weights", "adapter", "gradients", "optimizer state"
MASTERS = "adapter in float32"
"""What the optimizer updates, where the adapter itself is in 16 bits."""
VAE, ENCODERS = "VAE", "text encoders"
TRAINED = "weights"
"""All weights, where they are trained themselves."""
VISITORS = "visiting weights"
"""Copies of weights that stay in host memory."""
STAYS = (WEIGHTS, ADAPTER, MASTERS, TRAINED, STATE, VAE)
"""What is there between two steps."""
PAGED = 100_000
"""Elements from which a paged optimizer keeps state in host memory (bitsandbytes/optim/optimizer.py)."""


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
        class_pictures: (height, width) of pictures that the base draws before training; None without.
    """

    blueprint: Blueprint
    adapter: AdapterConfig | None
    optimizer: str = "adamw"
    precision: str = "fp32"
    size: tuple[int, int] = (512, 512)
    max_grad_norm: float | None = 1.0
    preview: tuple[int, int] | None = None
    guided: bool = True
    class_pictures: tuple[int, int] | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """What the denoiser's arithmetic is lowered to, operator by operator."""
        name = autocast_of(self.precision, self.adapter)
        return None if name == "no" else DTYPES[name]

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
        optimizers.find(train.optimizer).name,
        precision,
        (side, side),
        train.max_grad_norm,
        drawn,
        preview.guidance > 1,
        (side, side) if getattr(data, "class_prompt", None) else None,
    )


@dataclass(frozen=True)
class StepTrace:
    """Two optimizer steps.

    Attributes:
        trace: phases "first forward", "first backward", "first optimizer", then the same without "first".
        units: module paths of the checkpointing units, in the order in which they run.
        weights: unit -> bytes of its frozen weights.
        saving: bytes that writing the result takes on the device for a while.
    """

    trace: Trace
    units: tuple[str, ...]
    weights: Mapping[str, int] = field(default_factory=dict)
    saving: int = 0


def trace_step(
    job: Job,
    target: Target,
    levers: Levers | None = None,
    *,
    micro_batch: int,
    accumulation: int = 1,
) -> StepTrace:
    """Follows two optimizer steps.

    Args:
        target: whose allocations are predicted.
        levers: default none, at the job's precision.
        micro_batch: samples per forward.
        accumulation: forwards per optimizer step; beyond the second nothing new is held.
    """
    levers = levers or Levers(job.precision)
    facts = optimizers.find(job.optimizer)
    tracer = Tracer(target, autocast=job.autocast)
    units, on_unit = _unit_watcher(tracer)
    fitted = adapted(job, levers, on_unit=on_unit)
    denoiser, parameters = fitted.module, list(fitted.parameters.values())
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted.host else set()
    if fitted.host:
        fitted.host.watch = lambda copies: tracer.label(copies, VISITORS)
    fitted.watch = lambda gradient: tracer.label([gradient], GRADIENTS)
    if levers.optimizer_in_backward:
        for parameter in parameters:  # before the hook that frees it
            parameter.register_post_accumulate_grad_hook(lambda p: tracer.label([p.grad], GRADIENTS))
    optimizer = optimizers.build(
        "adamw8bit" if facts.paged else job.optimizer,  # paged state cannot be made without its device
        parameters,
        lr=1e-4,
        device="meta",
        per_parameter=levers.optimizer_in_backward,
    )
    fused = target.name in facts.fused_on

    def update(optimizer: torch.optim.Optimizer) -> None:
        _update(optimizer, fused=fused)
        state = list(_state(optimizer))
        hosted = [t for t in state if facts.paged and target.name != "cpu" and t.numel() >= PAGED]
        tracer.host(hosted)
        large = {id(tensor) for tensor in hosted}
        tracer.label([tensor for tensor in state if id(tensor) not in large], STATE)

    if levers.optimizer_in_backward:
        step_in_backward(optimizer, update)
    batch = job.blueprint.inputs(job.blueprint, micro_batch, *job.latents(job.size))
    with tracer:
        frozen = [p for p in (*denoiser.parameters(), *denoiser.buffers()) if not p.requires_grad]
        tracer.label([tensor for tensor in frozen if id(tensor) not in host], WEIGHTS)
        learned = [p for p in denoiser.parameters() if p.requires_grad]
        tracer.label(learned, ADAPTER if job.adapter else TRAINED)
        # Those of the batch that the denoiser takes first in another type would not be seen otherwise.
        others = {key: value for key, value in batch.items() if key != next(iter(batch))}
        tracer.label((value for value in tree_iter(others) if isinstance(value, Tensor)), "inputs")
        if fitted.has_masters:
            tracer.label(parameters, MASTERS)
        if job.preview is not None and target.name == "cpu":  # between previews it waits there
            vae = job.blueprint.vae.build()
            tracer.label((*vae.parameters(), *vae.buffers()), VAE)
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
                if not levers.optimizer_in_backward:
                    update(optimizer)
                    fitted.write_back()
                optimizer.zero_grad(set_to_none=True)
    weights = {name: _frozen_bytes(denoiser, name) for name in units}
    saving = 0
    if target.name == "cpu":  # both adapter files are read again, or the rest of the pipeline is loaded anew
        learned = sum(p.numel() * p.element_size() for p in parameters)
        parts = [part.build() for part in job.blueprint.parts] if job.adapter is None else []
        whole = sum(t.numel() * t.element_size() for part in parts for t in part.parameters())
        saving = 2 * learned if job.adapter else whole
    return StepTrace(tracer.trace(), tuple(units), weights, saving)


def _frozen_bytes(denoiser: nn.Module, unit: str) -> int:
    module = denoiser.get_submodule(unit)
    frozen = [t for t in (*module.parameters(), *module.buffers()) if not t.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in frozen)


def adapted(job: Job, levers: Levers, device: str = "meta", on_unit: OnUnit | None = None) -> Fitted:
    """The denoiser as it is trained: adapter and levers on it; with random weights on a real device."""
    host = "meta" if device == "meta" else "cpu"
    fitted = fit(
        job.blueprint.denoiser.build(host),
        job.adapter,
        job.blueprint.lora_targets,
        levers,
        device=device,
        on_unit=on_unit,
    )
    fitted.module.train()
    return fitted


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


def trace_preview(
    job: Job, target: Target, levers: Levers | None = None, *, held: int = 0, tiled: bool = False
) -> Trace:
    """Follows one preview: a call of the denoiser, then the VAE's decoder in float32.

    Args:
        held: bytes that stay meanwhile beside the denoiser: masters and optimizer state.
        tiled: see `levers.tile_vae`.
    """
    if job.preview is None:
        raise ValueError("this job draws no previews")
    fitted = adapted(job, levers or Levers(job.precision))
    denoiser = fitted.module.eval()
    host = {id(tensor) for tensor in fitted.host.tensors} if fitted.host else set()
    there = [p for p in (*denoiser.parameters(), *denoiser.buffers()) if id(p) not in host]
    vae = job.blueprint.vae.build()
    if tiled:
        tile_vae(vae, factor=job.blueprint.vae_factor)
    height, width = job.latents(job.preview)
    kept = [meta(held, dtype=torch.uint8)] if held else []

    def begin(tracer: Tracer) -> None:
        tracer.label(there, WEIGHTS)
        tracer.label(kept, STATE)
        tracer.label((*vae.parameters(), *vae.buffers()), VAE)
        if fitted.host:
            fitted.host.watch = lambda copies: tracer.label(copies, VISITORS)

    with Tracer(target, autocast=job.autocast) as tracer, torch.no_grad():
        begin(tracer)
        with tracer.phase("preview forward"):
            rows = job.blueprint.inputs(job.blueprint, 2 if job.guided else 1, height, width)
            made = denoiser(**rows, return_dict=False)[0].float()
            del made, rows
    with Tracer(target) as decoder, torch.no_grad():
        begin(decoder)
        with decoder.phase("preview decode"):
            channels = int(job.blueprint.vae.config.get("latent_channels", 4))
            pixels = vae.decode(meta(1, channels, height, width)).sample
            pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
            del pixels
    return _after(tracer.trace(), decoder.trace())


def trace_class_pictures(job: Job, target: Target, batch: int) -> Trace:
    """Follows the drawing of class pictures by the base, the whole pipeline on the device in float32.

    Args:
        batch: pictures at once, each with guidance.
    """
    if job.class_pictures is None:
        raise ValueError("this job draws no class pictures")
    family = job.blueprint
    denoiser, vae = family.denoiser.build(), family.vae.build()
    encoders = [part.build() for part in family.encoders]
    height, width = job.latents(job.class_pictures)
    with Tracer(target) as tracer, torch.no_grad():
        tracer.label((*denoiser.parameters(), *denoiser.buffers()), WEIGHTS)
        tracer.label((*vae.parameters(), *vae.buffers()), VAE)
        for encoder in encoders:
            tracer.label((*encoder.parameters(), *encoder.buffers()), ENCODERS)
        with tracer.phase("class pictures"):
            rows = family.inputs(family, 2 * batch, height, width)
            made = denoiser(**rows, return_dict=False)[0]
            del made, rows
            channels = int(family.vae.config.get("latent_channels", 4))
            pixels = vae.decode(meta(batch, channels, height, width)).sample
            pixels = (pixels.float() / 2 + 0.5).clamp(0, 1)
            del pixels
    return tracer.trace()


def trace_encode(job: Job, target: Target, *, captions_on_host: bool = False) -> Trace:
    """Follows the encoding of a picture, then of a caption, each with its own networks on the device.

    On the CPU nothing leaves: the whole pipeline is there all the time, in float32.

    Args:
        captions_on_host: the text encoders run on the CPU.
    """
    family = job.blueprint
    everything = target.name == "cpu"
    vae = family.vae.build()
    encoders = [part.build().to(DTYPES["fp32" if everything else part.precision]) for part in family.encoders]
    there = [*family.denoiser.build().parameters()] if everything else []

    def begin(tracer: Tracer, *, pictures: bool) -> None:
        tracer.label(there, WEIGHTS)
        if pictures or everything:
            tracer.label((*vae.parameters(), *vae.buffers()), VAE)
        if not pictures or everything:
            for encoder in encoders:
                tracer.label((*encoder.parameters(), *encoder.buffers()), ENCODERS)

    with Tracer(target) as tracer, torch.no_grad():
        begin(tracer, pictures=True)
        with tracer.phase("encode"):
            moments = vae.encode(meta(1, 3, *job.size)).latent_dist
            del moments
    if captions_on_host:
        return tracer.trace()
    with Tracer(target) as second, torch.no_grad():
        begin(second, pictures=False)
        with second.phase("encode"):
            for encoder, tokens in zip(encoders, family.tokens, strict=True):
                told = encoder(meta(1, tokens, dtype=torch.int64))
                del told
    return _after(tracer.trace(), second.trace())


def _unit_watcher(tracer: Tracer) -> tuple[list[str], OnUnit]:
    """What tells the tracer which unit's forward or backward pass runs, and the units as they come up."""
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

    return units, on_unit


def _update(optimizer: torch.optim.Optimizer, *, fused: bool) -> None:
    """One optimizer step on meta tensors, which some classes do not take."""
    if isinstance(optimizer, torch.optim.Adafactor):
        _update_adafactor(optimizer)
    elif fused:
        _update_fused(optimizer)
    else:
        optimizer.step()


@torch.no_grad()
def _update_fused(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's fused kernel."""
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


@torch.no_grad()
def _update_adafactor(optimizer: torch.optim.Optimizer) -> None:
    """Adafactor, tensor by tensor, without the scalars that it reads back (torch/optim/_adafactor.py)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = optimizer.state[parameter]
            if gradient.dim() > 1:
                if not state:
                    rows, columns = [*gradient.shape[:-1], 1], [*gradient.shape[:-2], 1, gradient.shape[-1]]
                    state["row_var"] = gradient.new_zeros(rows)
                    state["col_var"] = gradient.new_zeros(columns)
                state["row_var"].lerp_(gradient.norm(dim=-1, keepdim=True).square_(), 0.5)
                state["col_var"].lerp_(gradient.norm(dim=-2, keepdim=True).square_(), 0.5)
                update = state["row_var"] @ state["col_var"]
                update.div_(state["row_var"].mean(dim=-2, keepdim=True))
            else:
                if not state:
                    state["variance"] = torch.zeros_like(gradient)
                state["variance"].lerp_(gradient.square(), 0.5)
                update = state["variance"].clone()
            update.clamp_(min=1e-30).rsqrt_().mul_(gradient)
            parameter.add_(update)


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
