"""What the families with a transformer share: patches of latents, flow matching, positions."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.config import ObjectiveConfig
from tunekit.diffusion.objectives import FlowMatching, Objective, ShiftByTokens
from tunekit.families import depth, vae
from tunekit.families import family as answers
from tunekit.families.family import Middle, Pipeline
from tunekit.families.usual import Usual

PATCH = 2
"""The transformer takes 2 x 2 latents as one token."""

JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
JOINT_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
"""Adapter targets in blocks that have layers for the picture (the first half of each) and for the text."""


class Transformer(Usual):
    """A transformer of `PATCH` x `PATCH` latents that learns by flow matching."""

    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """Lists of modules that a picture runs through one after the other."""
    counted: ClassVar[Mapping[str, str]] = {"transformer_blocks": "num_layers"}
    """Of those, the ones that any block may leave -> the key of the configuration that says how many there
    are. Not so where another part of the network knows a block by its number."""

    def objective(self, pipeline: Pipeline, config: ObjectiveConfig | None = None) -> Objective:
        return FlowMatching.from_scheduler(pipeline.scheduler, config, patch=PATCH)

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        side = int(pipeline.vae.config.sample_size)  # most transformers' configurations have none
        return side, side

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        return vae.vae_factor(pipeline) * PATCH

    def begin(self, scheduler: Any, steps: int, latents: Tensor) -> Tensor:
        return answers.begin_flow(scheduler, steps, latents, shift(scheduler, latents))

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (f"{name}.{index}", block)
            for name in self.lists
            for index, block in enumerate(getattr(denoiser, name))
        ]

    def middle(self, denoiser: Any) -> Middle | None:
        # All but the first of the blocks that do most of the work. Of a graph, names do not tell them apart.
        if not isinstance(denoiser, nn.Module):
            return None
        name = max(reversed(self.lists), key=lambda one: len(denoiser.get_submodule(one)._modules))
        count = len(denoiser.get_submodule(name)._modules)
        return Middle(tuple(f"{name}.{index}" for index in range(1, count)), adds=True) if count > 1 else None

    def removable(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        """Every block of a list but its last, so that none is empty."""
        return {
            path: (path,)
            for name in self.counted
            for path in (f"{name}.{index}" for index in range(len(getattr(denoiser, name)) - 1))
        }

    def without(self, denoiser: nn.Module, gone: Collection[str]) -> nn.Module:
        made: Any = copy.copy(denoiser)
        made._modules = dict(denoiser._modules)
        changes: dict[str, Any] = {}
        for name, key in self.counted.items():
            kept = [
                (index, block)
                for index, block in enumerate(getattr(denoiser, name))
                if not depth.lies_in(f"{name}.{index}", gone)
            ]
            made._modules[name] = nn.ModuleList([block for _, block in kept])
            changes[key] = len(kept)
            changes |= self.recounted(denoiser, name, [index for index, _ in kept])
        made.register_to_config(**depth.configured(denoiser, changes))
        network: nn.Module = made
        return network

    def recounted(self, denoiser: nn.Module, name: str, kept: list[int]) -> dict[str, Any]:
        """What else a configuration says of blocks by their number, where those of list `name` are kept."""
        return {}


def shift(scheduler: Any, latents: Tensor) -> float:
    """Logarithm of the shift that a sampler is configured with for latents [B, C, h, w]."""
    return ShiftByTokens.from_scheduler(scheduler, PATCH).mu(tuple(latents.shape))


def from_zero(guidance: float) -> float | None:
    """`Family.cfg_scale` where guidance is counted from 0: with + guidance * (with - without)."""
    return 1 + guidance if guidance > 0 else None


def bare(denoiser: nn.Module) -> Any:
    """The network itself, which DDP wraps."""
    return getattr(denoiser, "module", denoiser)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4 C]."""
    batch, channels, height, width = latents.shape
    cut = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The reverse of `pack`, to latents of that height and width."""
    batch, _, depth = tokens.shape
    channels = depth // PATCH**2
    cut = tokens.view(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """[h/2 * w/2, 3] float32: 0, row and column of each token of latents of that height and width."""
    ids = torch.zeros(height // PATCH, width // PATCH, 3, device=device)
    ids[..., 1] += torch.arange(height // PATCH, device=device)[:, None]
    ids[..., 2] += torch.arange(width // PATCH, device=device)[None, :]
    return ids.view(-1, 3)
