"""Autoencoders that families share: sizes, coding, graphs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunekit.errors import ConfigError
from tunekit.families.family import ExportComponent, Pipeline
from tunekit.families.graphs import PICTURE_AXES, example, model_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Sizes ------------------------------------------------------------------------------------------------------


def vae_factor(pipeline: Pipeline) -> int:
    """Pixels per latent, along one side."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def latent_shape(channels: int, factor: int, multiple: int, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of a picture's latents.

    Args:
        channels: C.
        factor: pixels per latent, along one side.
        multiple: what both sides in pixels have to be divisible by.

    Raises:
        ConfigError: they are not.
    """
    for size in (height, width):
        if size <= 0 or size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise ConfigError(
                f"{size} px is not a multiple of {multiple}, which this model needs",
                hint=f"try {nearest}",
            )
    return channels, height // factor, width // factor


def misfits(config: Any) -> list[str]:
    """Why an autoencoder's configuration is none that latents can be scaled by; see `loading.Misfits`."""
    found = []
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    if (
        not all(isinstance(number, int | float) and math.isfinite(number) for number in (scale, shift))
        or not scale
    ):
        found.append(f"its VAE has scaling_factor {scale!r} and shift_factor {shift!r}: numbers are needed")
    if getattr(config, "latents_mean", None) or getattr(config, "latents_std", None):
        found.append("its VAE scales each channel of the latents by itself (latents_mean, latents_std)")
    return found


# Coding -----------------------------------------------------------------------------------------------------


def latent_scaling(pipeline: Pipeline) -> tuple[float, float]:
    """Shift and scale of latents."""
    config = pipeline.vae.config
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor


def encode_image(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    """See `Family.encode_image`."""
    mean, std = posterior(pipeline.vae, pixels)
    shift, scale = latent_scaling(pipeline)
    return torch.cat([(mean - shift) * scale, std * scale], dim=1)


def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """See `Family.decode`."""
    shift, scale = latent_scaling(pipeline)
    return decoded(pipeline.vae, latents / scale + shift)


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pixels in [-1, 1], as the encoder gives them, float32."""
    distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return distribution.mean.float(), distribution.std.float()


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in [0, 1], float32, of latents as the decoder takes them."""
    pixels: Tensor = vae.decode(latents.to(vae.device, vae.dtype)).sample
    pixels = pixels.float()
    # What is not a number must not look like white.
    return (pixels / 2 + 0.5).clamp(0, 1).masked_fill_(~pixels.isfinite(), torch.nan)


# Autoencoders of films, to which a picture is a film of one frame -------------------------------------------


def film_factor(pipeline: Pipeline) -> int:
    """Pixels per latent, along one side."""
    return int(2 ** len(pipeline.vae.config.temperal_downsample))


def encode_frame(pipeline: Pipeline, pixels: Tensor) -> Tensor:
    """See `Family.encode_image`."""
    mean, std = (part.squeeze(2) for part in posterior(pipeline.vae, pixels.unsqueeze(2)))
    shift, scale = film_scaling(pipeline, mean)
    return torch.cat([(mean - shift) / scale, std / scale], dim=1)


def decode_frame(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """See `Family.decode`."""
    shift, scale = film_scaling(pipeline, latents)
    return decoded(pipeline.vae, (latents * scale + shift).unsqueeze(2)).squeeze(2)


def film_scaling(pipeline: Pipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the latents, [C, 1, 1]."""
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).to(like) for values in (config.latents_mean, config.latents_std))
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


# Graphs -----------------------------------------------------------------------------------------------------


def export_vae(pipeline: Pipeline, size: tuple[int, int]) -> list[ExportComponent]:
    """The two graphs of the autoencoder.

    Args:
        size: (height, width) in pixels of the example.
    """
    vae = pipeline.vae
    factor = vae_factor(pipeline)
    height, width = size
    latents = (vae.config.latent_channels, height // factor, width // factor)
    return [
        ExportComponent(
            name="vae_encoder",
            component="vae",
            module=_VaeEncoder(vae),
            inputs={"sample": example(2, vae.config.in_channels, height, width, like=vae)},
            dynamic={"sample": PICTURE_AXES},
            outputs=["latent_parameters"],
            config=model_config(vae),
            multiples={"height": factor, "width": factor},
        ),
        ExportComponent(
            name="vae_decoder",
            component="vae",
            module=_VaeDecoder(vae),
            inputs={"latent_sample": example(2, *latents, like=vae)},
            dynamic={"latent_sample": PICTURE_AXES},
            outputs=["sample"],
            config=model_config(vae),
        ),
    ]


class _VaeEncoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.vae.encode(sample, return_dict=False)[0].parameters
        return moments


class _VaeDecoder(nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return pixels
