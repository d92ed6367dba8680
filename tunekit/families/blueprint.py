"""What a family is made of at its real size, without weights: all that planning memory needs to know.

A family's file sets `BLUEPRINT`. It may do so before the family can be trained (`FAMILY`): then it can be
planned, and not yet run.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.resources import builtin


@dataclass(frozen=True)
class Part:
    """One network of a pipeline.

    Attributes:
        name: its folder in diffusers' layout, "unet".
        classes: "diffusers:UNet2DConditionModel"; a transformers model is made from its config class.
        config: what its config.json says, as far as it differs from the class's defaults.
        precision: that it computes in while pictures and captions are encoded.
    """

    name: str
    classes: str
    config: Mapping[str, Any]
    precision: str = "fp32"

    def build(self, device: str = "meta") -> nn.Module:
        """Makes the network: on the meta device without data, elsewhere with random weights."""
        module_name, class_name = self.classes.split(":")
        made = getattr(importlib.import_module(module_name), class_name)
        with torch.device(device):
            if module_name == "transformers":
                module: nn.Module = made(made.config_class(**self.config))
            else:
                known = inspect.signature(made.__init__).parameters
                module = made(**{key: value for key, value in self.config.items() if key in known})
        return module.eval().requires_grad_(False)


Inputs = dict[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """A family at its real size.

    Attributes:
        name: of the family, "sdxl".
        title: for people.
        default_source: hub id of the usual base, whose sizes are given here.
        lora_targets: the family's usual adapter targets.
        denoiser, vae, encoders: the networks.
        tokens: longest prompt of each encoder.
        inputs: `(blueprint, batch, h, w)` -> the denoiser's keyword arguments, on the meta device; the first
            is the noisy latents, float32 as they come from the cache.
        note: what a plan has to say about this family.
    """

    name: str
    title: str
    default_source: str
    lora_targets: tuple[str, ...]
    denoiser: Part
    vae: Part
    encoders: tuple[Part, ...]
    tokens: tuple[int, ...]
    inputs: Callable[[Blueprint, int, int, int], Inputs]
    note: str = ""
    assumed: bool = field(default=False)
    """Whether the sizes are those of `default_source` because the source could not be looked at."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent in each direction."""
        channels = self.vae.config.get("block_out_channels", (0,))
        return int(2 ** (len(channels) - 1))

    def sized(self, source: str) -> Blueprint:
        """The blueprint with the sizes of a folder, read from its config.json files; nothing is downloaded.

        Args:
            source: folder, "builtin/..." or hub id; of a hub id that is not in the local cache, the sizes of
                `default_source` are assumed.

        Raises:
            ModelError: a folder without the family's components, or one weights file.
        """
        folder = builtin(source) or Path(source).expanduser()
        if not folder.exists():
            return replace(self, assumed=source != self.default_source)
        if folder.is_file():
            return replace(self, assumed=True)

        def read(part: Part) -> Part:
            path = folder / part.name / "config.json"
            try:
                return replace(part, config=json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"the sizes of {part.name} cannot be read ({error})",
                    where=str(path),
                    hint=f"{self.title} needs the folders {', '.join(p.name for p in self.parts)}",
                ) from error

        encoders = tuple(read(part) for part in self.encoders)
        tokens = tuple(
            int(encoder.config.get("max_position_embeddings", count))
            for encoder, count in zip(encoders, self.tokens, strict=True)
        )
        return replace(
            self, denoiser=read(self.denoiser), vae=read(self.vae), encoders=encoders, tokens=tokens
        )

    def like(self, pipeline: Any) -> Blueprint:
        """The blueprint with the sizes of a pipeline that is there."""

        def read(part: Part) -> Part:
            config = getattr(pipeline, part.name).config
            return replace(part, config=dict(config.to_dict() if hasattr(config, "to_dict") else config))

        encoders = tuple(read(part) for part in self.encoders)
        tokens = tuple(int(encoder.config["max_position_embeddings"]) for encoder in encoders)
        return replace(
            self, denoiser=read(self.denoiser), vae=read(self.vae), encoders=encoders, tokens=tokens
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """All networks."""
        return (self.denoiser, self.vae, *self.encoders)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(*shape, device="meta", dtype=dtype)


def clip(
    name: str, width: int, layers: int, heads: int, *, act: str = "quick_gelu", projection: int | None = None
) -> Part:
    """A CLIP text encoder of 77 tokens and 49,408 words; with `projection` it gives a pooled embedding."""
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "projection_dim": projection or width,
    }
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return Part(name, f"transformers:{kind}", config)


def t5_xxl(name: str) -> Part:
    """The T5 1.1 XXL encoder, 4.76 G parameters, in bfloat16."""
    config = {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    }
    return Part(name, "transformers:T5EncoderModel", config, precision="bf16")


def vae(channels: int, *, quant: bool = True, scaling: float = 0.18215) -> Part:
    """The autoencoder all these families share: 8 pixels per latent."""
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "scaling_factor": scaling,
    }
    return Part("vae", "diffusers:AutoencoderKL", config)
