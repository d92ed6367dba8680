"""Our sampling is that of diffusers' pipelines, and a picture does not depend on its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit import families
from tunekit.config import SamplingConfig, validate
from tunekit.diffusion.metrics import relative_error
from tunekit.diffusion.sampling import Guided, Step, initial_latents, sample, sample_steps, sampler
from tunekit.errors import ConfigError

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


def arguments(pipeline: Any, prompts: list[str], seeds: list[int], **options: Any) -> dict[str, Any]:
    shape = FAMILY.latent_shape(pipeline, SIZE["height"], SIZE["width"])
    sampling = SamplingConfig(**{"steps": 4, "guidance": 5.0, **options})
    scale = FAMILY.cfg_scale(pipeline, sampling.guidance or 0.0)
    negative = FAMILY.encode_prompt(pipeline, ["a blue dog"] * len(prompts))
    return {
        "denoise": lambda latents, t, conditioning: FAMILY.denoise(pipeline.unet, latents, t, conditioning),
        "scheduler": pipeline.scheduler,
        "latents": initial_latents(seeds, shape),
        "conditioning": FAMILY.encode_prompt(pipeline, prompts),
        "guided": None if scale is None else Guided(negative, scale),
        "sampling": sampling,
        "begin": FAMILY.begin,
        "seeds": seeds,
    }


def ours(pipeline: Any, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    return sample(**arguments(pipeline, prompts, seeds, **options))


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),  # takes a generator
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        (None, {"timestep_spacing": "linspace"}),
    ],
)
def test_another_sampler_may_be_asked_for(pipeline: Any, name: str | None, settings: dict[str, Any]) -> None:
    """By class, by keys, or both; what is not named stays as the model has it."""
    import diffusers

    use(pipeline, "PNDMScheduler", prediction_type="v_prediction")
    own = pipeline.scheduler
    asked = {**({"class": name} if name else {}), **settings}
    latents = ours(pipeline, PROMPTS, SEEDS, scheduler=asked)
    made = getattr(diffusers, name or "PNDMScheduler").from_config(own.config, **settings)
    assert made.config.prediction_type == "v_prediction" and made.config.beta_end == own.config.beta_end
    pipeline.scheduler = made
    expected = pipeline(
        PROMPTS,
        negative_prompt=["a blue dog"] * 2,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **SIZE,
    ).images
    assert relative_error(latents, expected) <= 1e-5
    pipeline.scheduler = own
    assert relative_error(latents, ours(pipeline, PROMPTS, SEEDS)) > 0.01


def test_guidance_in_a_part_of_the_steps(pipeline: Any) -> None:
    """The others run the denoiser once, with the prompt alone."""
    use(pipeline, "DDIMScheduler")
    given = arguments(pipeline, PROMPTS, SEEDS)
    denoise, rows = given["denoise"], []

    def counted(latents: Tensor, *rest: Any) -> Tensor:
        rows.append(len(latents))
        result: Tensor = denoise(latents, *rest)
        return result

    def drawn(interval: tuple[float, float] | None) -> Tensor:
        rows.clear()
        guided = given["guided"]._replace(interval=interval)
        return sample(**{**given, "denoise": counted, "guided": guided})

    everywhere, nowhere = drawn(None), ours(pipeline, PROMPTS, SEEDS, guidance=1.0)
    assert rows == [4] * 4
    assert torch.equal(drawn((0.0, 1.0)), everywhere)
    early = drawn((0.0, 0.5))
    assert rows == [4, 4, 2, 2]
    drawn((0.2, 0.6))
    assert rows == [2, 4, 4, 2]
    between = relative_error(early, everywhere)
    assert 0 < between < relative_error(nowhere, everywhere)


@pytest.mark.parametrize("interval", [[0.5, 0.5], [0.6, 0.2], [-0.1, 1], [0, 2], [0.1]])
def test_an_interval_begins_before_it_ends(interval: list[float]) -> None:
    with pytest.raises(ConfigError, match="guidance_interval"):
        validate(SamplingConfig, {"guidance_interval": interval}, lambda key: "here")


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DConditionModel"])
def test_an_unknown_sampler_is_named(pipeline: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f'diffusers has no scheduler "{name}"'):
        sampler(pipeline.scheduler, SamplingConfig(scheduler={"class": name}))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"use_karas_sigmas": True}, r'PNDMScheduler has no key "use_karas_sigmas"'),
        (
            {"class": "EulerDiscreteScheduler", "use_karas_sigmas": True},
            r'no key "use_karas_sigmas"\n.*did you mean "use_karras_sigmas"',
        ),
        (
            {"class": "PNDMScheduler", "rescale_betas_zero_snr": True},
            r'PNDMScheduler has no key "rescale_betas_zero_snr"',
        ),
    ],
)
def test_keys_that_a_sampler_does_not_have_are_refused(
    pipeline: Any, asked: dict[str, Any], words: str
) -> None:
    """diffusers leaves them out without a word."""
    use(pipeline, "PNDMScheduler")
    with pytest.raises(ConfigError, match=words):
        sampler(pipeline.scheduler, SamplingConfig(scheduler=asked))


def test_a_sampler_that_knows_no_zero_terminal_snr_gives_way(pipeline: Any) -> None:
    """As an artifact asks for it that was trained so on a base with PNDM."""
    use(pipeline, "PNDMScheduler")
    asked = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    made = sampler(pipeline.scheduler, SamplingConfig(scheduler=asked))
    assert type(made).__name__ == "DDIMScheduler" and not made.config.clip_sample
    assert float(made.alphas_cumprod[-1]) == 0
    asked["rescale_betas_zero_snr"] = False
    assert type(sampler(pipeline.scheduler, SamplingConfig(scheduler=asked))).__name__ == "PNDMScheduler"
    use(pipeline, "EulerDiscreteScheduler")
    asked["rescale_betas_zero_snr"] = True
    made = sampler(pipeline.scheduler, SamplingConfig(scheduler=asked))
    assert type(made).__name__ == "EulerDiscreteScheduler" and made.config.rescale_betas_zero_snr


def test_asking_for_another_sampler_changes_nothing_that_was_given(pipeline: Any) -> None:
    use(pipeline, "PNDMScheduler")
    before, asked = dict(pipeline.scheduler.config), {"class": "DDIMScheduler", "clip_sample": False}
    assert type(sampler(pipeline.scheduler, SamplingConfig(scheduler=asked))).__name__ == "DDIMScheduler"
    assert asked == {"class": "DDIMScheduler", "clip_sample": False}
    assert dict(pipeline.scheduler.config) == before


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


@pytest.mark.parametrize(("scheduler", "total"), [("DDIMScheduler", 4), ("HeunDiscreteScheduler", 7)])
def test_progress_counts_to_the_end(pipeline: Any, scheduler: str, total: int) -> None:
    """Heun's sampler calls the denoiser twice per step, but for the last."""
    use(pipeline, scheduler)
    steps: list[Step] = list(sample_steps(**arguments(pipeline, PROMPTS[:1], SEEDS[:1])))
    assert [(step.done, step.total) for step in steps] == [(i, total) for i in range(1, total + 1)]
    assert torch.equal(steps[-1].latents, ours(pipeline, PROMPTS[:1], SEEDS[:1]))
    assert not any(step.latents.requires_grad for step in steps)
    assert torch.is_grad_enabled()


def test_without_a_negative_prompt_the_denoiser_sees_each_picture_once(pipeline: Any) -> None:
    use(pipeline, "DDIMScheduler")
    rows: list[int] = []

    def denoise(latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        assert len(latents) == len(timestep) == len(conditioning["encoder_hidden_states"])
        rows.append(len(latents))
        return latents

    conditioning = {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    noise = initial_latents(SEEDS, (4, 8, 8))
    how = SamplingConfig(steps=2)
    for guided in (None, Guided(conditioning, 7.5)):
        sample(denoise, pipeline.scheduler, noise, conditioning, guided, how, begin=FAMILY.begin)
    assert rows == [2, 2, 4, 4]


def test_timesteps_are_float32_rows(pipeline: Any) -> None:
    """Samplers that step between whole numbers exist, and a denoiser takes one time per row."""
    use(pipeline, "EulerDiscreteScheduler", timestep_spacing="linspace")
    seen: list[Tensor] = []

    def denoise(latents: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        seen.append(timestep)
        return latents

    conditioning = {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    noise = initial_latents(SEEDS, (4, 8, 8))
    how = SamplingConfig(steps=5)
    sample(denoise, pipeline.scheduler, noise, conditioning, None, how, begin=FAMILY.begin)
    assert all(times.dtype == torch.float32 and times.shape == (2,) for times in seen)
    assert [float(times[0]) for times in seen] == [999.0, 749.25, 499.5, 249.75, 0.0]
