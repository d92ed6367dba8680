"""What is looked at while training: the loss on held-out pictures, and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunekit.artifacts import atomic_folder
from tunekit.config import PreviewConfig
from tunekit.data.cache import Batch, CachedDataset
from tunekit.diffusion.objectives import Objective
from tunekit.diffusion.sampling import initial_latents, sample
from tunekit.families.family import Conditioning, Family, Pipeline
from tunekit.memory.levers import tile_vae
from tunekit.memory.measure import Meter
from tunekit.runtime import to_images

if TYPE_CHECKING:
    from accelerate import Accelerator

LEVELS = 8
"""Timesteps per held-out picture: one alone would measure the timestep more than the model."""


def validation(
    dataset: CachedDataset,
    loss: Callable[[nn.Module, Batch], Tensor],
    objective: Objective,
    micro_batch: int,
    accelerator: Accelerator,
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Make the function that measures the validation loss; None if nothing is held out.

    The noise belongs to the picture and the timesteps are the same `LEVELS` for each, so two values differ by
    what was learned and by nothing else.

    Args:
        dataset: held-out pictures.
        loss: as for training, without min-SNR weights: the figure should not depend on a training option.
        objective: gives the number of timesteps.
        micro_batch: most rows in one forward.
        accelerator: processes share the work.
    """
    if not len(dataset):
        return None

    def measure(model: nn.Module) -> dict[str, float]:
        batches = list(dataset.validation(objective, timesteps=LEVELS, micro_batch=micro_batch))
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        with torch.no_grad():
            for batch in mine:
                total += loss(model, batch.to(accelerator.device)).float().sum()
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")
        return {"val_loss": float(total) / (len(dataset) * LEVELS)}

    return measure


def previews(
    pipeline: Pipeline,
    family: Family,
    config: PreviewConfig,
    encoded: Mapping[str, Conditioning],
    folder: Path,
    size: tuple[int, int],
    device: torch.device,
    *,
    tiled: bool = False,
    meter: Meter | None = None,
) -> Callable[[nn.Module, int], None] | None:
    """Make the function that draws the prompts into `folder/step-000200/00-<prompt>.png`; None without any.

    Args:
        pipeline: its VAE decodes and its scheduler's configuration samples.
        config: reads prompts, negative_prompt, steps, guidance and seed.
        encoded: conditioning of each prompt and of the negative one, without the batch dimension.
        folder: `runs/<name>/previews`.
        size: (height, width) in pixels.
        device: where the denoiser is; the VAE visits it to decode.
        tiled: decode in tiles (`levers.tile_vae`).
        meter: measures the phase "preview".
    """
    if not config.prompts:
        return None
    meter = meter or Meter(device, active=False)
    if tiled:
        tile_vae(pipeline.vae, factor=2 ** (len(pipeline.vae.config.block_out_channels) - 1))
    shape = family.latent_shape(pipeline, *size)

    def draw(model: nn.Module, step: int) -> None:
        def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            return family.denoise(model, latents, timestep, conditioning)

        with atomic_folder(folder / f"step-{step:06d}") as made:
            pipeline.vae.to(device)
            for index, prompt in enumerate(config.prompts):
                seeds = [config.seed + index]
                # Once the optimizer has its state; of the pictures one is enough.
                with meter.phase("preview", again=True) if step and not index else nullcontext():
                    latents = sample(
                        denoise,
                        pipeline.scheduler,
                        initial_latents(seeds, shape).to(device),
                        _on(device, encoded[prompt]),
                        _on(device, encoded[config.negative_prompt]),
                        steps=config.steps,
                        guidance=config.guidance,
                        seeds=seeds,
                    )
                    pixels = family.decode(pipeline, latents)
                picture = to_images(pixels)[0]
                picture.save(made / preview_name(index, prompt))
            pipeline.vae.to("cpu")

    return draw


def preview_name(index: int, prompt: str) -> str:
    """File name of a preview: `03-a-red-fox.png`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{index:02d}-{words}.png"


def _on(device: torch.device, conditioning: Mapping[str, Any]) -> Conditioning:
    return {name: value[None].to(device) for name, value in conditioning.items()}
