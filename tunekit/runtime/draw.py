"""Pictures from a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from tunekit.diffusion.sampling import initial_latents, sample
from tunekit.errors import ConfigError
from tunekit.families.family import Conditioning
from tunekit.runtime.base import Runtime


def sample_pixels(
    runtime: Runtime,
    conditioning: Conditioning,
    negative: Conditioning | None,
    *,
    seeds: Sequence[int],
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one batch from prompts that are encoded already; pixels [B, 3, H, W] in [0, 1]."""
    default_height, default_width = runtime.default_size
    shape = runtime.latent_shape(height or default_height, width or default_width)
    latents = sample(
        runtime.denoise,
        runtime.scheduler,
        initial_latents(seeds, shape),
        conditioning,
        negative,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        on_step=on_step,
    )
    return runtime.decode(latents)


def generate_pixels(
    runtime: Runtime,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one picture per seed as pixels [N, 3, H, W] in [0, 1]; see `generate`."""
    if not seeds or not prompts:
        raise ConfigError("nothing to draw: there must be a prompt and a seed")
    if len(prompts) == 1:
        prompts = [prompts[0]] * len(seeds)
    if len(seeds) == 1:
        seeds = [seeds[0]] * len(prompts)
    if len(prompts) != len(seeds):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(seeds)} seeds",
            hint="give one seed per prompt, or one of either",
        )
    size = batch or min(4, len(prompts))
    pixels = []
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        pixels.append(
            sample_pixels(
                runtime,
                runtime.encode_prompt(part),
                runtime.encode_prompt([negative_prompt] * len(part)) if guidance > 1 else None,
                seeds=seeds[start : start + size],
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                on_step=on_step,
            )
        )
    return torch.cat(pixels)


def generate(
    runtime: Runtime,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    steps: int = 30,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per seed, the same on every runtime and in every batch to rounding.

    Args:
        runtime: from `open_runtime`.
        prompts: one per seed, or a single one for all.
        seeds: one per prompt, or a single one for all.
        negative_prompt: what not to draw; used where guidance > 1.
        steps: of the sampler.
        guidance: classifier-free guidance scale.
        height: in pixels; the model's own if not given.
        width: likewise.
        batch: pictures at once.
        on_step: called with (steps done, all steps, latents) in each batch.
    """
    pixels = generate_pixels(
        runtime,
        prompts,
        seeds=seeds,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        batch=batch,
        on_step=on_step,
    )
    return to_images(pixels)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn pixels [B, 3, H, W] in [0, 1] into pictures of 8 bits."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]
