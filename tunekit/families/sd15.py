"""Stable Diffusion 1.x (and 2.x): CLIP text encoder, U-Net with cross attention, 4-channel VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.diffusion.objectives import Objective
from tunekit.errors import ConfigError
from tunekit.families import blueprint, loading, tiny
from tunekit.families.family import Conditioning, ExportComponent, FamilyFacts, Pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


class SD15:
    """Stable Diffusion 1.x; see `Family` for what each method promises."""

    name: ClassVar[str] = "sd15"
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        title="Stable Diffusion 1.x",
        pipeline_classes=(
            "StableDiffusionPipeline",
            "ORTStableDiffusionPipeline",
            "OnnxStableDiffusionPipeline",
        ),
        denoiser_name="unet",
        encoders=(("tokenizer", "text_encoder"),),
        kohya_prefixes={"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
        ss_base_model_version="sd_v1",
        modelspec_architecture="stable-diffusion-v1",
        default_source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    )
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),  # both attentions
        *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    )

    def load(
        self,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> Pipeline:
        if source == "tiny":
            pipeline = self.tiny()
            return pipeline if dtype == torch.float32 else pipeline.to(dtype)
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        return loading.load_pipeline(
            source,
            StableDiffusionPipeline,
            UNet2DConditionModel,
            self.facts,
            dtype=dtype,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        loading.save_pipeline(pipeline, folder, self.facts)

    def tiny(self, seed: int = 0) -> Pipeline:
        from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

        # Not 77 tokens, not 8 pixels per latent: whoever assumes these figures of the real model fails here.
        tokenizer = tiny.clip_tokenizer(max_length=48)
        unet = tiny.randomized(
            lambda: UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=4,
                norm_num_groups=8,
                cross_attention_dim=32,
            ),
            seed,
            "unet",
        )
        vae = tiny.randomized(
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
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        )
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=tiny.clip_text_encoder(tokenizer, width=32, seed=seed),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        return pipeline.unet

    def objective(self, pipeline: Pipeline, *, snr_gamma: float | None = None) -> Objective:
        return Objective.from_scheduler(pipeline.scheduler.config, snr_gamma=snr_gamma)

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * _vae_factor(pipeline), width * _vae_factor(pipeline)

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return _vae_factor(pipeline) * _unet_factor(pipeline)

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.resolution_multiple(pipeline)
        for size in (height, width):
            if size <= 0 or size % multiple:
                nearest = max(1, round(size / multiple)) * multiple
                raise ConfigError(
                    f"{size} px is not a multiple of {multiple}, which this model needs",
                    hint=f"try {nearest}",
                )
        factor = _vae_factor(pipeline)
        return pipeline.unet.config.in_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # SD 1.x attends to the padding too; configs with use_attention_mask do not.
        mask = {}
        if getattr(encoder.config, "use_attention_mask", False):
            mask["attention_mask"] = tokens.attention_mask.to(encoder.device)
        output = encoder(tokens.input_ids.to(encoder.device), **mask)
        return {"encoder_hidden_states": output.last_hidden_state}

    @torch.no_grad()
    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        vae = pipeline.vae
        distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean, std = distribution.mean.float(), distribution.std.float()
        shift, scale = _latent_scaling(pipeline)
        return torch.cat([(mean - shift) * scale, std * scale], dim=1)

    @torch.no_grad()
    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        shift, scale = _latent_scaling(pipeline)
        pixels = vae.decode((latents / scale + shift).to(vae.device, vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return denoiser(noisy, timestep, **conditioning, return_dict=False)[0]

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        unet: Any = denoiser
        down = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
        up = [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
        return [*down, ("mid_block", unet.mid_block), *up]

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        unet, vae, encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        length = pipeline.tokenizer.model_max_length
        size = self.default_size(pipeline)
        channels, height, width = self.latent_shape(pipeline, *size)
        picture_axes = {0: "batch", 2: "height", 3: "width"}
        latents = _example(2, channels, height, width, like=unet)
        unet_multiple = _unet_factor(pipeline)
        return [
            ExportComponent(
                name="text_encoder",
                module=_TextEncoder(encoder),
                # int32 is what both Optimum and diffusers' ONNX pipeline feed without a cast.
                inputs={"input_ids": torch.arange(2 * length, dtype=torch.int32).reshape(2, length) % 100},
                dynamic={"input_ids": {0: "batch", 1: "sequence"}},
                outputs=["last_hidden_state", "pooler_output"],
                config=_config(encoder),
            ),
            ExportComponent(
                name="unet",
                module=_UNet(unet),
                inputs={
                    "sample": latents,
                    # One for the whole batch, of rank 1; float because some samplers step between integers.
                    "timestep": torch.tensor([10.0]),
                    "encoder_hidden_states": _example(2, length, unet.config.cross_attention_dim, like=unet),
                },
                dynamic={"sample": picture_axes, "encoder_hidden_states": {0: "batch", 1: "sequence"}},
                outputs=["out_sample"],
                config={"time_cond_proj_dim": None, **_config(unet)},
                multiples={"height": unet_multiple, "width": unet_multiple},
            ),
            ExportComponent(
                name="vae_encoder",
                module=_VaeEncoder(vae),
                inputs={"sample": _example(2, vae.config.in_channels, *size, like=vae)},
                dynamic={"sample": picture_axes},
                outputs=["latent_parameters"],
                config=_config(vae),
                multiples={"height": _vae_factor(pipeline), "width": _vae_factor(pipeline)},
            ),
            ExportComponent(
                name="vae_decoder",
                module=_VaeDecoder(vae),
                inputs={"latent_sample": _example(2, vae.config.latent_channels, height, width, like=vae)},
                dynamic={"latent_sample": picture_axes},
                outputs=["sample"],
                config=_config(vae),
            ),
        ]


class _TextEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(input_ids)
        return output.last_hidden_state, output.pooler_output


class _UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _VaeEncoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.encode(sample, return_dict=False)[0].parameters


class _VaeDecoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def _vae_factor(pipeline: Pipeline) -> int:
    """Return the pixels per latent, along one side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def _unet_factor(pipeline: Pipeline) -> int:
    """Return the number that both sides of the latents have to be divisible by."""
    return 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def _latent_scaling(pipeline: Pipeline) -> tuple[float, float]:
    config = pipeline.vae.config
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor


def _config(model: Any) -> dict[str, Any]:
    """Return the content of the model's config.json, without the path it was loaded from."""
    text = model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string()
    return {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}


def _example(*shape: int, like: nn.Module) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(next(p.dtype for p in like.parameters() if p.is_floating_point()))


FAMILY = SD15()


def _inputs(family: blueprint.Blueprint, batch: int, height: int, width: int) -> blueprint.Inputs:
    config = family.denoiser.config
    return {
        "sample": blueprint.meta(batch, config.get("in_channels", 4), height, width),
        "timestep": blueprint.meta(batch, dtype=torch.int64),
        "encoder_hidden_states": blueprint.meta(batch, family.tokens[0], config["cross_attention_dim"]),
    }


# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, the config.json of each folder
BLUEPRINT = blueprint.Blueprint(
    name=SD15.name,
    title="Stable Diffusion 1.5",
    default_source=SD15.facts.default_source,
    lora_targets=SD15.lora_targets,
    denoiser=blueprint.Part(
        "unet", "diffusers:UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}
    ),
    vae=blueprint.vae(4),
    encoders=(blueprint.clip("text_encoder", 768, 12, 12),),
    tokens=(77,),
    inputs=_inputs,
)
