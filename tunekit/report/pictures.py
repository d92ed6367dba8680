"""Pictures of a run as data inside its page: only those that lie in the run, as many as a page can hold.

A difference of two pictures is drawn in one scale of colours, whatever the pictures are, so that two maps
can be compared, on one page and on two.
"""

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
MAP_SIDE = 256
"""Longest side of a difference's map."""
BRIGHTEST = 64
"""Difference, of 255, that is drawn in the last colour; a larger one too."""
COLOURS = ((12, 12, 32), (87, 24, 120), (190, 50, 84), (246, 130, 40), (255, 244, 190))
"""Of no difference, of the largest, and between, evenly spread."""
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
"""What files of these kinds begin with."""


_File = tuple[Path, int, int]
"""Where it lies, its bytes, and its time stamp."""


@dataclass(frozen=True)
class Difference:
    """How two pictures differ, in steps of 255.

    Attributes:
        image: data URL of the map; each of its points is the largest of three channels.
        largest: anywhere, in any channel.
        mean: over all points and channels.
    """

    image: str
    largest: int
    mean: float


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
        found = self._allowed(path)
        return _encoded(*found, self.side) if found else None

    def difference(self, path: Path, other: Path) -> Difference | None:
        """Where two pictures differ; None if one may not be shown, or they are not of one size."""
        found, reference = self._allowed(path), self._allowed(other)
        return _compared(found, reference) if found and reference else None

    def shape(self, path: Path) -> tuple[int, int]:
        """Width and height of a picture that is shown; what cannot be told is square."""
        from PIL import Image

        try:
            with Image.open(path, formats=("PNG", "JPEG")) as picture:
                return picture.size
        except Exception:  # of a damaged picture a decoder may raise anything
            return 1, 1

    def _allowed(self, path: Path) -> _File | None:
        try:
            whole = path.resolve(strict=True)
            found = whole.stat()
        except (OSError, ValueError, RuntimeError):
            return None
        if not whole.is_relative_to(self.root.resolve()) or not whole.is_file():
            return None
        if not 0 < found.st_size <= LARGEST_FILE:
            return None
        return whole, found.st_size, found.st_mtime_ns


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


@lru_cache(maxsize=2000)
def _compared(found: _File, reference: _File) -> Difference | None:
    from PIL import Image, ImageChops, ImageStat

    try:
        with (
            Image.open(found[0], formats=("PNG", "JPEG")) as one,
            Image.open(reference[0], formats=("PNG", "JPEG")) as other,
        ):
            if one.size != other.size:
                return None
            apart = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
        red, green, blue = apart.split()
        levels = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        largest = int(levels.getextrema()[1])  # type: ignore[arg-type] # of one channel
        mean = sum(ImageStat.Stat(apart).mean) / 3
        levels.thumbnail((MAP_SIDE, MAP_SIDE))
        # Eight levels less than a byte holds make a map half as large.
        levels = levels.point([min(value * 255 // BRIGHTEST, 255) & ~7 for value in range(256)])
        levels.putpalette([part for value in range(256) for part in colour(value / 255)])
        target = io.BytesIO()
        levels.save(target, "PNG", optimize=True)
    except Exception:  # of a damaged picture a decoder may raise anything
        return None
    encoded = base64.b64encode(target.getvalue()).decode("ascii")
    return Difference(f"data:image/png;base64,{encoded}", largest, mean)


def colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue of a difference, which is a share of `BRIGHTEST`, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    first, second = COLOURS[low], COLOURS[low + 1]
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(first, second, strict=True))
    return red, green, blue


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
