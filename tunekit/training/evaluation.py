"""What is looked at while training: the loss on held-out pictures, and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunekit.artifacts import atomic_folder
from tunekit.config import PreviewConfig, SamplingConfig
from tunekit.data.cache import CachedDataset
from tunekit.diffusion.judges import Judges
from tunekit.diffusion.sampling import Guided, initial_latents, sample
from tunekit.families.family import Conditioning, Family, Frame, Pipeline, pixels_per_latent
from tunekit.memory.levers import tile_vae
from tunekit.memory.measure import Meter
from tunekit.progress import Phase, Progress, console
from tunekit.runtime import to_images
from tunekit.tasks import Denoising

if TYPE_CHECKING:
    from accelerate import Accelerator

LEVELS = 8
"""Timesteps per held-out picture: one alone would measure the timestep more than the model."""


def validation(
    dataset: CachedDataset, task: Denoising, micro_batch: int, accelerator: Accelerator
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Make the function that measures the validation loss; None if nothing is held out.

    The noise belongs to the picture and the timesteps are the same `LEVELS` for each, so two values differ by
    what was learned and by nothing else. Options of the loss (min-SNR weights and the like) are left out: the
    figure should not depend on them.

    Args:
        dataset: held-out pictures.
        task: what is trained.
        micro_batch: most rows in one forward.
        accelerator: processes share the work.
    """
    if not len(dataset):
        return None
    plain = replace(task, objective=task.objective.plain())

    def measure(model: nn.Module) -> dict[str, float]:
        batches = list(dataset.validation(plain.objective, timesteps=LEVELS, micro_batch=micro_batch))
        rank, processes = accelerator.process_index, accelerator.num_processes
        mine = batches[rank::processes]
        # Where weights are split, each forward pass is a meeting of all processes.
        idle = batches[: len(batches[::processes]) - len(mine)] if plain.fitted.shards else []
        total = torch.zeros((), device=accelerator.device)
        with torch.no_grad(), _shown("validation", len(mine), accelerator) as phase:
            for batch in mine:
                phase.advance()
                total += plain.loss(model, batch.to(accelerator.device))["loss"].float().sum()
            for batch in idle:
                plain.loss(model, batch.to(accelerator.device))
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")
        return {"val_loss": float(total) / (len(dataset) * LEVELS)}

    return measure


def _shown(title: str, total: int, accelerator: Accelerator) -> AbstractContextManager[Phase]:
    """A phase that the main process shows."""
    shown = console() if accelerator.is_main_process else Progress(quiet=True)
    return shown.phase(title, total)


@dataclass(frozen=True)
class Previewer:
    """Draws the prompts into `folder/step-000200/00-<prompt>.png`.

    Attributes:
        family: calls the denoiser.
        pipeline: its VAE decodes and its scheduler's configuration samples.
        config: reads prompts and seed.
        sampling: how they are drawn; nothing of it is None but the scheduler.
        encoded: conditioning of each prompt and of the negative one, without the batch dimension.
        folder: `runs/<name>/previews`.
        meter: measures the phase "preview".
        tiled: decode in tiles (`levers.tile_vae`).
        judges: score the pictures by a CLIP, which is in memory for as long as that takes; None for nobody.
        writes: whether pictures are decoded and written; else the denoiser alone is asked, because the
            process that writes needs this one's part of the weights.
    """

    family: Family
    pipeline: Pipeline
    config: PreviewConfig
    sampling: SamplingConfig
    encoded: Mapping[str, Conditioning]
    folder: Path
    meter: Meter
    tiled: bool = False
    judges: Judges | None = None
    writes: bool = True

    def files(self, step: int) -> dict[str, Path]:
        """The pictures of a step that was drawn, by prompt."""
        folder = self.folder / f"step-{step:06d}"
        prompts = self.config.prompts
        return {prompt: folder / preview_name(index, prompt) for index, prompt in enumerate(prompts)}

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Draw with the denoiser as it is after `step`.

        Returns:
            `{"clip": mean score}` where there is a CLIP, else nothing.

        Raises:
            ModelError: the CLIP cannot be opened.
        """
        pipeline, sampling = self.pipeline, self.sampling
        device = next(model.parameters()).device
        assert sampling.height is not None
        assert sampling.width is not None
        assert sampling.guidance is not None
        scale = self.family.cfg_scale(pipeline, sampling.guidance)
        if self.tiled:
            tile_vae(pipeline.vae, factor=pixels_per_latent(self.family, pipeline))
        shape = self.family.latent_shape(pipeline, sampling.height, sampling.width)
        frame = Frame.whole(sampling.height, sampling.width).rows(1)
        interval = sampling.guidance_interval

        def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            return self.family.denoise(model, latents, timestep, conditioning)

        def told(prompt: str) -> Conditioning:
            encoded = {name: value[None] for name, value in self.encoded[prompt].items()}
            whole = self.family.conditioning(encoded, frame, sampling.guidance)
            return {name: value.to(device) for name, value in whole.items()}

        def drawn(index: int, prompt: str) -> Tensor:
            seeds = [self.config.seed + index]
            noise = initial_latents(seeds, shape).to(device)
            negative = None
            if scale is not None:
                negative = Guided(told(sampling.negative_prompt or ""), scale, interval)
            return sample(
                denoise,
                pipeline.scheduler,
                noise,
                told(prompt),
                negative,
                sampling,
                begin=self.family.begin,
                seeds=seeds,
            )

        prompts = self.config.prompts
        if not self.writes:
            for index, prompt in enumerate(prompts):
                drawn(index, prompt)
            return {}
        seen: list[Tensor] = []
        with (
            atomic_folder(self.folder / f"step-{step:06d}") as made,
            console().phase("preview", len(prompts)) as phase,
        ):
            pipeline.vae.to(device)
            for index, prompt in enumerate(prompts):
                # Once the optimizer has its state; of the pictures one is enough.
                with self.meter.phase("preview", again=True) if step and not index else nullcontext():
                    pixels = self.family.decode(pipeline, drawn(index, prompt))
                picture = to_images(pixels)[0]
                picture.save(made / preview_name(index, prompt))
                if self.judges is not None:
                    seen.append(pixels.float().cpu())
                phase.advance()
            pipeline.vae.to("cpu")
        if self.judges is None:
            return {}
        judges = replace(self.judges)  # what it opens goes with it
        scores = [judges.scores(one, [prompt])[0] for one, prompt in zip(seen, prompts, strict=True)]
        return {"clip": sum(scores) / len(scores)}


def preview_name(index: int, prompt: str) -> str:
    """File name of a preview: `03-a-red-fox.png`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{index:02d}-{words}.png"
