"""Shapes, crops and flips: how a picture of any size becomes one of the sizes that are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tunekit.errors import ConfigError

CROPS = 4
"""Random crops cached per picture, see `Transform`."""


def check_resolution(resolution: int, multiple: int, source: str) -> None:
    """Refuse a resolution that would be rounded.

    Args:
        multiple: what the sizes of the model have to be divisible by.
        source: of the model.

    Raises:
        ConfigError: it is not divisible.
    """
    if resolution % multiple:
        below = resolution // multiple * multiple
        near = " or ".join(str(side) for side in (below, below + multiple) if side)
        raise ConfigError(
            f"data.resolution: {resolution} is not a multiple of {multiple}, which {source} needs",
            hint=f"set data.resolution={near}",
        )


def buckets(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (width, height) of about `resolution` squared pixels, up to 2.5 times as long as wide.

    >>> buckets(64, 16)
    [(32, 80), (48, 80), (64, 64), (80, 48), (80, 32)]
    """
    step = max(multiple, resolution // 8 // multiple * multiple)
    area = resolution * resolution
    found = {(resolution // multiple * multiple,) * 2}
    for width in range(step, 2 * resolution + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= 2.5 * min(width, height):
            found.add((width, height))
            found.add((height, width))
    return sorted(found)


def bucket_for(width: int, height: int, resolution: int, multiple: int, *, many: bool) -> tuple[int, int]:
    """The size (width, height) a picture is trained at: the square, or the bucket nearest in aspect ratio."""
    if not many:
        return (resolution // multiple * multiple,) * 2
    ratio = math.log(width / height)
    return min(
        buckets(resolution, multiple),
        key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]),
    )


@dataclass(frozen=True)
class Transform:
    """How a picture becomes pixels: scaled to cover `size`, cut at `left`, `top` (0 to 1), mirrored.

    Latents are encoded once, so random crops and flips are a few cached variants of each picture: `CROPS`
        cuts drawn from
    (seed, sample id, cut) when `crop: random`, times two when `flip`. Which one an epoch sees is drawn from
    (seed, epoch, sample id).
    """

    size: tuple[int, int]
    left: float = 0.5
    top: float = 0.5
    flip: bool = False

    def apply(self, image: Image.Image) -> Tensor:
        """Upright RGB picture to pixels [3, height, width] in [-1, 1], float32."""
        width, height = self.size
        scaled = self.scaled(image.width, image.height)
        left, top = self.corner(image.width, image.height)
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + width, top + height))
        if self.flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture of that size is scaled to."""
        scale = max(self.size[0] / width, self.size[1] / height)
        return max(self.size[0], round(width * scale)), max(self.size[1], round(height * scale))

    def corner(self, width: int, height: int) -> tuple[int, int]:
        """(left, top) of the cut in the scaled picture, in pixels."""
        scaled = self.scaled(width, height)
        return round(self.left * (scaled[0] - self.size[0])), round(self.top * (scaled[1] - self.size[1]))

    def key(self) -> str:
        """For cache keys: the crop to 1e-6, so no two crops that differ by a pixel share a key."""
        return f"{self.size[0]}x{self.size[1]} {self.left:.6f} {self.top:.6f} {int(self.flip)}"
