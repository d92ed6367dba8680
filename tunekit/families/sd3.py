"""Stable Diffusion 3.5 medium: CLIP, CLIP and T5, a transformer of 2.2 G parameters. Planned, not yet run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import family as answers
from tunekit.families import sizes, unet, vae
from tunekit.families.family import Component, Conditioning, FamilyFacts, Pipeline, Published, Tokens

_BLOCK, _PICTURE, _TEXT = "transformer_blocks.{}", "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
# https://github.com/Stability-AI/sd3.5/blob/main/mmditx.py
PUBLISHED: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    f"{_PICTURE}.adaLN_modulation.1": f"{_BLOCK}.norm1.linear",
    f"{_PICTURE}.attn.qkv": tuple(f"{_BLOCK}.attn.to_{part}" for part in "qkv"),
    f"{_PICTURE}.attn.ln_q": f"{_BLOCK}.attn.norm_q",
    f"{_PICTURE}.attn.ln_k": f"{_BLOCK}.attn.norm_k",
    f"{_PICTURE}.attn.proj": f"{_BLOCK}.attn.to_out.0",
    f"{_PICTURE}.attn2.qkv": tuple(f"{_BLOCK}.attn2.to_{part}" for part in "qkv"),
    f"{_PICTURE}.attn2.ln_q": f"{_BLOCK}.attn2.norm_q",
    f"{_PICTURE}.attn2.ln_k": f"{_BLOCK}.attn2.norm_k",
    f"{_PICTURE}.attn2.proj": f"{_BLOCK}.attn2.to_out.0",
    f"{_PICTURE}.mlp.fc1": f"{_BLOCK}.ff.net.0.proj",
    f"{_PICTURE}.mlp.fc2": f"{_BLOCK}.ff.net.2",
    f"{_TEXT}.adaLN_modulation.1": f"{_BLOCK}.norm1_context.linear",
    f"{_TEXT}.attn.qkv": tuple(f"{_BLOCK}.attn.add_{part}_proj" for part in "qkv"),
    f"{_TEXT}.attn.ln_q": f"{_BLOCK}.attn.norm_added_q",
    f"{_TEXT}.attn.ln_k": f"{_BLOCK}.attn.norm_added_k",
    f"{_TEXT}.attn.proj": f"{_BLOCK}.attn.to_add_out",
    f"{_TEXT}.mlp.fc1": f"{_BLOCK}.ff_context.net.0.proj",
    f"{_TEXT}.mlp.fc2": f"{_BLOCK}.ff_context.net.2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
"""Layers of the transformer as it was published -> modules here; of several the rows are stacked there."""


def published_layers(paths: Collection[str]) -> list[Published]:
    """The transformer as it was published; its last norms give (shift, scale) there, (scale, shift) here."""
    last = max(
        (int(path.split(".")[1]) for path in paths if path.startswith("transformer_blocks.")), default=0
    )
    swapped = ("final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1")
    return answers.published(PUBLISHED, paths, swapped=swapped)


class SD3:
    """Stable Diffusion 3.5; see `Planned` for what each method promises."""

    name: ClassVar[str] = "sd3"
    # Sizes: https://huggingface.co/stabilityai/stable-diffusion-3.5-medium, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Stable Diffusion 3.5",
        base_title="Stable Diffusion 3.5 medium",
        pipeline_classes=("StableDiffusion3Pipeline",),
        components=(
            Component(
                "transformer",
                "denoiser",
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
                kohya=("lora_unet",),
                dtype=None,
                sensitive=("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"),
                keeps=("timestep",),
            ),
            sizes.vae(16, quant=False, scaling=1.5305, shift=0.0609),
            sizes.clip("text_encoder", "tokenizer", 768, 12, 12, projection=768, kohya=("lora_te1",)),
            sizes.clip(
                "text_encoder_2",
                "tokenizer_2",
                1280,
                32,
                20,
                act="gelu",
                projection=1280,
                kohya=("lora_te2",),
            ),
            sizes.t5_xxl("text_encoder_3", "tokenizer_3", 256, kohya=("lora_te3",)),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0),
        ),
        lora_targets=(
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        ),
        ss_base_model_version="sd3.5",
        modelspec_architecture="stable-diffusion-v3-medium",
        adapter_marks="joint_blocks|add_k_proj|context_block",
        default_source="stabilityai/stable-diffusion-3.5-medium",
        licence="stabilityai-ai-community",
        sampling=SamplingConfig(steps=40, guidance=4.5),
        runs=False,
    )

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = pipeline.transformer
        return network

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config)

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.vae_factor(pipeline) * int(pipeline.transformer.config.patch_size)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False  # they do not tell

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels, multiple = pipeline.transformer.config.in_channels, self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.vae_factor(pipeline), multiple, height, width)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """CLIP's two states side by side, padded to T5's width, stand before T5's along the sequence."""
        clip, pooled = [], []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, name)
            output = encoder(tokens[name].to(encoder.device), output_hidden_states=True)
            clip.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        t5 = pipeline.text_encoder_3
        long = t5(tokens["text_encoder_3"].to(t5.device))[0]
        short = torch.cat(clip, dim=-1)
        short = F.pad(short, (0, long.shape[-1] - short.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([short, long], dim=-2),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_image(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode(pipeline, latents)

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return encoded

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return answers.cfg_scale(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        # Not divided by 1000, unlike other transformers of flow matching.
        made: Tensor = denoiser(hidden_states=noisy, timestep=timestep, **conditioning, return_dict=False)[0]
        return made

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        transformer: Any = denoiser
        return [(f"transformer_blocks.{i}", block) for i, block in enumerate(transformer.transformer_blocks)]

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.last_state(output)  # the text comes first, and is None behind the last block

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """The transformer as it was published, CLIP's names as kohya's tools keep them, T5's own."""
        if component == "transformer":
            return published_layers(paths)
        clip = component in ("text_encoder", "text_encoder_2")
        return unet.encoder_names(paths) if clip else answers.underscored(paths)


FAMILY = SD3()
