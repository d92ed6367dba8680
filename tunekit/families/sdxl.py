"""Stable Diffusion XL: two CLIP text encoders, a U-Net of 2.6 G parameters. Planned, not yet run."""

from __future__ import annotations

import torch

from tunekit.families.blueprint import Blueprint, Inputs, Part, clip, meta, vae


def _inputs(family: Blueprint, batch: int, height: int, width: int) -> Inputs:
    config = family.denoiser.config
    return {
        "sample": meta(batch, config.get("in_channels", 4), height, width),
        "timestep": meta(batch, dtype=torch.int64),
        "encoder_hidden_states": meta(batch, family.tokens[0], config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": meta(batch, 1280), "time_ids": meta(batch, 6)},
    }


# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, the config.json of each folder
BLUEPRINT = Blueprint(
    name="sdxl",
    title="Stable Diffusion XL",
    default_source="stabilityai/stable-diffusion-xl-base-1.0",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    denoiser=Part(
        "unet",
        "diffusers:UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    vae=vae(4, scaling=0.13025),
    encoders=(
        clip("text_encoder", 768, 12, 12),
        clip("text_encoder_2", 1280, 32, 20, act="gelu", projection=1280),
    ),
    tokens=(77, 77),
    inputs=_inputs,
)
