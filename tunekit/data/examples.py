"""What a pass learns from: the run's own pictures or, where there are none, what the model draws itself."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.cache import Batch, CachedDataset, Encoder, _together
from tunekit.data.images import Sample, scan_data
from tunekit.diffusion.noise import stable_seed
from tunekit.diffusion.objectives import Objective
from tunekit.diffusion.sampling import initial_latents, sample
from tunekit.errors import ConfigError, output_errors
from tunekit.families.family import Conditioning, Family, Pipeline

if TYPE_CHECKING:
    from accelerate import Accelerator

UNCONDITIONAL = 0.2
"""Share of examples with the empty caption: with guidance, half of all calls of a denoiser have none."""
DRAWING_STEPS = 20
DRAWN_TOGETHER = 4


@dataclass(frozen=True)
class Examples:
    """Latents with captions, and how noise is added to them."""

    dataset: CachedDataset
    objective: Objective
    origin: str
    """For people: "24 pictures of photos/", "16 pictures drawn by the model"."""
    seed: int

    def batches(self, count: int, size: int, *, purpose: str) -> Iterator[Batch]:
        """`count` examples, `size` at a time, their timesteps spread evenly over the whole range.

        Args:
            purpose: examples of different purposes differ in noise, so what one has seen tests another.
        """
        steps = self.objective.num_train_timesteps
        seed = stable_seed(self.seed, purpose)
        for start in range(0, count, size):
            rows = []
            for index in range(start, min(start + size, count)):
                row = self.dataset.batch(
                    index % len(self.dataset),
                    seed=seed,
                    epoch=index // len(self.dataset),
                    objective=self.objective,
                    dropout=UNCONDITIONAL,
                    weight=1.0,
                    tag="",
                )
                # Evenly, yet scattered: 0.618... visits the range without any order that pictures could
                # share.
                level = int(((index + 0.5) * 0.6180339887 % 1) * steps)
                rows.append(replace(row, timesteps=torch.tensor([level])))
            yield from _together(rows, size)


def gather(
    family: Family,
    pipeline: Pipeline,
    accelerator: Accelerator,
    *,
    data: DataConfig | DreamboothData | None,
    prompts: Sequence[str],
    count: int,
    size: tuple[int, int],
    guidance: float,
    cache: Path,
    model_hash: str,
    seed: int,
    say: Callable[[str], None],
) -> Examples:
    """Collect examples for the model in `pipeline`.

    Args:
        accelerator: the pipeline's parts are moved to its device.
        data: pictures; None draws `count` of them from `prompts` with the pipeline.
        prompts: what to draw.
        size: (height, width) of drawn pictures.
        guidance: classifier-free guidance of drawn pictures.
        cache: folder for what is encoded or drawn; it is shared, as the names say what went in.
        model_hash: hash of the pipeline's files, part of the names of drawn pictures.
        seed: of noise, crops and drawn pictures.

    Raises:
        ConfigError: neither pictures nor prompts are known.
        DataError: see `scan_data`.
    """
    objective = family.objective(pipeline)
    encoder = Encoder(family, pipeline, cache=cache, accelerator=accelerator, say=say)
    if data is not None:
        scan = scan_data(data)
        scan.check()
        dataset = encoder.dataset(scan.samples, data, seed=seed)
        return Examples(dataset, objective, f"{len(dataset)} pictures of {data.path}", seed)
    if not prompts:
        raise ConfigError(
            "this pass learns from pictures, and knows neither pictures nor prompts to draw some",
            hint="give the run `data: {path: ...}`, or `preview: {prompts: [...]}`",
        )
    samples, files = _draw(
        family,
        pipeline,
        encoder.conditioning(["", *prompts]),
        prompts=[prompts[index % len(prompts)] for index in range(count)],
        size=size,
        guidance=guidance,
        cache=cache,
        model_hash=model_hash,
        seed=seed,
        device=accelerator.device,
        say=say,
    )
    dataset = CachedDataset(samples, [(size[1], size[0])] * count, files, encoder.prompts(["", *prompts]))
    return Examples(dataset, objective, f"{count} pictures drawn by the model", seed)


def _draw(
    family: Family,
    pipeline: Pipeline,
    encoded: dict[str, Conditioning],
    *,
    prompts: list[str],
    size: tuple[int, int],
    guidance: float,
    cache: Path,
    model_hash: str,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[Sample], list[list[Path]]]:
    """Sample latents with the pipeline's denoiser; those already in the cache are not drawn again."""
    shape = family.latent_shape(pipeline, *size)
    settings = f"{model_hash} {shape} {guidance} {DRAWING_STEPS}"
    files = [
        cache
        / "drawn"
        / f"{hashlib.sha256(f'{settings} {seed + i} {prompt}'.encode()).hexdigest()[:32]}.safetensors"
        for i, prompt in enumerate(prompts)
    ]
    missing = [index for index, path in enumerate(files) if not path.exists()]
    denoiser = family.denoiser(pipeline).to(device)
    if missing:
        say(f"drawing {len(missing)} pictures to learn from")

    def conditioning(names: list[str]) -> Conditioning:
        rows = [encoded[name] for name in names]
        return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}

    for start in range(0, len(missing), DRAWN_TOGETHER):
        part = missing[start : start + DRAWN_TOGETHER]
        latents = sample(
            lambda rows, times, known: family.denoise(denoiser, rows, times, known),
            pipeline.scheduler,
            initial_latents([seed + index for index in part], shape).to(device),
            conditioning([prompts[index] for index in part]),
            conditioning([""] * len(part)),
            steps=DRAWING_STEPS,
            guidance=guidance,
            seeds=[seed + index for index in part],
        )
        for index, row in zip(part, latents.float().cpu(), strict=True):
            files[index].parent.mkdir(parents=True, exist_ok=True)
            with output_errors(files[index]):
                aside = files[index].with_suffix(".tmp")
                save_file({"moments": torch.cat([row, torch.zeros_like(row)])}, aside)
                aside.replace(files[index])
    samples = [
        Sample(f"drawn/{index}", prompt, size[1], size[0], files[index].stem, str(files[index]), io.BytesIO)
        for index, prompt in enumerate(prompts)
    ]
    return samples, [[path] for path in files]
