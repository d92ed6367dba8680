"""FLUX.1-dev: CLIP and T5 text encoders, a transformer of 11.9 G parameters. Planned, not yet run."""

from __future__ import annotations

from tunekit.families.blueprint import Blueprint, Inputs, Part, clip, meta, t5_xxl, vae


def _inputs(family: Blueprint, batch: int, height: int, width: int) -> Inputs:
    config = family.denoiser.config
    pixels = (height // 2) * (width // 2)  # the transformer takes 2 x 2 latents as one token
    tokens = family.tokens[1]
    return {
        "hidden_states": meta(batch, pixels, config["in_channels"]),
        "encoder_hidden_states": meta(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": meta(batch, config["pooled_projection_dim"]),
        "timestep": meta(batch),
        "img_ids": meta(pixels, 3),
        "txt_ids": meta(tokens, 3),
        "guidance": meta(batch),
    }


# https://huggingface.co/black-forest-labs/FLUX.1-dev, the config.json of each folder
BLUEPRINT = Blueprint(
    name="flux",
    title="FLUX.1-dev",
    default_source="black-forest-labs/FLUX.1-dev",
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    denoiser=Part(
        "transformer",
        "diffusers:FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    vae=vae(16, quant=False, scaling=0.3611),
    encoders=(clip("text_encoder", 768, 12, 12), t5_xxl("text_encoder_2")),
    tokens=(77, 512),
    inputs=_inputs,
)
