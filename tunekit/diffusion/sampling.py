"""From noise to latents, with any diffusers scheduler and any denoiser that can be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Conditioning = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents [B, C, h, w], timesteps [B], conditioning) -> prediction [B, C, h, w]."""


def initial_latents(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw unit noise [B, *shape], float32 on the CPU, each picture from its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    denoise: Denoise,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    *,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise unit noise to scaled latents, step for step as diffusers' pipelines do.

    Args:
        denoise: the denoiser; called once per step, with guidance on 2B rows: negative first.
        scheduler: a configured diffusers scheduler; a fresh copy is used, so it keeps no state between calls.
        latents: [B, C, h, w] from `initial_latents`.
        conditioning: of the prompts, dim 0 is B.
        negative: of the negative prompts; None, or guidance <= 1, means no classifier-free guidance.
        steps: number of steps.
        guidance: classifier-free guidance scale.
        eta: of DDIM, in [0, 1].
        seeds: of the pictures. A sampler that adds noise while it runs draws each picture's from its own
            seed, going on after `initial_latents`; without seeds it is taken from the global random state.
        on_step: called with (steps done, all steps, latents) after each; some samplers call the denoiser
            more often than `steps`, and so count more.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps, device=latents.device)
    latents = latents * scheduler.init_noise_sigma
    options = _step_options(scheduler, eta, latents, seeds)
    guided = negative is not None and guidance > 1
    if negative is not None and guided:
        conditioning = {key: torch.cat([negative[key], value]) for key, value in conditioning.items()}
    for i, timestep in enumerate(scheduler.timesteps):
        rows = torch.cat([latents, latents]) if guided else latents
        rows = scheduler.scale_model_input(rows, timestep)
        prediction = denoise(rows, timestep.expand(len(rows)), conditioning)
        if guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + guidance * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        if on_step:
            on_step(i + 1, len(scheduler.timesteps), latents)
    return latents


def _step_options(scheduler: Any, eta: float, latents: Tensor, seeds: Sequence[int] | None) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta} if "eta" in known else {}
    if "generator" in known and seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for generator in generators:
            torch.randn(latents.shape[1:], generator=generator)  # what initial_latents has used up
        options["generator"] = generators
    return options
