"""Stable Diffusion 1.x: CLIP text encoder, U-Net with cross attention, 4-channel VAE."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import Discrete, Objective
from tunekit.errors import ModelError
from tunekit.families import family as answers
from tunekit.families import graphs, loading, sizes, tiny, unet, vae
from tunekit.families.family import (
    Component,
    Conditioning,
    Dtypes,
    ExportComponent,
    FamilyFacts,
    Packing,
    Pipeline,
    Published,
    Tokens,
)
from tunekit.resources import Source

ABSENT: dict[str, Any] = {
    "image_encoder": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
"""Parts of the pipeline that are left out."""


class SD15:
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

    def load(self, source: Source | str, dtypes: Dtypes = torch.float32, *, pack: Packing = "") -> Pipeline:
        source = Source.of(source)
        if source.name == "tiny":
            return loading.cast(self.tiny(), self.facts, dtypes)
        return loading.load_pipeline(
            source, self.facts, dtypes, pack=pack, fixed=ABSENT, misfits=unet.misfits
        )

    def look(self, source: Source | str) -> list[ModelError]:
        return loading.look(Source.of(source), self.facts, fixed=ABSENT, misfits=unet.misfits)

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        loading.save_pipeline(pipeline, folder, self.facts)

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
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

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
        autoencoder = tiny.randomized(
            lambda: AutoencoderKL(
                sample_size=64,
                block_out_channels=(16, 16, 32),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=8,
                scaling_factor=0.5,
            ),
            seed,
            "vae",
        )
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=network,
            scheduler=self.facts.component("scheduler").type.from_config(scheduler),
            **ABSENT,
        )

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return not configs.get("unet", {}).get("use_linear_projection")  # as 2.x has them

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = pipeline.unet
        return network

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return Discrete.from_scheduler(pipeline.scheduler, config)

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        return unet.default_size(pipeline)

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.vae_factor(pipeline) * unet.unet_factor(pipeline)

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False  # they do not tell

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels, multiple = pipeline.unet.config.in_channels, self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.vae_factor(pipeline), multiple, height, width)

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        tokenizer = pipeline.tokenizer
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
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

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        return self.encode_tokens(pipeline, self.tokenize(pipeline, prompts))

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
        made: Tensor = denoiser(sample=noisy, timestep=timestep, **conditioning, return_dict=False)[0]
        return made

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        return answers.begin(scheduler, steps, latents)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        return unet.blocks(denoiser)

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.first_state(output)  # a down block also gives what it hands across

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """Kohya's tools use diffusers' names; those of the U-Net as it was published occur, and are read."""
        if component != "unet":
            return unet.encoder_names(paths)
        return answers.underscored(paths) + unet.published_layers(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network, encoder = pipeline.unet, pipeline.text_encoder
        length = pipeline.tokenizer.model_max_length
        channels, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        multiple = unet.unet_factor(pipeline)
        ids = graphs.token_ids(length)
        words = {"input_ids": ids}
        if getattr(encoder.config, "use_attention_mask", False):  # as `tokenize` has it
            words["attention_mask"] = torch.ones_like(ids, dtype=torch.int64)
        return [
            ExportComponent(
                name="text_encoder",
                component="text_encoder",
                module=_TextEncoder(encoder),
                inputs=words,
                dynamic={name: {0: "batch", 1: "sequence"} for name in words},
                outputs=["last_hidden_state", "pooler_output"],
                config=graphs.model_config(encoder),
            ),
            ExportComponent(
                name="unet",
                component="unet",
                module=_UNet(network),
                inputs={
                    "sample": graphs.example(2, channels, height, width, like=network),
                    # One for the whole batch, of rank 1; float because some samplers step between integers.
                    "timestep": torch.tensor([10.0]),
                    "encoder_hidden_states": graphs.example(
                        2, length, network.config.cross_attention_dim, like=network
                    ),
                },
                dynamic={
                    "sample": graphs.PICTURE_AXES,
                    "encoder_hidden_states": {0: "batch", 1: "sequence"},
                },
                outputs=["out_sample"],
                config={"time_cond_proj_dim": None, **graphs.model_config(network)},
                multiples={"height": multiple, "width": multiple},
            ),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


class _TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.encoder(input_ids, attention_mask=attention_mask)
        return output.last_hidden_state, output.pooler_output


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        made: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return made


FAMILY = SD15()
