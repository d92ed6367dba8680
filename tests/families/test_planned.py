"""The families that can be planned and not yet run, on small networks of their real classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.config import ObjectiveConfig
from tunekit.diffusion.metrics import relative_error
from tunekit.diffusion.objectives import FlowMatching
from tunekit.errors import ConfigError, ModelError
from tunekit.families import Sizes
from tunekit.families.flux import pack, positions, unpack
from tunekit.families.sizes import with_config

CLIP = {
    "vocab_size": 100,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 99,
    "bos_token_id": 98,
    "pad_token_id": 99,
}
T5 = {
    "d_model": 48,
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": 100,
    "feed_forward_proj": "gated-gelu",
}
VAE = {
    "block_out_channels": (8, 8, 16),  # 4 pixels per latent, unlike the real one
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.75,
    "shift_factor": 0.125,
}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "flux": {
        "transformer": {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        "vae": VAE,
        "text_encoder": {**CLIP, "hidden_size": 16, "projection_dim": 16},
        "text_encoder_2": T5,
    },
}
T5_TOKENS = 20
HEIGHT, WIDTH = 48, 32  # 12 x 8 latents, 24 tokens: neither the text's 32 (SD3) nor its 20 (FLUX.1)
TOKENS = 24


def small(name: str) -> Sizes:
    """A family's table at the size of no base that exists."""
    family = families.planned(name)
    parts = [with_config(part, SMALL[name].get(part.name, part.config)) for part in family.facts.components]
    return Sizes(
        family,
        tuple(
            replace(part, tokens=T5_TOKENS) if part.classes.endswith("T5EncoderModel") else part
            for part in parts
        ),
    )


@pytest.fixture(
    scope="module", params=[name for name, known in families.FAMILIES.items() if not known.facts.runs]
)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return small(request.param)


@pytest.fixture(scope="module")
def pipeline(sizes: Sizes) -> Any:
    """Its networks, on the CPU, with weights that are drawn anew from one seed."""
    made = sizes.pipeline(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in sizes.networks:
            network = getattr(made, part.name)
            for parameter in network.parameters():  # zero-initialised outputs would hide what is wrong
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.05)
    return made


def tokens(sizes: Sizes, count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    made = {part.name: torch.randint(0, 98, (count, part.tokens), generator=draw) for part in sizes.encoders}
    for part in sizes.encoders:
        made[part.name][:, -1] = 99  # where CLIP pools
    return made


def inputs(sizes: Sizes, pipeline: Any, guidance: float | None = None) -> tuple[Tensor, Tensor, Any]:
    family = sizes.family
    noisy = torch.randn(
        2,
        *family.latent_shape(pipeline, HEIGHT, WIDTH),
        generator=torch.Generator().manual_seed(1),
    )
    encoded = family.encode_tokens(pipeline, tokens(sizes, 2))
    encoded = {name: value.float() for name, value in encoded.items()}  # as the cache keeps it
    frames = families.Frame.whole(HEIGHT, WIDTH).rows(2)
    return noisy, torch.tensor([250.5, 990.0]), family.conditioning(encoded, frames, guidance)


class Tokenizer:
    """Answers with token ids that were made before; the pipelines of diffusers ask for nothing else."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.model_max_length = ids.shape[1]

    def __call__(self, prompt: list[str], **options: Any) -> Any:
        return SimpleNamespace(input_ids=self.ids)

    def tokenize(self, prompt: str) -> list[str]:
        return []  # looked through for words of textual inversion


def of_diffusers(sizes: Sizes, pipeline: Any) -> Any:
    """The pipeline of diffusers, with the same networks."""
    import diffusers

    parts = {part.name: getattr(pipeline, part.name) for part in sizes.components}
    made = tokens(sizes, 2)
    parts |= {part.tokenizer: Tokenizer(made[part.name]) for part in sizes.encoders}
    whole = getattr(diffusers, sizes.family.facts.pipeline_class)(**parts)
    whole.set_progress_bar_config(disable=True)
    return whole


# What every one promises


def test_it_can_be_planned_and_not_run(sizes: Sizes) -> None:
    name = sizes.family.name
    assert families.planned(name) is sizes.family and not sizes.family.facts.runs
    with pytest.raises(ConfigError, match=f'"{name}" can be planned .* not be run yet'):
        families.get(name)


def test_the_table_builds_the_pipelines_own_classes(sizes: Sizes, pipeline: Any) -> None:
    import diffusers

    kind = getattr(diffusers, sizes.family.facts.pipeline_class)
    hints = inspect.signature(kind.__init__).parameters
    for part in sizes.components:
        assert part.name in hints
        if part.role != "scheduler":
            assert isinstance(getattr(pipeline, part.name), part.type)
        for path in part.sensitive:
            assert getattr(pipeline, part.name).get_submodule(path) is not None
        if part.tokenizer:
            assert part.tokenizer in hints
    assert sizes.family.denoiser(pipeline) is pipeline.transformer


def test_sizes_follow_the_networks(sizes: Sizes, pipeline: Any) -> None:
    """Without data the same shapes and types come out as with it."""
    encoded = sizes.family.encode_tokens(pipeline, tokens(sizes, 2))
    planned = sizes.encoded(2)
    assert {k: v.shape for k, v in planned.items()} == {k: v.shape for k, v in encoded.items()}
    assert all(value.is_meta and value.dtype == torch.float32 for value in planned.values())
    assert sizes.latents(2, HEIGHT, WIDTH).shape == (2, 4, 12, 8)
    with pytest.raises(ConfigError, match="multiple of 8"):
        sizes.family.latent_shape(pipeline, HEIGHT, WIDTH + 4)


def test_its_objective_is_flow_matching(sizes: Sizes, pipeline: Any) -> None:
    family = sizes.family
    objective = family.objective(pipeline, ObjectiveConfig(noise_offset=0.1))
    assert isinstance(objective, FlowMatching)
    assert objective.num_train_timesteps == 1000 and objective.config.noise_offset == 0.1
    assert objective.shift == (3.0 if family.name == "sd3" else 1.0)  # FLUX.1 shifts by size, in sampling
    noisy, timestep, _ = inputs(sizes, pipeline)
    made = objective.sample(noisy, noisy.flip(0), timestep)
    assert torch.equal(made.timesteps, timestep)


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_discrete_scheduler_is_refused(sizes: Sizes, name: str) -> None:
    import diffusers

    pipeline = SimpleNamespace(scheduler=getattr(diffusers, name)())
    with pytest.raises(ModelError, match=f"its scheduler is {name}, and this family learns by flow"):
        sizes.family.objective(pipeline)


def test_a_solver_with_flow_sigmas_is_taken(sizes: Sizes) -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert isinstance(sizes.family.objective(SimpleNamespace(scheduler=scheduler)), FlowMatching)


def test_latents_are_shifted_and_scaled(sizes: Sizes, pipeline: Any) -> None:
    picture = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = sizes.family.encode_image(pipeline, picture).chunk(2, dim=1)
    raw = pipeline.vae.encode(picture).latent_dist
    torch.testing.assert_close(mean, (raw.mean - 0.125) * 0.75)
    torch.testing.assert_close(std, raw.std * 0.75)
    expected = (pipeline.vae.decode(raw.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(sizes.family.decode(pipeline, mean), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(sizes: Sizes, pipeline: Any) -> None:
    whole = of_diffusers(sizes, pipeline)
    ours = sizes.family.encode_tokens(pipeline, tokens(sizes, 2))
    prompts = ["a red cat", "the moon"]
    longest = sizes.encoders[-1].tokens
    if sizes.family.name == "sd3":
        states, _, pooled, _ = whole.encode_prompt(
            prompts,
            prompts,
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=longest,
            device="cpu",
        )
    else:
        states, pooled, _ = whole.encode_prompt(prompts, prompts, max_sequence_length=longest, device="cpu")
    assert torch.equal(ours["encoder_hidden_states"], states)
    torch.testing.assert_close(ours["pooled_projections"], pooled.to(ours["pooled_projections"].dtype))
    assert relative_error(states[0], states[1]) > 0.01 and relative_error(pooled[0], pooled[1]) > 0.01


@torch.no_grad()
def test_the_denoiser_listens_to_everything(sizes: Sizes, pipeline: Any) -> None:
    family = sizes.family
    noisy, timestep, told = inputs(sizes, pipeline)
    prediction = family.denoise(pipeline.transformer, noisy, timestep, told)
    assert prediction.shape == noisy.shape and torch.isfinite(prediction).all()
    second = {key: value[1:] for key, value in told.items()}
    alone = family.denoise(pipeline.transformer, noisy[1:], timestep[1:], second)
    torch.testing.assert_close(alone, prediction[1:], atol=1e-5, rtol=1e-4)
    others = [
        family.denoise(pipeline.transformer, noisy.flip(0), timestep, told),
        family.denoise(pipeline.transformer, noisy, timestep.flip(0), told),
    ]
    for name in told:
        changed = {**told, name: told[name] + 1}
        others.append(family.denoise(pipeline.transformer, noisy, timestep, changed))
    for other in others:
        assert relative_error(other, prediction) > 1e-4


@torch.no_grad()
def test_denoise_is_the_call_of_the_pipeline(sizes: Sizes, pipeline: Any) -> None:
    """Input by input: what `denoise` hands to the network is what diffusers' own pipeline hands to it."""
    family = sizes.family
    noisy, _, _ = inputs(sizes, pipeline)
    guidance = 3.5 if family.name == "flux" else 1.0
    whole = of_diffusers(sizes, pipeline)
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        calls.append((kwargs, output[0]))

    handle = pipeline.transformer.register_forward_hook(note, with_kwargs=True)
    encoded = {k: v.float() for k, v in family.encode_tokens(pipeline, tokens(sizes, 2)).items()}
    packed = pack(noisy) if family.name == "flux" else noisy
    whole(
        prompt_embeds=encoded["encoder_hidden_states"],
        pooled_prompt_embeds=encoded["pooled_projections"],
        latents=packed,
        num_inference_steps=3,
        guidance_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        output_type="latent",
    )
    assert len(calls) == 3
    theirs, calls = calls, []
    told = family.conditioning(encoded, families.Frame.whole(HEIGHT, WIDTH).rows(2), guidance)
    for kwargs, output in theirs:
        latents = kwargs["hidden_states"]
        if family.name == "flux":
            latents, output = unpack(latents, 12, 8), unpack(output, 12, 8)
        scale = 1000 if family.name == "flux" else 1
        made = family.denoise(pipeline.transformer, latents, kwargs["timestep"] * scale, told)
        torch.testing.assert_close(made, output, atol=1e-6, rtol=1e-5)
        ours = calls[-1][0]
        assert not kwargs.get("joint_attention_kwargs")
        unlike = {"return_dict", "joint_attention_kwargs"}
        given = {key for key, value in kwargs.items() if value is not None} - unlike
        assert given == {key for key, value in ours.items() if value is not None} - unlike
        for key in given:
            torch.testing.assert_close(ours[key], kwargs[key], msg=lambda text, key=key: f"{key}: {text}")
    handle.remove()
    assert torch.equal(theirs[0][0]["hidden_states"], packed)


@torch.no_grad()
def watched(sizes: Sizes, pipeline: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    """What was read of the output of each large block, in the order in which they ran."""
    seen: dict[str, Any] = {}
    handles = [
        block.register_forward_hook(lambda module, args, output, path=path: seen.update({path: read(output)}))
        for path, block in sizes.family.blocks(pipeline.transformer)
    ]
    sizes.family.denoise(pipeline.transformer, *inputs(sizes, pipeline))
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_are_in_the_order_they_run(sizes: Sizes, pipeline: Any) -> None:
    ran = watched(sizes, pipeline, lambda output: None)
    blocks = sizes.family.blocks(pipeline.transformer)
    assert list(ran) == [path for path, _ in blocks] and len(ran) > 2
    assert all(pipeline.transformer.get_submodule(path) is block for path, block in blocks)
    inside = sum(p.numel() for _, block in blocks for p in block.parameters())
    assert inside > 0.5 * sum(p.numel() for p in pipeline.transformer.parameters())


def test_every_block_gives_the_pictures_state(sizes: Sizes, pipeline: Any) -> None:
    """One token per patch; the text's state comes first, and is None behind the last block of SD3."""
    states = watched(sizes, pipeline, sizes.family.picture_state)
    outputs = watched(sizes, pipeline, lambda output: output)
    assert sizes.family.name != "sd3" or list(outputs.values())[-1][0] is None
    config = pipeline.transformer.config
    width = config.attention_head_dim * config.num_attention_heads
    for path, state in states.items():
        assert state.shape == (2, TOKENS, width), path
        text, picture = outputs[path]
        assert torch.equal(state, picture) and (text is None or text.shape[1] != TOKENS)
    assert sizes.family.picture_state((None, None)) is None


def test_every_lora_target_names_layers(sizes: Sizes, pipeline: Any) -> None:
    paths = [path for path, layer in pipeline.transformer.named_modules() if isinstance(layer, nn.Linear)]
    for target in sizes.family.facts.lora_targets:
        assert any(path.endswith("." + target) for path in paths), target


# FLUX.1 alone


def test_latents_are_packed_as_diffusers_packs_them() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 12, 8))
    assert torch.equal(unpack(packed, 12, 8), FluxPipeline._unpack_latents(packed, 12 * 8, 8 * 8, 8))
    assert torch.equal(unpack(packed, 12, 8), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 6, 4, "cpu", torch.float32)
    assert torch.equal(positions(6, 4, torch.device("cpu")), ids)


def test_a_denoiser_that_takes_no_guidance_gets_none() -> None:
    """FLUX.1-schnell has dev's classes without the embedding of the guidance scale."""
    sizes = small("flux")
    parts = [
        with_config(part, {**part.config, "guidance_embeds": False}) if part.role == "denoiser" else part
        for part in sizes.components
    ]
    schnell = Sizes(sizes.family, tuple(parts))
    made = schnell.pipeline(device="cpu")
    assert not made.transformer.config.guidance_embeds
    noisy, timestep, told = inputs(schnell, made, guidance=3.5)
    with torch.no_grad():
        assert sizes.family.denoise(made.transformer, noisy, timestep, told).shape == noisy.shape


@torch.no_grad()
def test_guidance_is_told_to_the_denoiser_and_one_while_training() -> None:
    sizes = small("flux")
    made = sizes.pipeline(device="cpu")
    _, _, training = inputs(sizes, made)
    _, _, drawing = inputs(sizes, made, guidance=3.5)
    assert training["guidance"].tolist() == [1.0, 1.0] and drawing["guidance"].tolist() == [3.5, 3.5]
