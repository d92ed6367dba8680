"""Validation loss and previews against the same done by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from tunekit import families
from tunekit.config import DataConfig, PreviewConfig
from tunekit.data.cache import Batch, CachedDataset, Encoder
from tunekit.data.images import scan_data
from tunekit.diffusion.noise import sample_generator
from tunekit.runtime import generate, torch_runtime
from tunekit.training.evaluation import LEVELS, preview_name, previews, validation
from tunekit.training.loop import weighted_mse

FAMILY = families.get("sd15")


@pytest.fixture
def encoder(accelerator: Accelerator, tmp_path: Path) -> Encoder:
    return Encoder(FAMILY, FAMILY.tiny(), cache=tmp_path, accelerator=accelerator, say=lambda line: None)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_validation_loss(
    encoder: Encoder,
    tmp_path: Path,
    make_pictures: Callable[..., Path],
    accelerator: Accelerator,
    micro_batch: int,
) -> None:
    pipeline = encoder.pipeline
    data = DataConfig(path=str(make_pictures(tmp_path / "p", 2)), resolution=32)
    dataset = encoder.dataset(list(scan_data(data).samples), data, seed=0, fixed=True)
    objective = FAMILY.objective(pipeline)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        noisy, target, weight = objective.sample(batch.latents, batch.noise, batch.timesteps)
        return weighted_mse(FAMILY.denoise(model, noisy, batch.timesteps, batch.conditioning), target, weight)

    measure = validation(dataset, loss, objective, micro_batch, accelerator)
    assert measure is not None
    measured = measure(pipeline.unet)["val_loss"]

    expected = []
    with torch.no_grad():
        for index, sample in enumerate(dataset.samples):
            latents = dataset.moments(index)[0][None]
            conditioning = FAMILY.encode_prompt(pipeline, [sample.caption])
            for level in range(LEVELS):
                noise = torch.randn(
                    latents.shape, generator=sample_generator(0, level, sample.id, "validation")
                )
                time = torch.tensor([int((level + 0.5) / LEVELS * 1000)])
                noisy, target, _ = objective.sample(latents, noise, time)
                prediction = FAMILY.denoise(pipeline.unet, noisy, time, conditioning)
                expected.append(float((prediction - target).square().mean()))
    assert measured == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert measure(pipeline.unet)["val_loss"] == measured


def test_nothing_held_out_means_no_validation(accelerator: Accelerator) -> None:
    assert validation(CachedDataset([], [], [], {}), lambda *_: torch.zeros(1), None, 1, accelerator) is None  # type: ignore[arg-type]


def test_previews_are_what_generate_draws(encoder: Encoder, tmp_path: Path) -> None:
    """Drawn with the encoders gone, yet the very pictures of `tunekit generate`."""
    prompts = ["A red fox, running!", "a clock"]
    config = PreviewConfig(prompts=prompts, negative_prompt="blurry", steps=4, guidance=3.0, seed=7)
    pipeline: Any = encoder.pipeline
    expected = generate(
        torch_runtime(FAMILY, pipeline),
        prompts,
        negative_prompt="blurry",
        seeds=[7, 8],
        steps=4,
        guidance=3.0,
        height=32,
        width=48,
        batch=1,
    )
    encoded = encoder.conditioning([*prompts, "blurry"])
    encoder.release(keep_vae=True)
    draw = previews(pipeline, FAMILY, config, encoded, tmp_path / "previews", (32, 48), torch.device("cpu"))
    assert draw is not None
    draw(pipeline.unet, 200)
    files = sorted((tmp_path / "previews" / "step-000200").iterdir())
    assert [file.name for file in files] == ["00-a-red-fox-running.png", "01-a-clock.png"]
    for file, picture in zip(files, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture))


def test_preview_names_are_safe() -> None:
    assert preview_name(3, "../../etc/passwd") == "03-etc-passwd.png"
    assert preview_name(0, "Größe " * 20) == "00-größe-größe-größe-größe-größe-größe-größ.png"
    assert preview_name(1, "!?") == "01-.png"
