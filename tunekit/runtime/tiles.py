"""Decoding a large picture piece by piece, the same on every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a tile that it has in common with the next, as diffusers has it."""


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: Sequence[int]) -> Tensor:
    """Decode overlapping tiles and fade from each into the next; memory follows the tile, not the picture.

    All tiles have one size, as engines and compiled graphs like it. A decoder looks further than a tile, so
    tones may differ a little from one decoded whole.

    Args:
        decode: latents [B, C, h, w] to pixels [B, 3, h * f, w * f].
        latents: [B, C, H, W].
        tile: height and width of a tile, in latents; a picture no larger is decoded whole.

    Returns:
        Pixels [B, 3, H * f, W * f] on the CPU.
    """
    size = [min(most, side) for most, side in zip(tile, latents.shape[2:], strict=True)]
    if size == list(latents.shape[2:]):
        return decode(latents).cpu()
    total: Tensor | None = None
    weights = torch.zeros(())
    for top in _starts(latents.shape[2], size[0]):
        for left in _starts(latents.shape[3], size[1]):
            pixels = decode(latents[:, :, top : top + size[0], left : left + size[1]]).cpu()
            factor = pixels.shape[2] // size[0]
            if total is None:
                height, width = (side * factor for side in latents.shape[2:])
                total = pixels.new_zeros(*pixels.shape[:2], height, width)
                weights = pixels.new_zeros(height, width)
            fade = torch.outer(_ramp(pixels.shape[2]), _ramp(pixels.shape[3]))
            rows = slice(top * factor, (top + size[0]) * factor)
            columns = slice(left * factor, (left + size[1]) * factor)
            total[:, :, rows, columns] += pixels * fade
            weights[rows, columns] += fade
    assert total is not None
    return total / weights


def _starts(side: int, tile: int) -> list[int]:
    """Where tiles begin; the last one ends where the picture does."""
    if side == tile:
        return [0]
    step = max(1, int(tile * (1 - OVERLAP)))
    return [*range(0, side - tile, step), side - tile]


def _ramp(length: int) -> Tensor:
    """Weights of a tile's rows: up over the overlap, level, and down."""
    index = torch.arange(length, dtype=torch.float32) + 1
    return (torch.minimum(index, index.flip(0)) / max(1, int(length * OVERLAP))).clamp(max=1)
