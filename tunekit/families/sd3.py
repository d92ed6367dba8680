"""Stable Diffusion 3.5 medium: CLIP, CLIP and T5, a transformer of 2.2 G parameters. Planned, not yet run."""

from __future__ import annotations

from tunekit.families.blueprint import Blueprint, Inputs, Part, clip, meta, t5_xxl, vae


def _inputs(family: Blueprint, batch: int, height: int, width: int) -> Inputs:
    config = family.denoiser.config
    tokens = family.tokens[0] + family.tokens[2]  # CLIP's, then T5's
    return {
        "hidden_states": meta(batch, config["in_channels"], height, width),
        "encoder_hidden_states": meta(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": meta(batch, config["pooled_projection_dim"]),
        "timestep": meta(batch),
    }


# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, the config.json of each folder
BLUEPRINT = Blueprint(
    name="sd3",
    title="Stable Diffusion 3.5 medium",
    default_source="stabilityai/stable-diffusion-3.5-medium",
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    denoiser=Part(
        "transformer",
        "diffusers:SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    vae=vae(16, quant=False, scaling=1.5305),
    encoders=(
        clip("text_encoder", 768, 12, 12, projection=768),
        clip("text_encoder_2", 1280, 32, 20, act="gelu", projection=1280),
        t5_xxl("text_encoder_3"),
    ),
    tokens=(77, 77, 256),
    inputs=_inputs,
)
