"""Stable Diffusion 1.x: CLIP text encoder, U-Net with cross attention, 4-channel VAE."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.families import family as answers
from tunekit.families import graphs, sizes, tiny, unet, vae
from tunekit.families.family import (
    Component,
    Conditioning,
    ExportComponent,
    FamilyFacts,
    Pipeline,
    Published,
    Tokens,
)

ABSENT: dict[str, Any] = {
    "image_encoder": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
"""Parts of the pipeline that are left out."""


class SD15(unet.UNet):
    """Stable Diffusion 1.x; see `Family` for what each method promises."""

    name: ClassVar[str] = "sd15"
    # Sizes: the config.json of each folder of https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Stable Diffusion 1.x",
        base_title="Stable Diffusion 1.5",
        pipeline_classes=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionControlNetPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "ORTStableDiffusionPipeline",
            "OnnxStableDiffusionPipeline",
        ),
        components=(
            Component(
                "unet",
                "denoiser",
                "diffusers:UNet2DConditionModel",
                {"sample_size": 64, "cross_attention_dim": 768},
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=unet.published_layers,
                marks=unet.MARKS,
                dtype=None,
                sensitive=("conv_in", "conv_out", "time_embedding"),
                keeps=("timestep",),
            ),
            sizes.vae(4),
            sizes.clip(
                "text_encoder",
                "tokenizer",
                768,
                12,
                12,
                kohya=("lora_te", "lora_te1"),
                published="cond_stage_model.transformer.",
            ),
            sizes.scheduler("PNDMScheduler", **sizes.STABLE_DIFFUSION, skip_prk_steps=True, steps_offset=1),
        ),
        lora_targets=unet.TARGETS,
        presets=unet.PRESETS,
        ss_base_model_version="sd_v1",
        modelspec_architecture="stable-diffusion-v1",
        default_source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        licence="creativeml-openrail-m",
    )

    absent = ABSENT

    def tiny(self, seed: int = 0) -> Pipeline:
        # Not 77 tokens, not 8 pixels per latent: whoever assumes these figures of the real model fails here.
        tokenizer = tiny.clip_tokenizer(max_length=48)
        return self._assembled(
            seed,
            tokenizer=tokenizer,
            text_encoder=tiny.clip_text_encoder(tokenizer, width=32, seed=seed),
            denoiser={"cross_attention_dim": 32},
            scheduler=dict(self.facts.component("scheduler").config),
        )

    def _assembled(
        self, seed: int, *, tokenizer: Any, text_encoder: Any, denoiser: Mapping[str, Any], scheduler: Any
    ) -> Pipeline:
        """A small pipeline of the parts in which Stable Diffusion 1 and 2 differ."""
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        network = tiny.randomized(
            lambda: UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=4,
                norm_num_groups=8,
                **denoiser,
            ),
            seed,
            "unet",
        )
        return StableDiffusionPipeline(
            vae=unet.tiny_autoencoder(seed),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=network,
            scheduler=self.facts.component("scheduler").type.from_config(scheduler),
            **ABSENT,
        )

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return not configs.get("unet", {}).get("use_linear_projection")  # as 2.x has them

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        tokens = answers.read(pipeline.tokenizer, prompts)
        found = {"text_encoder": tokens.input_ids}
        # SD 1.x attends to the padding too; configs with use_attention_mask do not.
        if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
            found["attention_mask"] = tokens.attention_mask
        return found

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        encoder = pipeline.text_encoder
        mask = {key: tokens[key].to(encoder.device) for key in ("attention_mask",) if key in tokens}
        output = encoder(tokens["text_encoder"].to(encoder.device), **mask)
        return {"encoder_hidden_states": output.last_hidden_state}

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        made: Tensor = denoiser(sample=noisy, timestep=timestep, **conditioning, return_dict=False)[0]
        return made

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """Kohya's tools use diffusers' names; those of the U-Net as it was published occur, and are read."""
        if component != "unet":
            return unet.encoder_names(paths)
        return answers.underscored(paths) + unet.published_layers(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network, encoder = pipeline.unet, pipeline.text_encoder
        length, width = pipeline.tokenizer.model_max_length, network.config.cross_attention_dim
        inputs = {
            "sample": unet.example(self, pipeline),
            # One for the whole batch, of rank 1; float because some samplers step between integers.
            "timestep": torch.tensor([10.0]),
            "encoder_hidden_states": graphs.example(2, length, width, like=network),
        }
        return [
            graphs.encoder(
                pipeline,
                self.facts.encoders[0],
                ["last_hidden_state", "pooler_output"],
                masked=bool(getattr(encoder.config, "use_attention_mask", False)),  # as `tokenize` has it
            ),
            unet.export(pipeline, inputs),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


FAMILY = SD15()
