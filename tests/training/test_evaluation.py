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
from torch import nn

from tunekit import families
from tunekit.config import DataConfig, ObjectiveConfig, PreviewConfig
from tunekit.data.cache import CachedDataset, Encoder
from tunekit.data.images import scan_data
from tunekit.diffusion.noise import sample_generator
from tunekit.diffusion.objectives import FlowMatching
from tunekit.families import Family, Frame
from tunekit.families.family import as_kept
from tunekit.memory.levers import Fitted
from tunekit.memory.measure import Meter
from tunekit.runtime import generate, torch_runtime
from tunekit.tasks import Denoising
from tunekit.training.evaluation import LEVELS, Previewer, preview_name, validation


@pytest.fixture(params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.fixture
def encoder(family: Family, accelerator: Accelerator, tmp_path: Path) -> Encoder:
    return Encoder(family, family.tiny(), cache=tmp_path, accelerator=accelerator, say=lambda line: None)


def learns_by_flow(encoder: Encoder) -> bool:
    return isinstance(encoder.family.objective(encoder.pipeline), FlowMatching)


def task(encoder: Encoder, **options: Any) -> Denoising:
    family, pipeline = encoder.family, encoder.pipeline
    objective = family.objective(pipeline, ObjectiveConfig(**options))
    return Denoising(Fitted.plain(family.denoiser(pipeline)), family, objective)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_validation_loss(
    encoder: Encoder,
    tmp_path: Path,
    make_pictures: Callable[..., Path],
    accelerator: Accelerator,
    micro_batch: int,
) -> None:
    family, pipeline = encoder.family, encoder.pipeline
    data = DataConfig(path=str(make_pictures(tmp_path / "p", 2, (64, 40))), resolution=32, buckets=False)
    dataset = encoder.dataset(list(scan_data(data).samples), data, seed=0, fixed=True)
    measure = validation(dataset, task(encoder), micro_batch, accelerator)
    assert measure is not None
    denoiser = family.denoiser(pipeline)
    measured = measure(denoiser)["val_loss"]

    expected = []
    objective = family.objective(pipeline)
    frame = Frame((40, 64), (0, 10), (32, 32)).rows(1)  # 51 x 32 pixels, of which 19 columns are cut off
    with torch.no_grad():
        for index, sample in enumerate(dataset.samples):
            latents = dataset.moments(index)[0][None]
            encoded = as_kept(family.encode_prompt(pipeline, [sample.caption]))
            conditioning = family.conditioning(encoded, frame)
            for level in range(LEVELS):
                noise = torch.randn(
                    latents.shape, generator=sample_generator(0, level, sample.id, "validation")
                )
                time = torch.tensor([objective.level((level + 0.5) / LEVELS)])
                noisy, _, target, _ = objective.sample(latents, noise, time)
                prediction = family.denoise(denoiser, noisy, time, conditioning)
                expected.append(float((prediction - target).square().mean()))
    assert measured == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert measure(denoiser)["val_loss"] == measured


def test_validation_does_not_depend_on_how_the_loss_is_made(
    encoder: Encoder, tmp_path: Path, make_pictures: Callable[..., Path], accelerator: Accelerator
) -> None:
    """Runs with other weights, another loss or moved noise can be compared by it."""
    data = DataConfig(path=str(make_pictures(tmp_path / "p", 1)), resolution=32)
    dataset = encoder.dataset(list(scan_data(data).samples), data, seed=0, fixed=True)
    figures = set()
    of_noise = {"timesteps": "uniform"} if learns_by_flow(encoder) else {"snr_gamma": 5.0}
    for options in ({}, of_noise, {"loss": "huber"}, {"noise_offset": 0.1}):
        measure = validation(dataset, task(encoder, **options), 4, accelerator)
        assert measure is not None
        figures.add(measure(encoder.family.denoiser(encoder.pipeline))["val_loss"])
    assert len(figures) == 1


def test_nothing_held_out_means_no_validation(encoder: Encoder, accelerator: Accelerator) -> None:
    assert validation(CachedDataset([], [], [], {}), task(encoder), 1, accelerator) is None


def previewer(encoder: Encoder, config: PreviewConfig, folder: Path) -> Previewer:
    sampling = config.sampling.over(torch_runtime(encoder.family, encoder.pipeline).sampling)
    encoded = encoder.conditioning([*config.prompts, sampling.negative_prompt or ""])
    meter = Meter(torch.device("cpu"), active=False)
    return Previewer(encoder.family, encoder.pipeline, config, sampling, encoded, folder, meter)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": "blurry", "guidance": 3.0},
        {"guidance": 1.0, "scheduler": {"class": "UniPCMultistepScheduler", "timestep_spacing": "trailing"}},
        {},  # all as the model has it; SDXL's empty negative prompt is zeros
    ],
)
def test_previews_are_what_generate_draws(encoder: Encoder, tmp_path: Path, options: dict[str, Any]) -> None:
    """Drawn with the encoders gone, yet the very pictures of `tunekit generate`."""
    prompts = ["A red fox, running!", "a clock"]
    config = PreviewConfig(prompts=prompts, steps=4, seed=7, height=32, width=48, **options)
    pipeline: Any = encoder.pipeline
    runtime = torch_runtime(encoder.family, pipeline)
    expected = generate(runtime, prompts, config.sampling, seeds=[7, 8], batch=1)
    draw = previewer(encoder, config, tmp_path / "previews")
    encoder.release(keep_vae=True)
    draw(encoder.family.denoiser(pipeline), 200)
    files = sorted((tmp_path / "previews" / "step-000200").iterdir())
    assert [file.name for file in files] == ["00-a-red-fox-running.png", "01-a-clock.png"]
    for file, picture in zip(files, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture))


def test_previews_show_the_whole_frame(encoder: Encoder, tmp_path: Path) -> None:
    """Whatever was cut out of the pictures that are learned from."""
    seen: list[Any] = []
    config = PreviewConfig(prompts=["a"], steps=2, guidance=3.0, height=32, width=48)
    draw = previewer(encoder, config, tmp_path / "previews")
    network = encoder.family.denoiser(encoder.pipeline)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("added_cond_kwargs", {}).get("time_ids"))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    draw(network, 0)
    handle.remove()
    assert len(seen) > 1
    if "time_ids" in encoder.family.facts.denoiser.keeps:
        assert all(rows.tolist() == [[32, 48, 0, 0, 32, 48]] * 2 for rows in seen)


def test_preview_names_are_safe() -> None:
    assert preview_name(3, "../../etc/passwd") == "03-etc-passwd.png"
    assert preview_name(0, "Größe " * 20) == "00-größe-größe-größe-größe-größe-größe-größ.png"
    assert preview_name(1, "!?") == "01-.png"
