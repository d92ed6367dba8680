"""2:4 sparsity: of every four inputs of a layer, two weights at least are zero.

NVIDIA's cards from Ampere on skip them: https://developer.nvidia.com/blog/accelerating-inference-with-sparsity-using-ampere-and-tensorrt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tunekit import layers
from tunekit.families.family import Family

GROUP, KEPT = 4, 2


def halve(family: Family, denoiser: nn.Module, stays: Callable[[str], bool]) -> list[str]:
    """Sets the two smaller weights of each four to zero, in the blocks' layers but for those that stay.

    Returns:
        The layers that were changed.
    """
    changed = []
    for name, layer in _layers(family, denoiser):
        if stays(name):
            continue
        weight = layer.weight.data
        fours = _fours(weight)
        best = fours.abs().topk(KEPT, dim=-1).indices
        mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, best, value=True)
        layer.weight.data = weight * _back(mask, weight)
        changed.append(name)
    return changed


def patterns(family: Family, denoiser: nn.Module) -> dict[str, Tensor]:
    """Names of the weights of blocks' layers that are sparse -> where they are not zero, like them, bool."""
    return {
        f"{name}.weight": layer.weight.detach() != 0
        for name, layer in _layers(family, denoiser)
        if bool(((_fours(layer.weight.detach()) == 0).sum(-1) >= GROUP - KEPT).all())
    }


def _layers(family: Family, denoiser: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for path, block in family.blocks(denoiser):
        for name, layer in block.named_modules(prefix=path):
            if layers.can_quantize(layer) and layer.weight.shape[1] % GROUP == 0:
                yield name, layer


def _fours(weight: Tensor) -> Tensor:
    """[out, in, ...] -> [out, ..., in / 4, 4]."""
    last = weight.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, GROUP)


def _back(fours: Tensor, like: Tensor) -> Tensor:
    return fours.flatten(-2).movedim(-1, 1).to(like.dtype)
