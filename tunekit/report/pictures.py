"""Pictures of a run as data inside its page: only those that lie in the run, as many as a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

MOST_BYTES = 24 * 2**20
"""Of pictures in a page as they are; beyond, they are shown smaller."""
SIDES = (512, 256)
"""Longest side of pictures that are shown smaller; the second where the first would not do either."""
LARGEST_FILE = 32 * 2**20
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
"""What files of these kinds begin with."""


@dataclass
class Album:
    """The pictures of a page.

    Attributes:
        root: the run folder; what lies elsewhere, behind a link too, is not shown.
        side: longest side of a picture; None shows them as they are.
    """

    root: Path
    side: int | None = field(default=None, init=False)

    def plan(self, paths: Iterable[Path]) -> None:
        """Decides how large pictures are shown, from the size of all."""
        total = sum(path.stat().st_size for path in paths if path.is_file())
        if total > MOST_BYTES:
            self.side = SIDES[0] if total <= 8 * MOST_BYTES else SIDES[1]

    def show(self, path: Path) -> str | None:
        """A picture as a data URL; None where there is none that may be shown."""
        try:
            whole = path.resolve(strict=True)
            found = whole.stat()
        except (OSError, ValueError, RuntimeError):
            return None
        if not whole.is_relative_to(self.root.resolve()) or not whole.is_file():
            return None
        if not 0 < found.st_size <= LARGEST_FILE:
            return None
        return _encoded(whole, found.st_size, found.st_mtime_ns, self.side)


@lru_cache(maxsize=2000)
def _encoded(path: Path, size: int, modified_ns: int, side: int | None) -> str | None:
    """Kept between two pages of a run that is still training."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
    if kind is None:
        return None
    if side is not None:
        smaller = _smaller(content, side)
        if smaller is None:
            return None
        content, kind = smaller, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _smaller(content: bytes, side: int) -> bytes | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            picture.thumbnail((side, side))
            target = io.BytesIO()
            picture.convert("RGB").save(target, "JPEG", quality=85)
    except Exception:  # of a damaged picture a decoder may raise anything
        return None
    return target.getvalue()


def drawing(path: Path, root: Path) -> str | None:
    """An SVG of ours as a data URL: an image can neither run scripts nor load anything."""
    try:
        whole = path.resolve(strict=True)
        content = whole.read_bytes() if whole.is_file() and whole.stat().st_size <= LARGEST_FILE else b""
    except (OSError, ValueError, RuntimeError):
        return None
    if not whole.is_relative_to(root.resolve()) or not content.lstrip().startswith(b"<svg"):
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode('ascii')}"
