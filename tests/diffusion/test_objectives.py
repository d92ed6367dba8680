"""Noise, targets, weights and losses against the formulas, by hand and against diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import training_utils
from torch import Tensor

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.noise import sample_generator
from tunekit.diffusion.objectives import Discrete, FlowMatching, Objective, configured, mixed, weighted_mse
from tunekit.errors import ConfigError, ModelError

# Signal-to-noise ratios 9, 1 and 0 (a zero-terminal schedule ends there) and infinity.
ALPHAS = torch.tensor([0.9, 0.5, 0.0, 1.0])
ALL = torch.arange(4)
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
MIN_SNR = ObjectiveConfig(snr_gamma=5.0)


LATENTS = (4, 8, 8)


def scheduler(name: str = "DDPMScheduler", **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**settings)


def pair(count: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=draw), torch.randn(count, 4, 8, 8, generator=draw)


@pytest.fixture(params=["discrete", "flow matching"])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes either objective of a config."""
    if request.param == "discrete":
        return lambda **options: Discrete.from_scheduler(
            scheduler(**STABLE_DIFFUSION), ObjectiveConfig(**options)
        )
    return lambda **options: FlowMatching(config=ObjectiveConfig(**options))


# Discrete diffusion


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [5 / 9, 1.0, 1.0, 0.0]),  # min(snr, 5) / snr
        ("v_prediction", [5 / 10, 1 / 2, 0.0, 0.0]),  # min(snr, 5) / (snr + 1)
        ("sample", [5.0, 1.0, 0.0, 5.0]),  # min(snr, 5)
    ],
)
def test_min_snr_weights(prediction: str, expected: list[float]) -> None:
    weight = Discrete(prediction, ALPHAS, MIN_SNR).weight(ALL)
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_the_scripts_of_diffusers(prediction: str, gamma: float) -> None:
    reference = scheduler(**STABLE_DIFFUSION, prediction_type=prediction)
    times = torch.arange(1000)
    snr = training_utils.compute_snr(reference, times)
    expected = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    objective = Discrete.from_scheduler(reference, ObjectiveConfig(snr_gamma=gamma))
    torch.testing.assert_close(objective.weight(times.float()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_all_timesteps_weigh_one_without_gamma(prediction: str) -> None:
    assert Discrete(prediction, ALPHAS).weight(ALL).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("prediction", "expected"), [("epsilon", 2.0), ("v_prediction", 0.8 * 2 - 0.6 * 3), ("sample", 3.0)]
)
def test_noise_and_target_by_hand(prediction: str, expected: float) -> None:
    latents, noise = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 2.0)
    objective = Discrete(prediction, torch.tensor([0.64]))
    noisy, timesteps, target, weight = objective.sample(latents, noise, torch.tensor([0.0]))
    torch.testing.assert_close(noisy, torch.full_like(noisy, 0.8 * 3 + 0.6 * 2))
    torch.testing.assert_close(target, torch.full_like(target, expected))
    assert timesteps.tolist() == [0.0]
    assert weight.shape == (1,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_schedule_is_that_of_diffusers(prediction: str, sampler: str) -> None:
    objective = Discrete.from_scheduler(
        scheduler(sampler, **STABLE_DIFFUSION, prediction_type=prediction),
    )
    reference = scheduler(**STABLE_DIFFUSION, prediction_type=prediction)
    latents, noise = pair()
    timesteps = torch.tensor([0, 500, 999])
    noisy, _, target, _ = objective.sample(latents, noise, timesteps.float())
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, timesteps))
    wanted = noise if prediction == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_zero_terminal_schedule_gives_finite_weights(prediction: str) -> None:
    made = scheduler(**STABLE_DIFFUSION, prediction_type=prediction, rescale_betas_zero_snr=True)
    objective = Discrete.from_scheduler(made, MIN_SNR)
    assert objective.alphas_cumprod[-1] == 0
    weight = objective.weight(torch.arange(1000))
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    assert (weight <= 1).all()


def test_timesteps_are_drawn_evenly_and_repeatably() -> None:
    objective = Discrete.from_scheduler(scheduler(**STABLE_DIFFUSION))

    def draw(count: int) -> Tensor:
        return torch.stack(
            [objective.draw(sample_generator(0, 0, str(i), "timestep"), LATENTS) for i in range(count)]
        )

    draws = draw(4000)
    assert torch.equal(draws[:20], draw(20))
    assert draws.dtype == torch.float32 and torch.equal(draws, draws.floor())
    assert min(draws) >= 0 and max(draws) <= 999
    counts = torch.bincount(draws.long() // 100, minlength=10)
    assert (counts - 400).abs().max() < 100  # five standard deviations


def test_timesteps_are_those_that_were_drawn_before_they_became_floats() -> None:
    """Recorded with `int(torch.randint(1000, (), generator=...))`; runs that go on see the same draws."""
    objective = Discrete.from_scheduler(scheduler(**STABLE_DIFFUSION))
    for name in ("a", "b", "c"):
        expected = int(torch.randint(1000, (), generator=sample_generator(0, 0, name, "timestep")))
        assert float(objective.draw(sample_generator(0, 0, name, "timestep"), LATENTS)) == expected


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ConfigError, match="flow"):
        Discrete("flow", ALPHAS)


# Which schedulers are whose


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        ),
        ("EDMEulerScheduler", {}),
    ],
)
def test_a_scheduler_without_a_discrete_schedule_is_named(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{name}.*no discrete noise schedule"):
        Discrete.from_scheduler(scheduler(name, **settings))


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "EDMEulerScheduler"])
def test_a_discrete_scheduler_is_not_for_flow_matching(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}, and this family learns by flow matching"):
        FlowMatching.from_scheduler(scheduler(name))


def test_a_solver_with_flow_sigmas_is_for_flow_matching() -> None:
    made = scheduler("DPMSolverMultistepScheduler", use_flow_sigmas=True, flow_shift=2.0)
    assert FlowMatching.from_scheduler(made).shift == 2.0


# Flow matching


def test_flow_matching_by_hand() -> None:
    latents, noise = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 2.0)
    noisy, timesteps, target, weight = FlowMatching().sample(latents, noise, torch.tensor([250.0, 1000.0]))
    assert noisy[:, 0, 0, 0].tolist() == [0.75 * 3 + 0.25 * 2, 2.0]
    assert target.unique().tolist() == [-1.0]
    assert timesteps.tolist() == [250.0, 1000.0]
    assert weight.tolist() == [1.0, 1.0]


def test_the_path_is_that_of_diffusers() -> None:
    reference = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    latents, noise = pair()
    times = reference.timesteps[[10, 500, 990]]
    noisy, _, target, _ = FlowMatching.from_scheduler(reference).sample(latents, noise, times)
    torch.testing.assert_close(noisy, reference.scale_noise(latents, times, noise))
    # One step from there to no noise arrives at the latents.
    sigma = (times / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - sigma * target, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_times_are_drawn_as_diffusers_draws_them(timesteps: str) -> None:
    objective = FlowMatching(config=ObjectiveConfig(timesteps=timesteps))
    expected = training_utils.compute_density_for_timestep_sampling(
        timesteps, 512, logit_mean=0.0, logit_std=1.0, generator=torch.Generator().manual_seed(0)
    )
    drawn = objective.draw(torch.Generator().manual_seed(0), LATENTS, (512,))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, 1000 * expected)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_shift_is_that_of_diffusers(shift: float) -> None:
    """`timesteps` of their scheduler are 1000, 999 ... 1, shifted; a share of the way is one of them."""
    shifted = scheduler("FlowMatchEulerDiscreteScheduler", shift=shift)
    shares = scheduler("FlowMatchEulerDiscreteScheduler").timesteps / 1000
    for objective in (
        FlowMatching.from_scheduler(shifted),
        FlowMatching(config=ObjectiveConfig(shift=shift)),
    ):
        torch.testing.assert_close(1000 * objective._shifted(shares, LATENTS), shifted.timesteps)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_shift_of_the_base_is_the_schedulers_unless_told(dynamic: bool) -> None:
    """In training diffusers draws from a scheduler's own timesteps, which a dynamic shift leaves alone."""
    made = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=dynamic)
    shares = scheduler("FlowMatchEulerDiscreteScheduler").timesteps / 1000
    own = FlowMatching.from_scheduler(made)
    torch.testing.assert_close(1000 * own._shifted(shares, LATENTS), made.timesteps)
    told = FlowMatching.from_scheduler(made, ObjectiveConfig(shift=2.0))
    generator = torch.Generator().manual_seed(0)
    share = torch.randn(64, generator=torch.Generator().manual_seed(0)).sigmoid()
    torch.testing.assert_close(told.draw(generator, LATENTS, (64,)), 1000 * 2 * share / (1 + share))


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (160, 128)])
def test_a_shift_that_follows_the_size_is_that_of_diffusers(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    made = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, base_shift=0.4)
    made.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=calculate_shift(size[0] * size[1] // 4, base_shift=0.4))
    shares = torch.tensor([0.9, 0.5, 0.1])
    plain = FlowMatching.from_scheduler(made, patch=2)
    told = FlowMatching.from_scheduler(made, ObjectiveConfig(shift="resolution"), patch=2, shift=3.0)
    for objective in (plain, told):
        torch.testing.assert_close(1000 * objective._shifted(shares, (16, *size)), made.timesteps)
    own = FlowMatching.from_scheduler(made, patch=2, shift=3.0)
    torch.testing.assert_close(own._shifted(shares, (16, *size)), 3 * shares / (1 + 2 * shares))


def test_a_shift_by_size_is_refused_where_it_means_nothing() -> None:
    made = scheduler("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ConfigError, match="resolution is for families"):
        FlowMatching.from_scheduler(made, ObjectiveConfig(shift="resolution"))
    with pytest.raises(ConfigError, match=r"objective\.shift has no effect"):
        Discrete.from_scheduler(scheduler(), ObjectiveConfig(shift="resolution"))


def test_levels_are_spread_over_the_whole_schedule(make: Any) -> None:
    objective = make()
    assert [objective.level(share) for share in (0.0, 0.125, 0.5, 0.999)] == [0.0, 125.0, 500.0, 999.0]
    if isinstance(objective, FlowMatching):
        assert objective.level(0.1234567) == pytest.approx(123.4567)
    else:
        assert objective.level(0.1234567) == 123.0


# The section `objective:`


@pytest.mark.parametrize(
    ("made", "key"),
    [
        *((Discrete("epsilon", ALPHAS), key) for key in ({"timesteps": "logit_normal"}, {"shift": 2.0})),
        *(
            (FlowMatching(), key)
            for key in ({"snr_gamma": 5.0}, {"prediction": "epsilon"}, {"zero_terminal_snr": False})
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else type(value).__name__,
)
def test_options_of_the_other_kind_have_no_effect_and_say_so(made: Objective, key: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.{next(iter(key))} has no effect"):
        type(made)(**{**vars(made), "config": ObjectiveConfig(**key)})


def test_uniform_timesteps_are_what_a_discrete_schedule_has_anyway() -> None:
    Discrete("epsilon", ALPHAS, ObjectiveConfig(timesteps="uniform"))


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_merge_that_predicts_v_with_zero_terminal_snr(name: str) -> None:
    """A single file says neither; the section does, and training and sampling follow. PNDM knows no such
    schedule, so that another sampler takes its place."""
    before = scheduler(name, **STABLE_DIFFUSION)
    section = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)
    made = configured(before, section)
    assert made.config.timestep_spacing == "trailing"
    objective = Discrete.from_scheduler(made, section)
    reference = scheduler(**STABLE_DIFFUSION, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert objective.alphas_cumprod[-1] == 0
    torch.testing.assert_close(objective.alphas_cumprod, reference.alphas_cumprod)
    latents, noise = pair()
    times = torch.tensor([1, 500, 999])
    noisy, _, target, _ = objective.sample(latents, noise, times.float())
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, times))
    torch.testing.assert_close(target, reference.get_velocity(latents, noise, times))
    assert torch.equal(noisy[2], noise[2]) and torch.equal(target[2], -latents[2])
    made.set_timesteps(10)
    assert int(made.timesteps[0]) == 999
    assert float(made.alphas_cumprod[-1]) < 1e-6


def test_a_scheduler_is_left_alone_where_the_section_says_nothing() -> None:
    before = scheduler("PNDMScheduler", **STABLE_DIFFUSION)
    assert configured(before, ObjectiveConfig(snr_gamma=5.0, loss="huber")) is before
    made = configured(before, ObjectiveConfig(prediction="v_prediction"))
    assert type(made) is type(before)
    assert made.config == {**before.config, "prediction_type": "v_prediction"} | {
        "_use_default_values": made.config["_use_default_values"]
    }


@pytest.mark.parametrize("section", [{}, {"prediction": "epsilon"}])
def test_noise_cannot_be_predicted_from_noise_alone(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"zero_terminal_snr needs a base that predicts v"):
        configured(
            scheduler("DDIMScheduler", **STABLE_DIFFUSION),
            ObjectiveConfig(zero_terminal_snr=True, **section),
        )


def test_huber_is_the_square_near_zero_and_linear_beyond(make: Any) -> None:
    objective = make(loss="huber", huber_delta=0.5)
    target = torch.zeros(3, 1, 2, 2)
    error = torch.tensor([0.1, 0.5, 4.0]).view(3, 1, 1, 1).expand_as(target)
    made = objective.loss(error, target, torch.tensor([1.0, 1.0, 2.0]))
    torch.testing.assert_close(made, torch.tensor([0.1**2, 0.5**2, 2 * (2 * 0.5 * 4.0 - 0.5**2)]))
    one, other = pair()
    plain = make().loss(one, other, torch.ones(3))
    assert torch.equal(plain, weighted_mse(one, other, torch.ones(3)))
    torch.testing.assert_close(make(loss="huber", huber_delta=100.0).loss(one, other, torch.ones(3)), plain)


def test_losses_are_float32_whatever_comes_in(make: Any) -> None:
    one, other = (tensor.bfloat16() for tensor in pair())
    for section in ({}, {"loss": "huber"}):
        made = make(**section).loss(one, other, torch.ones(3))
        assert made.dtype == torch.float32 and made.shape == (3,)
        torch.testing.assert_close(made, make(**section).loss(one.float(), other.float(), torch.ones(3)))


def test_weighted_mse() -> None:
    prediction, target = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    target[1] = 2
    assert weighted_mse(prediction, target, torch.tensor([1.0, 0.5])).tolist() == [1, 2]


def test_noise_offset_moves_each_channel_as_a_whole(make: Any) -> None:
    shape = (4, 8, 8)
    generator = sample_generator(0, 0, "fox.png", "noise")
    plain = make().noise(generator, shape)
    own = torch.randn(4, 1, 1, generator=generator)  # drawn after it, from the sample's own generator
    offset = make(noise_offset=0.25).noise(sample_generator(0, 0, "fox.png", "noise"), shape)
    torch.testing.assert_close(offset, plain + 0.25 * own)
    assert torch.equal(plain, torch.randn(shape, generator=sample_generator(0, 0, "fox.png", "noise")))
    other = make(noise_offset=0.25).noise(sample_generator(0, 0, "owl.png", "noise"), shape)
    assert not torch.equal(offset, other)


def test_figures_that_are_compared_know_no_options(make: Any) -> None:
    options = {"loss": "huber", "noise_offset": 0.1}
    own = {"snr_gamma": 5.0} if isinstance(make(), Discrete) else {"shift": 3.0}
    plain = make(**options, **own).plain()
    assert plain.config == ObjectiveConfig()
    one, other = pair()
    times = torch.tensor([10.0, 500.0, 900.0])
    for made, expected in zip(plain.sample(one, other, times), make().sample(one, other, times), strict=True):
        assert torch.equal(made, expected)


def test_a_stand_in_for_a_scheduler_needs_a_config_alone() -> None:
    """As planning has it: nothing of a scheduler is read but its class and its configuration."""
    stand_in = SimpleNamespace(config=dict(STABLE_DIFFUSION))
    assert Discrete.from_scheduler(stand_in).num_train_timesteps == 1000


# What a prediction means


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", None])
def test_what_a_right_prediction_means_is_what_noisy_latents_are_made_of(prediction: str | None) -> None:
    objective: Objective = FlowMatching()
    if prediction:
        objective = Discrete.from_scheduler(scheduler(**STABLE_DIFFUSION, prediction_type=prediction))
    latents, noise = pair()
    times = torch.tensor([20.0, 500.0, 980.0])
    noised = objective.sample(latents, noise, times)
    torch.testing.assert_close(mixed(objective, latents, noise, times), noised.noisy)
    found = objective.apart(noised.target, noised.noisy, times)
    torch.testing.assert_close(found, (latents, noise), atol=2e-4, rtol=1e-4)
    assert torch.equal(mixed(objective, latents, noise, torch.full((3,), objective.clean)), latents)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_one_of_ddim(prediction: str) -> None:
    settings = {"clip_sample": False, "timestep_spacing": "trailing"}
    reference = scheduler("DDIMScheduler", **STABLE_DIFFUSION, **settings, prediction_type=prediction)
    reference.set_timesteps(4)
    assert reference.timesteps.tolist() == Discrete.from_scheduler(reference).between(999, -1, 4)
    objective = Discrete.from_scheduler(reference)
    noisy, said = pair()
    for now, then in ((999, 749), (249, -1)):
        expected = reference.step(said, now, noisy).prev_sample
        parts = objective.apart(said, noisy, torch.full((3,), float(now)))
        torch.testing.assert_close(
            mixed(objective, *parts, torch.full((3,), float(then))), expected, rtol=1e-4, atol=1e-4
        )


def test_a_step_is_one_of_euler() -> None:
    reference = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    reference.set_timesteps(4)
    noisy, said = pair()
    now, then = reference.timesteps[:2]
    expected = reference.step(said, now, noisy).prev_sample
    parts = FlowMatching().apart(said, noisy, now.expand(3))
    torch.testing.assert_close(mixed(FlowMatching(), *parts, then.expand(3)), expected)
