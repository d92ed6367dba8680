"""Our sampling is that of diffusers' pipelines, and a picture does not depend on its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import families
from tunekit.diffusion.metrics import relative_error
from tunekit.diffusion.sampling import initial_latents, sample

PROMPTS = ["a red cat", "the moon"]
SEEDS = [3, 4]
SIZE = {"height": 32, "width": 48}
FAMILY = families.get("sd15")
SCHEDULERS = [
    "PNDMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",  # adds noise while it runs
]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = FAMILY.tiny()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use(pipeline: Any, scheduler: str, **settings: Any) -> None:
    import diffusers

    shared = FAMILY.tiny().scheduler.config
    keys = ("beta_start", "beta_end", "beta_schedule", "steps_offset")
    pipeline.scheduler = getattr(diffusers, scheduler)(**{k: shared[k] for k in keys}, **settings)


def ours(pipeline: Any, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    shape = FAMILY.latent_shape(pipeline, SIZE["height"], SIZE["width"])
    return sample(
        lambda latents, t, conditioning: FAMILY.denoise(pipeline.unet, latents, t, conditioning),
        pipeline.scheduler,
        initial_latents(seeds, shape),
        FAMILY.encode_prompt(pipeline, prompts),
        FAMILY.encode_prompt(pipeline, ["a blue dog"] * len(prompts)),
        seeds=seeds,
        **{"steps": 4, "guidance": 5.0, **options},
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_equals_diffusers(pipeline: Any, scheduler: str, guidance: float) -> None:
    use(pipeline, scheduler)
    latents = ours(pipeline, PROMPTS, SEEDS, guidance=guidance)
    expected = pipeline(
        PROMPTS,
        negative_prompt=["a blue dog"] * 2,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **SIZE,
    ).images
    assert (FAMILY.decode(pipeline, latents) - expected).abs().max() <= 1e-5


def test_eta_reaches_the_scheduler(pipeline: Any) -> None:
    use(pipeline, "DDIMScheduler")
    latents = ours(pipeline, PROMPTS, SEEDS, eta=0.8)
    expected = pipeline(
        PROMPTS,
        negative_prompt=["a blue dog"] * 2,
        num_inference_steps=4,
        guidance_scale=5.0,
        eta=0.8,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **SIZE,
    ).images
    assert relative_error(latents, expected) <= 1e-5
    assert relative_error(latents, ours(pipeline, PROMPTS, SEEDS)) > 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_picture_is_the_same_in_every_batch(pipeline: Any, scheduler: str, prediction: str) -> None:
    use(pipeline, scheduler, prediction_type=prediction)
    together = ours(pipeline, PROMPTS, SEEDS)
    alone = torch.cat([ours(pipeline, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    swapped = ours(pipeline, PROMPTS[::-1], SEEDS[::-1]).flip(0)
    assert relative_error(alone, together) < 1e-4
    assert relative_error(swapped, together) < 1e-4


def test_the_scheduler_keeps_no_state(pipeline: Any) -> None:
    use(pipeline, "PNDMScheduler")
    before = dict(pipeline.scheduler.__dict__)
    first = ours(pipeline, PROMPTS, SEEDS)
    assert torch.equal(ours(pipeline, PROMPTS, SEEDS), first)
    assert pipeline.scheduler.__dict__.keys() == before.keys()
    assert pipeline.scheduler.num_inference_steps is None


def test_progress_counts_to_the_end(pipeline: Any) -> None:
    use(pipeline, "DDIMScheduler")
    seen: list[tuple[int, int]] = []
    ours(pipeline, PROMPTS[:1], SEEDS[:1], on_step=lambda done, of, latents: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_without_a_negative_prompt_the_denoiser_sees_each_picture_once(pipeline: Any) -> None:
    use(pipeline, "DDIMScheduler")
    rows: list[int] = []

    def denoise(latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        assert len(latents) == len(timestep) == len(conditioning["encoder_hidden_states"])
        rows.append(len(latents))
        return latents

    conditioning = {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    noise = initial_latents(SEEDS, (4, 8, 8))
    sample(denoise, pipeline.scheduler, noise, conditioning, None, steps=2, guidance=7.5)
    sample(denoise, pipeline.scheduler, noise, conditioning, conditioning, steps=2, guidance=7.5)
    assert rows == [2, 2, 4, 4]
