"""Pictures of every family are those of the pipelines of diffusers, to rounding, from the same noise."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import Tensor

from tunekit import families
from tunekit.config import ObjectiveConfig, SamplingConfig
from tunekit.diffusion.objectives import FlowMatching, configured, scheduler_changes
from tunekit.diffusion.sampling import initial_latents
from tunekit.families import Family
from tunekit.runtime import generate_pixels, torch_runtime

TOLERANCE = 1e-4
SEEDS = [3, 4]
STEPS = 4
SIZES = [(32, 48), (64, 64)]
SHORT, LONG = (
    ["a", "b"],
    ["a very red cat " * 20, "the moon"],
)  # one is cut, as it is longer than the tokenizer takes
OTHER = "DPMSolverMultistepScheduler"  # no family's own


@pytest.fixture(scope="module", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.fixture
def pipeline(family: Family) -> Any:
    made = family.tiny()
    made.set_progress_bar_config(disable=True)
    return made


def ours(family: Family, pipeline: Any, prompts: list[str], sampling: SamplingConfig) -> Tensor:
    return generate_pixels(torch_runtime(family, pipeline), prompts, sampling, seeds=SEEDS)


def theirs(
    family: Family, pipeline: Any, prompts: list[str], sampling: SamplingConfig, **options: Any
) -> Tensor:
    """What their pipeline draws, with the negative prompt that it has itself where none is given."""
    shape = family.latent_shape(pipeline, sampling.height or 0, sampling.width or 0)
    known = inspect.signature(type(pipeline).__call__).parameters
    told = {}  # they take the real model's for granted
    if "max_sequence_length" in known:
        longest = getattr(pipeline, family.facts.encoders[-1].tokenizer).model_max_length
        told["max_sequence_length"] = longest
    if "text_encoder_out_layers" in known:
        layers = pipeline.text_encoder.config.num_hidden_layers
        told["text_encoder_out_layers"] = (layers // 4, layers // 2, 3 * layers // 4)
    negative = None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(prompts)
    if "negative_prompt" in known:
        options["negative_prompt"] = negative
    elif negative is not None:
        options["negative_prompt_embeds"] = pipeline.encode_prompt(negative, **told)[0]
    latents = initial_latents(SEEDS, shape)
    if len(inspect.signature(getattr(pipeline, "_pack_latents", len)).parameters) > 2:
        latents = pipeline._pack_latents(latents, *latents.shape)  # FLUX.1's wants tokens
    made: Tensor = pipeline(
        prompt=list(prompts),  # some write into it
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        height=sampling.height,
        width=sampling.width,
        latents=latents,
        output_type="pt",
        **told,
        **options,
    ).images
    return made


def take_sigmas(scheduler: Any) -> None:
    """Lets a sampler that has its own sigmas be given some: pipelines hand theirs to all alike."""
    own = scheduler.set_timesteps
    if "sigmas" in inspect.signature(own).parameters:
        return

    def set_timesteps(
        steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        told = {"mu": mu} if mu is not None and scheduler.config.use_dynamic_shifting else {}
        own(steps or len(sigmas), device=device, **told)

    scheduler.set_timesteps = set_timesteps


def learns_by_flow(family: Family, pipeline: Any) -> bool:
    return isinstance(family.objective(pipeline), FlowMatching)


def of_size(size: tuple[int, int], guidance: float, **options: Any) -> SamplingConfig:
    return SamplingConfig(steps=STEPS, guidance=guidance, height=size[0], width=size[1], **options)


def check(made: Tensor, expected: Tensor) -> None:
    error = float((made - expected).abs().max())
    print(f"largest difference {error:.2g}")
    assert made.shape == expected.shape and made.std() > 0.02
    assert error <= TOLERANCE
    assert float((made[0] - made[1]).abs().max()) > 0.01


@pytest.mark.parametrize("prompts", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("scheduler", [None, OTHER], ids=["own", "other"])
def test_pictures_are_those_of_diffusers(
    family: Family,
    pipeline: Any,
    scheduler: str | None,
    guidance: float,
    size: tuple[int, int],
    prompts: list[str],
) -> None:
    """Without a negative prompt, of which diffusers makes zeros for SDXL, and the empty prompt for others."""
    sampling = of_size(size, guidance)
    if scheduler is None:
        made = ours(family, pipeline, prompts, sampling)
    else:
        import diffusers

        made = ours(
            family, pipeline, prompts, sampling.model_copy(update={"scheduler": {"class": scheduler}})
        )
        own = pipeline.scheduler.config
        flow = {
            "use_flow_sigmas": True,
            "flow_shift": own.get("shift"),
            "prediction_type": "flow_prediction",
        }
        changes = flow if learns_by_flow(family, pipeline) else {}
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(own, **changes)
        take_sigmas(pipeline.scheduler)
    check(made, theirs(family, pipeline, prompts, sampling))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_negative_prompt(family: Family, pipeline: Any, size: tuple[int, int]) -> None:
    sampling = of_size(size, 6.0, negative_prompt="a blue dog")
    made = ours(family, pipeline, LONG, sampling)
    check(made, theirs(family, pipeline, LONG, sampling))
    plain = ours(family, pipeline, LONG, of_size(size, 6.0))
    differs = float((made - plain).abs().max()) > 0.01
    assert differs == (family.cfg_scale(pipeline, 6.0) is not None)


def test_an_empty_prompt_that_is_not_zeroed(family: Family, pipeline: Any) -> None:
    """As model_index.json may say; then diffusers encodes it, whether it is given or not."""
    if "force_zeros_for_empty_prompt" in pipeline.config:
        zeroed = ours(family, pipeline, SHORT, of_size((32, 48), 6.0))
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        encoded = ours(family, pipeline, SHORT, of_size((32, 48), 6.0))
        assert float((zeroed - encoded).abs().max()) > 1e-3
    for negative in (None, ""):
        sampling = of_size((32, 48), 6.0, negative_prompt=negative)
        check(ours(family, pipeline, SHORT, sampling), theirs(family, pipeline, SHORT, sampling))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("how", ["configured", "artifact"])
def test_v_prediction_with_zero_terminal_snr(
    family: Family, pipeline: Any, how: str, guidance: float
) -> None:
    """As a run's own previews draw, and as its artifact asks for it later, with the base as it is."""
    if learns_by_flow(family, pipeline):
        pytest.skip("has no such schedule")
    section = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)
    sampling = of_size((32, 48), guidance)
    made = configured(pipeline.scheduler, section)
    if how == "configured":
        own, pipeline.scheduler = pipeline.scheduler, made
        drawn = ours(family, pipeline, LONG, sampling)
    else:
        own = pipeline.scheduler
        asked = sampling.model_copy(update={"scheduler": scheduler_changes(section)})
        drawn = ours(family, pipeline, LONG, asked)
        pipeline.scheduler = made
    assert made.config.prediction_type == "v_prediction" and made.config.rescale_betas_zero_snr
    check(drawn, theirs(family, pipeline, LONG, sampling, guidance_rescale=0.0))
    pipeline.scheduler = own
    assert float((ours(family, pipeline, LONG, sampling) - drawn).abs().max()) > 0.01


def test_a_batch_of_its_own_for_each_picture(family: Family, pipeline: Any) -> None:
    sampling = of_size((32, 48), 6.0)
    runtime = torch_runtime(family, pipeline)
    alone = generate_pixels(runtime, LONG, sampling, seeds=SEEDS, batch=1)
    check(alone, theirs(family, pipeline, LONG, sampling))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_the_bundled_model(guidance: float) -> None:
    """With weights that were trained, and all the rest as the model itself says."""
    family = families.get("sd15")
    pipeline = family.load("builtin/emoji-64")
    pipeline.set_progress_bar_config(disable=True)
    sampling = of_size(family.default_size(pipeline), guidance, negative_prompt="")
    prompts = ["a red heart", "a smiling cat"]
    check(ours(family, pipeline, prompts, sampling), theirs(family, pipeline, prompts, sampling))
