"""Pictures from a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from tunekit.config import SamplingConfig
from tunekit.diffusion.sampling import Guided, initial_latents, sample_steps
from tunekit.errors import ConfigError, NonFiniteError
from tunekit.families.family import Conditioning
from tunekit.runtime.base import Runtime

OnStep = Callable[[int, int, Tensor], None]
"""Called with (steps done, all steps, latents) after each; see `sampling.Step`."""


def sample_pixels(
    runtime: Runtime,
    conditioning: Conditioning,
    guided: Guided | None,
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int],
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one batch from prompts that are encoded already; pixels [B, 3, H, W] in [0, 1]."""
    sampling = sampling.over(runtime.sampling)
    latents = initial_latents(seeds, runtime.latent_shape(*runtime.size(sampling)))
    steps = sample_steps(
        runtime.denoiser(sampling),
        runtime.scheduler,
        latents,
        conditioning,
        guided,
        sampling,
        begin=runtime.family.begin,
        seeds=seeds,
    )
    for done, total, latents in steps:
        if on_step:
            on_step(done, total, latents)
    return runtime.decode(latents)


def generate_pixels(
    runtime: Runtime,
    prompts: Sequence[str],
    sampling: SamplingConfig | None = None,
    *,
    seeds: Sequence[int],
    batch: int | None = None,
    on_step: OnStep | None = None,
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
    whole = (sampling or SamplingConfig()).over(runtime.sampling)
    size = batch or min(4, len(prompts))
    pixels = []
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        pixels.append(
            sample_pixels(
                runtime,
                runtime.conditioning(part, whole),
                runtime.guided(len(part), whole),
                whole,
                seeds=seeds[start : start + size],
                on_step=on_step,
            )
        )
    return torch.cat(pixels)


def generate(
    runtime: Runtime,
    prompts: Sequence[str],
    sampling: SamplingConfig | None = None,
    *,
    seeds: Sequence[int],
    batch: int | None = None,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Draw one picture per seed, the same on every runtime and in every batch to rounding.

    Args:
        runtime: from `open_runtime`.
        prompts: one per seed, or a single one for all.
        sampling: how; what it leaves open is the model's own (`Runtime.sampling`).
        seeds: one per prompt, or a single one for all.
        batch: pictures at once.
        on_step: called with (steps done, all steps, latents) in each batch.

    Raises:
        ConfigError: nothing to draw, or prompts and seeds that do not pair.
        NonFiniteError: the model gives NaN or infinity; says which part of it.
    """
    broken: list[str] = []

    def watched(done: int, total: int, latents: Tensor) -> None:
        if not broken and not bool(latents.isfinite().all()):
            broken.append(f"the denoiser gives them in step {done} of {total}")
        if on_step:
            on_step(done, total, latents)

    pixels = generate_pixels(runtime, prompts, sampling, seeds=seeds, batch=batch, on_step=watched)
    if not bool(pixels.isfinite().all()):
        maker = broken[0] if broken else "the VAE decoder makes them of latents that are finite"
        raise NonFiniteError(
            f"{runtime.title} draws values that are not finite: {maker}",
            where=runtime.artifact.source if runtime.artifact else None,
            hint="fp16 ends at 65504: take fp32 or bf16 (of an ONNX model, `export_onnx: {dtype: fp32}`);"
            " if it is fp32 already, its weights are damaged",
        )
    return to_images(pixels)


def remarks(runtime: Runtime, prompts: Sequence[str], sampling: SamplingConfig) -> list[str]:
    """What a user should know of these prompts: what of them is not read, and what has no effect."""
    whole = sampling.over(runtime.sampling)
    said = []
    guided = runtime.cfg_scale(whole) is not None
    for prompt in dict.fromkeys([*prompts, (whole.negative_prompt or "") if guided else ""]):
        if lost := runtime.unread(prompt):
            start = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
            said.append(f'the prompt "{start}" is longer than the text encoder reads; left out: "{lost}"')
    if whole.guidance_interval and not guided:
        said.append("the guidance interval has no effect: this model is drawn without guidance")
    if whole.negative_prompt and not guided:
        more = whole.model_copy(update={"guidance": 10.0})
        said.append(
            f"the negative prompt has no effect with guidance {whole.guidance:g}: it needs more than that"
            if runtime.cfg_scale(more) is not None
            else "the negative prompt has no effect: this model is drawn without one"
        )
    tuned = runtime.artifact.runtime if runtime.artifact else None
    if tuned and runtime.settings is None:
        said.append(
            f"its runtime settings ({tuned.words}) were measured with {tuned.runtime} on {tuned.machine},"
            f" and are not used with {runtime.title} here; tune_runtime measures again"
        )
    if other := other_steps(runtime, whole.steps):
        said.append(other)
    return said


def other_steps(runtime: Runtime, steps: int | None) -> str | None:
    """What to say where a model that was made for so many sampling steps is asked for others; else None."""
    decided = runtime.artifact.made_for if runtime.artifact else None
    if decided is None or steps in (None, decided[1]):
        return None
    return f"{decided[0]} made this model for {decided[1]} sampling steps, and {steps} are asked for"


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn pixels [B, 3, H, W] in [0, 1] into pictures of 8 bits.

    Raises:
        NonFiniteError: a value is NaN or infinite, and would be black.
    """
    if not bool(pixels.isfinite().all()):
        raise NonFiniteError(
            "a picture holds values that are not finite",
            hint="its weights are damaged, or fp16 overflows: draw it in fp32 or bf16",
        )
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in values]
