"""Noise, targets and weights against the formulas, by hand and against diffusers."""

from __future__ import annotations

import pytest
import torch

from tunekit.diffusion.noise import sample_generator
from tunekit.diffusion.objectives import Objective
from tunekit.errors import ConfigError

# Signal-to-noise ratios 9, 1 and 0 (a zero-terminal schedule ends there) and infinity.
ALPHAS = torch.tensor([0.9, 0.5, 0.0, 1.0])
ALL = torch.arange(4)
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [5 / 9, 1.0, 1.0, 0.0]),  # min(snr, 5) / snr
        ("v_prediction", [5 / 10, 1 / 2, 0.0, 0.0]),  # min(snr, 5) / (snr + 1)
        ("sample", [5.0, 1.0, 0.0, 5.0]),  # min(snr, 5)
    ],
)
def test_min_snr_weights(prediction: str, expected: list[float]) -> None:
    weight = Objective(prediction, ALPHAS, snr_gamma=5.0).weight(ALL)
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_all_timesteps_weigh_one_without_gamma(prediction: str) -> None:
    assert Objective(prediction, ALPHAS).weight(ALL).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", 2.0), ("v_prediction", 0.8 * 2 - 0.6 * 3), ("sample", 3.0)]
)
def test_noise_and_target_by_hand(prediction: str, expected: float) -> None:
    latents, noise = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 2.0)
    objective = Objective(prediction, torch.tensor([0.64]))
    noisy, target, weight = objective.sample(latents, noise, torch.tensor([0]))
    torch.testing.assert_close(noisy, torch.full_like(noisy, 0.8 * 3 + 0.6 * 2))
    torch.testing.assert_close(target, torch.full_like(target, expected))
    assert weight.shape == (1,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_schedule_is_that_of_diffusers(prediction: str, sampler: str) -> None:
    import diffusers

    config = getattr(diffusers, sampler)(**STABLE_DIFFUSION, prediction_type=prediction).config
    objective = Objective.from_scheduler(config)
    reference = diffusers.DDPMScheduler(**STABLE_DIFFUSION, prediction_type=prediction)
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(2))
    timesteps = torch.tensor([0, 500, 999])
    noisy, target, _ = objective.sample(latents, noise, timesteps)
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, timesteps))
    wanted = noise if prediction == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_zero_terminal_schedule_gives_finite_weights(prediction: str) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction, "rescale_betas_zero_snr": True}
    objective = Objective.from_scheduler(config, snr_gamma=5.0)
    assert objective.alphas_cumprod[-1] == 0
    weight = objective.weight(torch.arange(1000))
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    assert (weight <= 1).all()


def test_timesteps_are_drawn_evenly_and_repeatably() -> None:
    objective = Objective.from_scheduler(STABLE_DIFFUSION)
    draws = [objective.draw_timesteps(sample_generator(0, 0, str(i), "timestep")) for i in range(4000)]
    again = [objective.draw_timesteps(sample_generator(0, 0, str(i), "timestep")) for i in range(20)]
    assert draws[:20] == again
    assert min(draws) >= 0 and max(draws) <= 999
    counts = torch.bincount(torch.tensor(draws) // 100, minlength=10)
    assert (counts - 400).abs().max() < 100  # five standard deviations


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ConfigError, match="flow"):
        Objective("flow", ALPHAS)
