"""Bytes of a picture file to pixels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


def decode(data: bytes) -> Image.Image:
    """Bytes of any format Pillow reads to an upright RGB picture: EXIF applied, transparency laid on white.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: not a whole, sane picture.
    """
    with Image.open(io.BytesIO(data)) as opened:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and opened.width * opened.height > limit:
            raise Image.DecompressionBombError(f"{opened.width}x{opened.height} pixels")
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
