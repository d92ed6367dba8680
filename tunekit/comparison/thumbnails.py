"""Pictures as data inside a page that stays light, however many there are."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

BUDGET = 16 * 2**20
"""Bytes of all thumbnails of a page, as they stand in it."""
SIDES = (768, 512, 384, 256, 192, 128)
"""Longest side of a thumbnail; the largest that keeps to the budget."""
SAMPLES = 12
"""Pictures that are tried, to tell how many bytes all of them take."""


def side_for(paths: Sequence[Path]) -> int:
    """The longest side of thumbnails of so many pictures."""
    step = max(1, len(paths) // SAMPLES)
    tried = paths[::step][:SAMPLES]
    for side in SIDES:
        sizes = [len(found[0]) for path in tried if (found := thumbnail(path, side))]
        if not sizes or sum(sizes) / len(sizes) * len(paths) <= BUDGET:
            return side
    return SIDES[-1]


def thumbnail(path: Path, side: int) -> tuple[str, int, int] | None:
    """A data URL, its width and height; None of a picture that is gone or damaged."""
    from PIL import Image, features

    kind = "webp" if features.check("webp") else "jpeg"
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            picture.thumbnail((side, side))
            target = io.BytesIO()
            options = {"method": 4} if kind == "webp" else {}
            picture.convert("RGB").save(target, kind, quality=82, **options)
            width, height = picture.size
    except Exception:  # of a damaged picture a decoder may raise anything
        return None
    encoded = base64.b64encode(target.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{encoded}", width, height
