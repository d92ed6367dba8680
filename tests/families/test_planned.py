"""The families that can be planned and not yet run: of their real size without data, and small with it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.config import load
from tunekit.diffusion.metrics import relative_error
from tunekit.diffusion.objectives import FlowMatching
from tunekit.errors import ConfigError, ModelError
from tunekit.families import Sizes
from tunekit.families.family import MASK
from tunekit.families.sizes import with_config
from tunekit.planning import plan_config

NAMES = [name for name, family in families.FAMILIES.items() if not family.facts.runs]
PARAMETERS = {"qwenimage": 20_430_401_088, "flux3": 5_538_458_368}
ENCODERS = {"qwenimage": 8_292_166_656, "flux3": 4_437_815_808}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "qwenimage": {
        "transformer": {
            "in_channels": 24,
            "out_channels": 6,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
        "vae": {
            "base_dim": 8,
            "z_dim": 6,
            "dim_mult": [1, 1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.1 * channel for channel in range(6)],
            "latents_std": [1 + 0.1 * channel for channel in range(6)],
        },
        "text_encoder": {
            "text_config": {
                "hidden_size": 20,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 100,
                "rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 2]},
            },
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
        },
    },
    "flux3": {
        "transformer": {
            "in_channels": 12,
            "cond_in_channels": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 8 * 20,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        "vae": {
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 3,
            "batch_norm_eps": 0.01,
        },
        "text_encoder": {
            "text_config": {
                "hidden_size": 20,
                "intermediate_size": 24,
                "num_hidden_layers": 33,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "vocab_size": 100,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": [4, 2, 2],
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 20,
                "deepstack_visual_indexes": [0],
            },
        },
    },
}
LENGTH = 40
HEIGHT, WIDTH, PLACES = 48, 32, 24
"""Of pictures; tokens that the denoiser sees of one, which are not as many as a text has."""


def small(name: str) -> Sizes:
    """A family's table at the size of no base that exists."""
    family = families.planned(name)
    parts = [with_config(part, SMALL[name].get(part.name, part.config)) for part in family.facts.components]
    return Sizes(family, tuple(replace(part, tokens=LENGTH) if part.tokenizer else part for part in parts))


@pytest.fixture(scope="module", params=NAMES)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return small(request.param)


@pytest.fixture(scope="module")
def pipeline(sizes: Sizes) -> Any:
    """Its networks, on the CPU, in float32, with weights that are drawn anew from one seed."""
    made = sizes.pipeline(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in sizes.networks:
            network = getattr(made, part.name).float()
            for parameter in network.parameters():  # zero-initialised outputs would hide what is wrong
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
    return made


def tokens(count: int, *, padding: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(count, LENGTH, dtype=torch.bool)
    mask[1:, LENGTH - padding :] = False
    return {
        "text_encoder": torch.randint(0, 98, (count, LENGTH), generator=draw),
        "text_encoder" + MASK: mask,
    }


@torch.no_grad()
def inputs(sizes: Sizes, pipeline: Any) -> tuple[Tensor, Tensor, Any]:
    family = sizes.family
    shape = family.latent_shape(pipeline, HEIGHT, WIDTH)
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    encoded = family.encode_tokens(pipeline, tokens(2))
    frames = families.Frame.whole(HEIGHT, WIDTH).rows(2)
    return noisy, torch.tensor([250.5, 990.0]), family.conditioning(encoded, frames)


# At their real size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_planned_and_not_run(name: str) -> None:
    assert not families.planned(name).facts.runs and name not in families.runnable()
    with pytest.raises(ConfigError, match=f'^the family "{name}" is planned only') as error:
        families.get(name)
    assert "\n" not in error.value.message
    assert all(other in (error.value.hint or "") for other in families.runnable())


def test_a_plan_needs_the_version_that_has_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any family: one line, where building its networks would end in a traceback."""
    monkeypatch.setattr("tunekit.families.family.version", lambda package: "0.30.0")
    newer = [name for name, family in families.FAMILIES.items() if family.facts.since]
    assert set(NAMES) <= set(newer)
    for name in newer:
        since = families.planned(name).facts.since
        with pytest.raises(ConfigError, match=f'"{name}" needs diffusers {since} or later'):
            families.sizes_of(name, families.planned(name).facts.default_source)


@pytest.mark.parametrize("name", NAMES)
def test_its_networks_have_as_many_parameters_as_were_published(name: str) -> None:
    base = families.sizes_of(name, families.planned(name).facts.default_source)
    assert not base.assumed
    for part, expected in ((base.denoiser, PARAMETERS[name]), (base.encoders[0], ENCODERS[name])):
        network = part.build()
        assert sum(parameter.numel() for parameter in network.parameters()) == expected, part.name
        assert all(parameter.is_meta for parameter in network.parameters())
        for path in part.sensitive:
            assert network.get_submodule(path) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_is_planned_at_1024(name: str) -> None:
    """With what the host needs: both networks that are large, in bf16, as they were published."""
    facts = families.planned(name).facts
    base = [f"model.family={name}", f"model.source={facts.default_source}", "train.batch_size=1"]
    loaded = load("flux2/lora", [*base, "data.resolution=1024", "adapter.rank=16"], stand_in="pictures")
    (made,) = plan_config(loaded, device="h200")
    weights = 2 * PARAMETERS[name]
    print(made.words, made.device_bytes, made.ram_bytes)
    assert made.fits and made.levers.precision == "bf16"
    assert weights < made.device_bytes
    assert weights + 2 * ENCODERS[name] < made.ram_bytes < 1.5 * (weights + 2 * ENCODERS[name])
    assert any("planned, not run yet" in note for note in made.notes)


# Small ones -------------------------------------------------------------------------------------------------


def test_sizes_follow_the_networks(sizes: Sizes, pipeline: Any) -> None:
    """Without data the same shapes come out as with it; the longest prompt is planned."""
    with torch.no_grad():
        encoded = sizes.family.encode_tokens(pipeline, {"text_encoder": tokens(2)["text_encoder"]})
    planned = sizes.encoded(2)
    assert {key: value.shape for key, value in planned.items()} == {
        key: value.shape for key, value in encoded.items()
    }
    assert planned["encoder_hidden_states"].shape[1] == LENGTH
    assert all(value.is_meta for value in planned.values())
    channels = sizes.denoiser.config["in_channels"]
    assert sizes.latents(2, HEIGHT, WIDTH)[0].numel() == PLACES * channels
    with pytest.raises(ConfigError, match="multiple of 8"):
        sizes.family.latent_shape(pipeline, HEIGHT, WIDTH + 4)


def test_its_objective_is_flow_matching(sizes: Sizes) -> None:
    import diffusers

    made = SimpleNamespace(scheduler=sizes.family.facts.component("scheduler").build())
    assert isinstance(sizes.family.objective(made), FlowMatching)
    with pytest.raises(ModelError, match="its scheduler is DDPMScheduler, and this family learns by flow"):
        sizes.family.objective(SimpleNamespace(scheduler=diffusers.DDPMScheduler()))


def test_pictures_come_back_from_their_latents(sizes: Sizes, pipeline: Any) -> None:
    """Latents are scaled when they are made as they are scaled back when they are drawn."""
    picture = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = sizes.family.encode_image(pipeline, picture).chunk(2, dim=1)
    assert mean.shape == std.shape == (2, *sizes.family.latent_shape(pipeline, HEIGHT, WIDTH))
    film = picture.unsqueeze(2) if "z_dim" in sizes.vae.config else picture
    with torch.no_grad():
        raw = pipeline.vae.decode(pipeline.vae.encode(film).latent_dist.mean).sample
    expected = (raw.reshape(picture.shape) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(sizes.family.decode(pipeline, mean), expected, atol=1e-5, rtol=1e-4)


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
    for name, value in told.items():
        changed, last = value.clone(), slice(value.shape[1] // 2, None)
        changed[:, last] = False if value.dtype == torch.bool else value[:, last] + 1
        others.append(family.denoise(pipeline.transformer, noisy, timestep, {**told, name: changed}))
    for other in others:
        assert relative_error(other, prediction) > 1e-4


@torch.no_grad()
def test_blocks_are_in_the_order_they_run(sizes: Sizes, pipeline: Any) -> None:
    """And give the picture's state last, one token per place; a stream of the text alone gives its own."""
    outputs: dict[str, Any] = {}
    blocks = sizes.family.blocks(pipeline.transformer)
    handles = [
        block.register_forward_hook(lambda module, args, output, path=path: outputs.update({path: output}))
        for path, block in blocks
    ]
    sizes.family.denoise(pipeline.transformer, *inputs(sizes, pipeline))
    for handle in handles:
        handle.remove()
    assert list(outputs) == [path for path, _ in blocks] and len(outputs) > 2
    assert all(pipeline.transformer.get_submodule(path) is block for path, block in blocks)
    width = pipeline.transformer.inner_dim
    for path, output in outputs.items():
        state = sizes.family.picture_state(output)
        assert state is not None
        assert state.shape == (2, LENGTH if path.startswith("txt") else PLACES, width), path


def test_adapters_go_where_the_denoiser_runs(sizes: Sizes, pipeline: Any) -> None:
    from tunekit.adapters.attach import check_targets, targets_of
    from tunekit.config import AdapterConfig

    facts = sizes.family.facts
    network = sizes.denoiser.build()
    usual = targets_of(network, AdapterConfig(), facts.lora_targets, facts.presets)
    more = AdapterConfig(targets="attention_feed_forward")
    wider = targets_of(network, more, facts.lora_targets, facts.presets)
    check_targets(network, wider)
    assert set(usual) < set(wider) and not any("*" in target for target in wider)
    paths = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    inside = tuple(f"{path}." for path, _ in sizes.family.blocks(network))
    reached = [path for path in paths if any(f".{path}".endswith(f".{target}") for target in wider)]
    assert reached and all(path.startswith(inside) for path in reached)


# Beside diffusers -------------------------------------------------------------------------------------------


class Tokenizer:
    """Answers with ids that were made before, as both pipelines ask for them."""

    def __init__(self, made: dict[str, Tensor]) -> None:
        self.ids, self.mask = made["text_encoder"], made["text_encoder" + MASK]
        self.tokenizer = self

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        return ""

    def __call__(self, text: Any, **options: Any) -> Any:
        found = {"input_ids": self.ids, "attention_mask": self.mask.long()}
        return _Found(found)


class _Found(dict[str, Tensor]):
    def __getattr__(self, name: str) -> Tensor:
        return self[name]

    def to(self, device: Any) -> _Found:
        return self


@torch.no_grad()
def test_qwen_image_is_called_as_its_pipeline_calls_it() -> None:
    """Its text, with padding, and every input of the denoiser."""
    from diffusers import QwenImagePipeline

    sizes = small("qwenimage")
    made = sizes.pipeline(device="cpu")
    for part in sizes.networks:
        getattr(made, part.name).float()
    given = tokens(2, padding=3)
    whole = QwenImagePipeline(
        scheduler=made.scheduler,
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=None,
        transformer=made.transformer,
    )
    whole.set_progress_bar_config(disable=True)
    whole.tokenizer = Tokenizer(given)
    embeds, mask = whole.encode_prompt(["one", "two"], device="cpu")
    ours = sizes.family.encode_tokens(made, given)
    assert torch.equal(ours["encoder_hidden_states_mask"], mask.bool())
    real = mask.bool()
    torch.testing.assert_close(ours["encoder_hidden_states"][real], embeds[real], atol=1e-5, rtol=1e-4)

    calls: list[tuple[dict[str, Any], Tensor]] = []
    handle = made.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    whole(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        true_cfg_scale=1.0,
        num_inference_steps=2,
        height=HEIGHT,
        width=WIDTH,
        output_type="latent",
    )
    handle.remove()
    from tunekit.families.transformer import unpack

    for kwargs, output in calls:
        latents = unpack(kwargs["hidden_states"], HEIGHT // 4, WIDTH // 4)
        predicted = sizes.family.denoise(made.transformer, latents, kwargs["timestep"] * 1000, ours)
        expected = unpack(output, HEIGHT // 4, WIDTH // 4)
        torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flux_3_reads_text_and_places_as_its_blocks_do() -> None:
    from diffusers.modular_pipelines.flux3 import before_denoise, encoders

    sizes = small("flux3")
    made = sizes.pipeline(device="cpu")
    made.text_encoder.float()
    given = {key: value[1:] for key, value in tokens(2, padding=7).items()}
    theirs = encoders.Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
        made.text_encoder, Tokenizer(given), "one", device=torch.device("cpu"), pad_multiple=LENGTH
    )
    ours = sizes.family.encode_tokens(made, given)["encoder_hidden_states"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    seen: dict[str, Any] = {}
    handle = made.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    noisy = torch.randn(1, *sizes.family.latent_shape(made, HEIGHT, WIDTH))
    sizes.family.denoise(made.transformer, noisy, torch.tensor([250.0]), {"encoder_hidden_states": ours})
    handle.remove()
    places = before_denoise._prepare_image_ids(*noisy.shape[2:], 0.5)
    assert torch.equal(seen["img_ids"], places)
    assert torch.equal(seen["hidden_states"], noisy.flatten(2).transpose(1, 2))
    assert seen["timestep"].tolist() == [0.25] and "target_timestep" not in seen


def test_a_flow_map_is_asked_for_a_jump_of_no_length() -> None:
    """The distilled FLUX.3 klein, whose name says that it is."""
    facts = families.planned("flux3").facts
    distilled = "black-forest-labs/flux-3-image-klein"
    base = families.sizes_of("flux3", distilled)
    assert base.denoiser.config["flow_map"] and not base.assumed
    assert facts.default_source in families.distilled(base, distilled)
    assert not families.distilled(families.sizes_of("flux3", facts.default_source), facts.default_source)
    assert base.family.is_distilled(base.configs)
    noisy, time = base.latents(2, 512, 512), torch.empty(2, device="meta")
    made = base.family.denoise(base.denoiser.build(), noisy, time, base.encoded(2))
    assert made.shape == noisy.shape
