"""Stable Diffusion XL: two CLIP text encoders, a U-Net of 2.6 G parameters that is told sizes and crops."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.diffusion.sampling import SamplingConfig
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

ABSENT: dict[str, Any] = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
"""Parts of the pipeline that are left out."""


class SDXL(unet.UNet):
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

    absent = ABSENT

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

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
        return StableDiffusionXLPipeline(
            vae=unet.tiny_autoencoder(seed),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=network,
            scheduler=self.facts.component("scheduler").build(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

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
        encoded = super().encode_prompt(pipeline, prompts)
        if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            for row, prompt in enumerate(prompts):
                if not prompt:
                    for value in encoded.values():
                        value[row] = 0
        return encoded

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return {**encoded, "time_ids": frame}

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

    def adapter_names(self, component: str, paths: Collection[str]) -> list[Published]:
        """Kohya's tools train the U-Net as it was published; diffusers' names occur too, and are read."""
        if component != "unet":
            return unet.encoder_names(paths)
        return unet.published_layers(paths)

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        network = pipeline.unet
        length, width = pipeline.tokenizer.model_max_length, network.config.cross_attention_dim
        pooled = pipeline.text_encoder_2.config.projection_dim
        inputs = {
            "sample": unet.example(self, pipeline),
            "timestep": torch.tensor([10.0]),
            "encoder_hidden_states": graphs.example(2, length, width, like=network),
            "text_embeds": graphs.example(2, pooled, like=network),
            # Of the network's type, as other programs feed it; float16 has every size up to 2048.
            "time_ids": graphs.example(2, 6, like=network),
        }
        first, second = self.facts.encoders
        return [
            graphs.encoder(pipeline, first, ["last_hidden_state", "pooler_output"], states=True),
            graphs.encoder(pipeline, second, ["text_embeds", "last_hidden_state"], states=True),
            unet.export(pipeline, inputs, module=_UNet(network)),
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
