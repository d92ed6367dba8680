"""What is Stable Diffusion 3's own: bases without T5, the largest picture, the published variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.adapters import add_adapter, load_adapter, save_adapter
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.diffusion.sampling import initial_latents
from tunekit.errors import AdapterError, ConfigError, ModelError
from tunekit.families.sd3 import T5
from tunekit.runtime import generate_pixels, torch_runtime

FAMILY: Any = families.get("sd3")
PROMPTS = ["a red cat", "the moon"]


def varied(**changes: Any) -> Any:
    """The tiny pipeline with another transformer: that of 3.5 large, of 3 medium, or none that exists."""
    from diffusers import SD3Transformer2DModel

    pipeline = FAMILY.tiny()
    known = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=SD3Transformer2DModel(**{**known, **changes}).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


LARGE: dict[str, Any] = {
    "dual_attention_layers": (),
    "num_layers": 2,
    "num_attention_heads": 3,
    "caption_projection_dim": 48,
}
FIRST: dict[str, Any] = {"dual_attention_layers": (), "qk_norm": None}


def without_t5() -> Any:
    pipeline = FAMILY.tiny()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_pictures(pipeline: Any, **options: Any) -> None:
    sampling = SamplingConfig(steps=3, guidance=4.0, height=32, width=48, negative_prompt="")
    made = generate_pixels(torch_runtime(FAMILY, pipeline), PROMPTS, sampling, seeds=[1, 2])
    latents = initial_latents([1, 2], FAMILY.latent_shape(pipeline, 32, 48))
    wanted = pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=32,
        width=48,
        latents=latents,
        output_type="pt",
        **options,
    ).images
    assert float((made - wanted).abs().max()) <= 1e-4 and made.std() > 0.02


def test_a_base_without_t5(tmp_path: Path) -> None:
    """People leave it out: it is more than half of the download. Diffusers reads zeros in its place."""
    FAMILY.save(without_t5(), tmp_path)
    assert FAMILY.look(str(tmp_path)) == [] and families.detect(str(tmp_path)) == "sd3"
    loaded = FAMILY.load(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder_3 is None and loaded.tokenizer_3 is None
    encoded = FAMILY.encode_prompt(loaded, PROMPTS)
    assert encoded["encoder_hidden_states"].shape == (2, 22 + 256, 48)
    sizes = families.sizes_of("sd3", str(tmp_path))
    assert T5 not in {part.name for part in sizes.components}
    planned = sizes.encoded(2)
    assert {key: value.shape for key, value in planned.items()} == {
        key: value.shape for key, value in encoded.items()
    }
    graphs = {graph.name: graph for graph in FAMILY.export_components(loaded)}
    assert T5 not in graphs and graphs["transformer"].inputs["encoder_hidden_states"].shape[1] == 22 + 256
    check_pictures(loaded)


def test_a_base_without_another_encoder_is_refused(tmp_path: Path) -> None:
    pipeline = FAMILY.tiny()
    pipeline.register_modules(text_encoder_2=None)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its component text_encoder_2 is missing"):
        FAMILY.load(str(tmp_path))


@pytest.mark.parametrize("changes", [LARGE, FIRST], ids=["3.5 large", "3 medium"])
def test_other_bases_are_drawn_as_diffusers_draws_them(changes: dict[str, Any]) -> None:
    check_pictures(varied(**changes), max_sequence_length=30)


def test_a_sampler_that_shifts_by_size() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = varied()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.16)
    pipeline.register_modules(scheduler=scheduler)
    check_pictures(pipeline, max_sequence_length=30)
    assert FAMILY.objective(pipeline).shift is None  # follows the size in training as well


@pytest.mark.parametrize("size", [(272, 64), (64, 272)])
def test_larger_pictures_than_there_are_positions_for(size: tuple[int, int]) -> None:
    pipeline = FAMILY.tiny()
    assert FAMILY.latent_shape(pipeline, 264, 264) == (6, 66, 66)
    with pytest.raises(ConfigError, match="272 px is more than this model has positions") as caught:
        FAMILY.latent_shape(pipeline, *size)
    assert caught.value.hint == "264 px at most, along each side"


@pytest.mark.parametrize("trained", [{}, LARGE], ids=["medium on large", "large on medium"])
def test_an_adapter_of_another_size_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, alpha=2.0)
    made, other = (varied(**LARGE), FAMILY.tiny()) if trained else (FAMILY.tiny(), varied(**LARGE))
    add_adapter(made.transformer, config, FAMILY.facts.lora_targets)
    for file in save_adapter(tmp_path, made.transformer, FAMILY, config, name="a", title="a"):
        with pytest.raises(AdapterError, match=r"another base|base of another size"):
            load_adapter(other, FAMILY, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 8, "out_channels": 8}, "takes 8 channels and the VAE gives 6"),
        ({"out_channels": 12}, "gives 12 channels and takes 6"),
        ({"patch_size": 4}, "has patch_size 4"),
        ({"pooled_projection_dim": 40}, "reads a text of 40 numbers, .* give 32"),
        ({"joint_attention_dim": 64}, "reads text of width 64, and text_encoder_3 gives 48"),
    ],
)
def test_parts_that_are_of_no_one_model(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    FAMILY.save(varied(**change), tmp_path)
    with pytest.raises(ModelError, match=words):
        FAMILY.load(str(tmp_path))


def test_turbo_is_known_by_its_name() -> None:
    """Its configurations are those of 3.5 large."""
    turbo, large = (f"stabilityai/stable-diffusion-3.5-large{end}" for end in ("-turbo", ""))
    assert f"train {large} and draw with either" in families.distilled(families.sizes_of("sd3", turbo), turbo)
    assert families.distilled(families.sizes_of("sd3", large), large) == ""


@pytest.mark.parametrize(
    ("base", "billions", "layers"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 2.243, 392),
        ("stabilityai/stable-diffusion-3.5-large", 8.06, 536),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.03, 340),
    ],
)
def test_published_bases_have_their_size(base: str, billions: float, layers: int) -> None:
    sizes = families.sizes_of("sd3", base)
    network = sizes.denoiser.build()
    assert not sizes.assumed
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == layers
