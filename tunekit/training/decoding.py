"""Teaching a small decoder what an autoencoder's own decoder gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.diffusion.batch import Batch
from tunekit.errors import ModelError
from tunekit.families.family import Planned
from tunekit.families.weights import read_json
from tunekit.memory.levers import Fitted
from tunekit.tasks import Losses


class SmallDecoder(nn.Module):
    """Plain convolutions and nearest neighbours, as TAESD has them (https://github.com/madebyollin/taesd).

    Takes what the autoencoder's own decoder takes, [B, C, h, w]; gives pixels [B, 3, h * f, w * f] in
    [-1, 1].

    Args:
        channels: C.
        factor: f, a power of two.
        width: channels within.
        blocks: residual blocks on each of the sizes but the last, which has one.
        mean: of each channel of the latents, [C].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int, factor: int, width: int, blocks: int, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import DecoderTiny

        levels = factor.bit_length()
        self.decoder = DecoderTiny(
            channels,
            3,
            num_blocks=(*[blocks] * (levels - 1), 1),
            block_out_channels=(width,) * levels,
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.float().clamp(min=1e-6).view(-1, 1, 1))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.std.dtype

    def forward(self, latent_sample: Tensor) -> Tensor:
        """Decode."""
        pixels: Tensor = self.decoder((latent_sample - self.mean) / self.std)
        return pixels


def taken(source: str, own: Any, channels: int, factor: int) -> SmallDecoder:
    """The decoder of an AutoencoderTiny of diffusers, which is given latents as the denoiser makes them.

    Args:
        source: its folder.
        own: the autoencoder whose place it takes; says how its latents are scaled.
        channels: of these latents.
        factor: pixels per latent.

    Raises:
        ModelError: another model, a damaged one, or one for other latents.
    """
    from diffusers import AutoencoderTiny

    kind = read_json(Path(source) / "config.json").get("_class_name")
    if kind != "AutoencoderTiny":
        raise ModelError(f"is {kind}, and a small decoder is that of an AutoencoderTiny", where=source)
    try:
        small, said = AutoencoderTiny.from_pretrained(
            source, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot be opened: {reason}", where=source) from error
    if missing := [name for name in said["missing_keys"] if name.startswith("decoder.")]:
        raise ModelError(f"lacks {len(missing)} tensors, such as {missing[0]}", where=source)
    config = small.config
    made = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    if (config.latent_channels, config.out_channels, made) != (channels, 3, factor):
        raise ModelError(
            f"decodes {config.latent_channels} channels to {made} pixels per latent and"
            f" {config.out_channels} colours; this model has {channels} channels and {factor} pixels",
            where=source,
            hint="take the one that was made for this family: taesd, taesdxl, taesd3, taef1",
        )
    if getattr(own, "bn", None) is not None:
        raise ModelError(
            "latents of this family are scaled channel by channel, which no AutoencoderTiny is made for",
            where=source,
            hint="leave source out: a small decoder is trained then",
        )
    scale, shift = float(own.config.scaling_factor), float(own.config.get("shift_factor") or 0.0)
    made_of = SmallDecoder(
        channels, 1, 4, 1, torch.full((channels,), shift), torch.full((channels,), 1 / scale)
    )
    made_of.decoder = small.decoder.float()
    if not all(bool(value.isfinite().all()) for value in made_of.state_dict().values()):
        raise ModelError("its weights hold NaN or infinity", where=source)
    return made_of.eval().requires_grad_(False)


class Teacher:
    """What the own decoder of a pipeline is given, and gives.

    Args:
        family: of the pipeline.
        pipeline: with an autoencoder of pictures.
    """

    def __init__(self, family: Planned, pipeline: Any) -> None:
        self.family, self.vae = family, pipeline.vae
        self.pipeline = SimpleNamespace(vae=self, config=pipeline.config)
        self.config, self.dtype, self.device = self.vae.config, self.vae.dtype, self.vae.device
        self.bn = getattr(self.vae, "bn", None)  # which scales the latents of some
        self._given: Tensor | None = None

    def decode(self, latents: Tensor) -> Any:
        """As the family calls it."""
        self._given = latents
        return self.vae.decode(latents)

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents [B, ...] to what the decoder is given and the pixels that it gives, in [-1, 1].

        Raises:
            ModelError: it decodes films.
        """
        pixels = self.family.decode(self.pipeline, latents)
        assert self._given is not None
        if self._given.ndim != 4:
            raise ModelError("its autoencoder is one of films, which no small decoder of pictures replaces")
        return self._given.float(), pixels * 2 - 1


class Decoding:
    """A small decoder that learns to give what the own one gives. A task: see `tunekit.tasks.Task`.

    The error is the mean absolute and the mean squared one, so that edges stay sharp and nothing strays.

    Args:
        fitted: the small decoder as it is trained.
        teacher: gives what is wanted.
    """

    def __init__(self, fitted: Fitted, teacher: Teacher) -> None:
        self.fitted, self.teacher = fitted, teacher

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses [B] of one batch."""
        given, wanted = self.teacher(batch.latents)
        difference = (model(given) - wanted).float().flatten(1)
        return {"loss": difference.abs().mean(1) + difference.square().mean(1)}

    def updated(self, step: int) -> None:
        """Nothing follows the weights."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the weights."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing beside the weights."""


def spread(latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of what decoders are given, [C]."""
    joined = torch.cat([part.float().cpu().transpose(0, 1).flatten(1) for part in latents], dim=1)
    return joined.mean(1), joined.std(1)
