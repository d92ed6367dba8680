"""Stable Diffusion XL: two CLIP text encoders, a U-Net of 2.6 G parameters that is told sizes and crops."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import Discrete, Objective
from tunekit.diffusion.sampling import SamplingConfig
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

ABSENT: dict[str, Any] = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
"""Parts of the pipeline that are left out."""


class SDXL:
    """Stable Diffusion XL; see `Family` for what each method promises.

    The denoiser's `time_ids` are the picture's original size, its crop and its size (Podell et al. 2023,
    arXiv:2307.01952, section 2.2).
    """

    name: ClassVar[str] = "sdxl"
    # Sizes: https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, the config.json of each folder
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Stable Diffusion XL",
        pipeline_classes=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "ORTStableDiffusionXLPipeline",
        ),
        components=(
            Component(
                "unet",
                "denoiser",
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
                kohya=("lora_unet",),
                published="model.diffusion_model.",
                layers=unet.published_layers,
                marks=unet.MARKS,
                dtype=None,
                sensitive=("conv_in", "conv_out", "time_embedding", "add_embedding"),
                keeps=("timestep", "time_ids"),
            ),
            sizes.vae(4, scaling=0.13025, fp16=False),
            sizes.clip(
                "text_encoder",
                "tokenizer",
                768,
                12,
                12,
                kohya=("lora_te1",),
                published="conditioner.embedders.0.transformer.",
            ),
            sizes.clip(
                "text_encoder_2",
                "tokenizer_2",
                1280,
                32,
                20,
                act="gelu",
                projection=1280,
                kohya=("lora_te2",),
                published="conditioner.embedders.1.model.",
            ),
            sizes.scheduler("EulerDiscreteScheduler", **sizes.STABLE_DIFFUSION, steps_offset=1),
        ),
        lora_targets=unet.TARGETS,
        presets=unet.PRESETS,
        ss_base_model_version="sdxl_base_v1-0",
        modelspec_architecture="stable-diffusion-xl-v1-base",
        adapter_marks=r"(^|_)te2_|text_encoder_2|label_emb|add_embedding",
        default_source="stabilityai/stable-diffusion-xl-base-1.0",
        licence="openrail++",
        sampling=SamplingConfig(steps=30, guidance=5.0),
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
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

        # Neither 77 tokens nor 8 pixels per latent, and two encoders of unequal width.
        tokenizers = [tiny.clip_tokenizer(max_length=40) for _ in range(2)]
        encoders = [
            tiny.clip_text_encoder(tokenizers[0], width=32, seed=seed),
            tiny.clip_text_encoder(
                tokenizers[1], width=48, layers=3, seed=seed, act="gelu", projection=24, name="text_encoder_2"
            ),
        ]
        network = tiny.randomized(
            lambda: UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64),
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                attention_head_dim=(2, 4),
                norm_num_groups=8,
                cross_attention_dim=80,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
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
        return StableDiffusionXLPipeline(
            vae=autoencoder,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=network,
            scheduler=self.facts.component("scheduler").build(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return True

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
        return answers.tokenize(self.facts, pipeline, prompts)

    @torch.no_grad()
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning:
        """The penultimate states of both encoders, without the final norm, and the second's pooled one."""
        states, pooled = [], None
        for encoder in self.facts.encoders:
            network = getattr(pipeline, encoder.name)
            output = network(tokens[encoder.name].to(network.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", pooled)
        assert pooled is not None
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": pooled}

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        """Encodes; the empty prompt is zeros where the pipeline says so, as SDXL's own training had it."""
        encoded = self.encode_tokens(pipeline, self.tokenize(pipeline, prompts))
        if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            for row, prompt in enumerate(prompts):
                if not prompt:
                    for value in encoded.values():
                        value[row] = 0
        return encoded

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_image(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode(pipeline, latents)

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return {**encoded, "time_ids": frame}

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return answers.cfg_scale(guidance)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {key: conditioning[key] for key in ("text_embeds", "time_ids")}
        made: Tensor = denoiser(
            sample=noisy,
            timestep=timestep,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return made

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        return answers.begin(scheduler, steps, latents)

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        return unet.blocks(denoiser)

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.first_state(output)

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """Kohya's tools train the U-Net as it was published; diffusers' names occur too, and are read."""
        if component != "unet":
            return unet.encoder_names(paths)
        return unet.published_layers(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network = pipeline.unet
        channels, height, width = self.latent_shape(pipeline, *self.default_size(pipeline))
        multiple = unet.unet_factor(pipeline)
        length = pipeline.tokenizer.model_max_length
        pooled = pipeline.text_encoder_2.config.projection_dim
        exported = [
            graphs.encoder(pipeline, row, outputs, states=True)
            for row, outputs in zip(
                self.facts.encoders,
                (["last_hidden_state", "pooler_output"], ["text_embeds", "last_hidden_state"]),
                strict=True,
            )
        ]
        return [
            *exported,
            ExportComponent(
                name="unet",
                component="unet",
                module=_UNet(network),
                inputs={
                    "sample": graphs.example(2, channels, height, width, like=network),
                    "timestep": torch.tensor([10.0]),
                    "encoder_hidden_states": graphs.example(
                        2, length, network.config.cross_attention_dim, like=network
                    ),
                    "text_embeds": graphs.example(2, pooled, like=network),
                    # Of the network's type, as other programs feed it; float16 has every size up to 2048.
                    "time_ids": graphs.example(2, 6, like=network),
                },
                dynamic={
                    "sample": graphs.PICTURE_AXES,
                    "encoder_hidden_states": {0: "batch", 1: "sequence"},
                    "text_embeds": {0: "batch"},
                    "time_ids": {0: "batch"},
                },
                outputs=["out_sample"],
                config={"time_cond_proj_dim": None, **graphs.model_config(network)},
                multiples={"height": multiple, "width": multiple},
            ),
            *vae.export_vae(pipeline, self.default_size(pipeline)),
        ]


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        made: Tensor = self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return made


FAMILY = SDXL()
