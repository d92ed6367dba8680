"""FLUX.3 klein: a transformer of 5.5 G parameters, which reads eight layers of a Qwen3-VL. Planned only.

diffusers 0.42 has its networks, and draws with them in a modular pipeline alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective
from tunekit.diffusion.sampling import SamplingConfig
from tunekit.families import chat, sizes, vae
from tunekit.families import family as answers
from tunekit.families.family import MASK, Component, Conditioning, FamilyFacts, Pipeline, Tokens
from tunekit.families.flux2 import ordinals, patched, positions, statistics, unpatched
from tunekit.families.transformer import PATCH, bare

EVERY, LAST = 4, 32
"""Of Qwen3-VL's 36 layers, the states behind 4, 8, ... 32 are read, side by side."""
TOKENS = 560
"""Longest prompt: a text is padded to a multiple of 80 tokens, and the padding is read as well."""
SCALE = 0.5
"""Of the numbers of rows and columns that a picture's tokens have as places."""
STREAMS = ("txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks")
"""Lists of blocks, in the order they run; `mode_blocks.image_cond` runs where a picture is to be changed."""
INSIDE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ATTENTION = tuple(f"{stream}.*.{name}" for stream in STREAMS for name in INSIDE)
FEED_FORWARD = tuple(f"{stream}.*.{name}" for stream in STREAMS for name in ("ff.linear_in", "ff.linear_out"))


class Flux3:
    """FLUX.3 klein; see `Planned` for what each method promises.

    https://github.com/black-forest-labs/flux-3-image-klein
    """

    name: ClassVar[str] = "flux3"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="FLUX.3 klein",
        base_title="FLUX 3 Image Klein Base",
        pipeline_classes=("Flux3ModularPipeline", "Flux3DistilledModularPipeline"),
        components=(
            Component(
                "transformer",
                "denoiser",
                "diffusers:Flux3Transformer2DModel",
                {
                    "in_channels": 128,
                    "num_layers": 5,
                    "num_single_layers": 28,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 20480,
                    "flow_map": False,
                },
                dtype=None,
                sensitive=(
                    *("x_embedders", "context_embedder", "timestep_embedder", "norm_out", "proj_out"),
                    *("early_stream_modulations", "single_stream_modulations"),
                ),
                keeps=("timestep", "target_timestep", "img_ids", "txt_ids"),
            ),
            Component(
                "vae",
                "vae",
                "diffusers:AutoencoderKLFlux2",
                {"latent_channels": 32, "sample_size": 1024, "batch_norm_eps": 0.0001},
                fp16=False,
            ),
            sizes.qwen3_vl("text_encoder", tokens=TOKENS, causal=True),
            sizes.scheduler("FlowMatchEulerDiscreteScheduler", shift=6.93),
        ),
        lora_targets=ATTENTION,
        presets={"attention": ATTENTION, "attention_feed_forward": (*ATTENTION, *FEED_FORWARD)},
        ss_base_model_version="flux_3_klein",
        modelspec_architecture="Flux.3-klein",
        distilled=r"image-klein(?!-base)",
        distilled_from="image-klein-base",
        default_source="black-forest-labs/flux-3-image-klein-base",
        bases={"black-forest-labs/flux-3-image-klein": {"transformer": {"flow_map": True}}},
        licence="flux-kommunity-license",
        stored="bf16",
        sampling=SamplingConfig(steps=50, guidance=4.0),
        sampling_distilled=SamplingConfig(steps=16, guidance=1.0),
        since="0.42",
        runs=False,
    )

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = pipeline.transformer
        return network

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config, patch=1)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return bool(pipeline.transformer.config.flow_map)

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.vae_factor(pipeline) * PATCH

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        factor = self.resolution_multiple(pipeline)
        return vae.latent_shape(pipeline.transformer.config.in_channels, factor, factor, height, width)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """States of eight layers side by side; the denoiser reads what is padding too, as it was trained."""
        encoder = pipeline.text_encoder
        ids, mask = tokens["text_encoder"].to(encoder.device), tokens.get("text_encoder" + MASK)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device)
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        known = encoder.model(
            input_ids=ids,
            attention_mask=chat.attending(mask) if ids.is_meta else mask,
            position_ids=places.masked_fill(~mask, 1).expand(3, -1, -1),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        layers = [known[layer] for layer in range(EVERY, LAST + 1, EVERY)]
        return {"encoder_hidden_states": torch.cat(layers, dim=-1)}

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        """As FLUX.2's: channels are shifted and scaled when they are made of patches."""
        mean, std = (patched(moment) for moment in vae.posterior(pipeline.vae, pixels))
        shift, scale = statistics(pipeline.vae)
        return torch.cat([(mean - shift) / scale, std / scale], dim=1)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        shift, scale = (figure.to(latents.device) for figure in statistics(pipeline.vae))
        return vae.decoded(pipeline.vae, unpatched(latents * scale + shift))

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return encoded

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return None if self.is_distilled(pipeline) else answers.cfg_scale(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        *_, height, width = noisy.shape
        text, time = conditioning["encoder_hidden_states"], timestep.expand(len(noisy)) / 1000
        # A flow map goes from one time to another: from one to the same is what others answer.
        jump = {"target_timestep": time} if bare(denoiser).config.flow_map else {}
        made: Tensor = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=time,
            img_ids=positions(height, width, noisy.device) * SCALE,
            txt_ids=ordinals(text.shape[1], noisy.device),
            **jump,
            return_dict=False,
        )[0]
        return made.transpose(1, 2).reshape(noisy.shape)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (f"{stream}.{number}", block)
            for stream in STREAMS
            for number, block in denoiser.get_submodule(stream).named_children()
        ]

    def picture_state(self, output: Any) -> Tensor | None:
        """Of single blocks, which give (text, picture), and of those of the picture and of the text alone."""
        return answers.last_state(output)


FAMILY = Flux3()
