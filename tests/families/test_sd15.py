"""What is particular to Stable Diffusion 1.x."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunekit import families

FAMILY = families.get("sd15")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return FAMILY.tiny()


def test_prompts_are_encoded_as_the_pipeline_does(pipeline: Any) -> None:
    prompts = ["a red cat", ""]
    ours = FAMILY.encode_prompt(pipeline, prompts)["encoder_hidden_states"]
    expected, negative = pipeline.encode_prompt(prompts, "cpu", 1, True)
    assert torch.equal(ours, expected)
    assert torch.equal(FAMILY.encode_prompt(pipeline, ["", ""])["encoder_hidden_states"], negative)
    assert ours.shape == (2, pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim)


def test_tiny_avoids_the_usual_figures(pipeline: Any) -> None:
    """Code that takes 77 tokens, 8 pixels per latent or the scale 0.18215 for granted must fail on it."""
    assert pipeline.tokenizer.model_max_length != 77
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert FAMILY.default_size(pipeline) == (64, 64)
    assert FAMILY.latent_shape(pipeline, 64, 64) == (4, 16, 16)


def test_the_tokenizer_is_a_working_clip_tokenizer(pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer
    tokens = tokenizer("A red  cat, größer 🐈").input_ids
    assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
    assert tokens.count(tokenizer.eos_token_id) == 1  # no byte is unknown
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a red cat, größer 🐈".replace(
        "cat,", "cat ,"
    )


def test_the_resolution_follows_vae_and_unet(pipeline: Any) -> None:
    assert FAMILY.resolution_multiple(pipeline) == 8  # 4 pixels per latent, halved once in the U-Net
    components = {component.name: component for component in FAMILY.export_components(pipeline)}
    assert components["unet"].multiples == {"height": 2, "width": 2}
    assert components["vae_encoder"].multiples == {"height": 4, "width": 4}


def test_export_names_are_what_other_programs_expect(pipeline: Any) -> None:
    names = {c.name: (list(c.inputs), c.outputs) for c in FAMILY.export_components(pipeline)}
    assert names == {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }
    components = {c.name: c for c in FAMILY.export_components(pipeline)}
    assert components["text_encoder"].inputs["input_ids"].dtype == torch.int32
    assert components["unet"].inputs["timestep"].shape == (1,)
    assert "time_cond_proj_dim" in components["unet"].config
    assert "scaling_factor" in components["vae_decoder"].config


def test_a_vae_with_a_shift_is_shifted(pipeline: Any) -> None:
    picture = torch.zeros(1, 3, 64, 64)
    plain = FAMILY.encode_image(pipeline, picture)
    shifted = FAMILY.tiny()
    shifted.vae.register_to_config(shift_factor=0.25)
    mean, std = FAMILY.encode_image(shifted, picture).chunk(2, dim=1)
    torch.testing.assert_close(mean, plain[:, :4] - 0.25 * shifted.vae.config.scaling_factor)
    torch.testing.assert_close(std, plain[:, 4:])
    torch.testing.assert_close(FAMILY.decode(shifted, mean), FAMILY.decode(pipeline, plain[:, :4]))
