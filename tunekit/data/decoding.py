"""Bytes of a picture file to pixels, as a viewer would show them."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from typing import cast

import numpy as np
from PIL import Image, ImageCms

FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA"),
    *("HEIF", "JXL"),  # only where a plug-in of Pillow gives them
)
"""What is decoded, by content; TGA, which has no mark of its own, comes behind those that have one. Others
that Pillow opens run programs (PostScript), or are no pictures that anyone trains on."""
SUFFIXES = frozenset(
    {
        *(
            ".png",
            ".apng",
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".webp",
            ".gif",
            ".bmp",
            ".dib",
            ".tif",
            ".tiff",
        ),
        *(".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pnm", ".tga"),
    }
)
"""Of files that are pictures: where they cannot be decoded, that is a problem."""
FOREIGN = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif, or convert them to JPEG"),
    ".jxl": "pip install pillow-jxl-plugin, or convert them to PNG",
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw"),
        "develop them to JPEG or PNG",
    ),
    **dict.fromkeys((".psd", ".psb", ".xcf", ".kra", ".clip", ".exr", ".hdr"), "save them as PNG"),
    **dict.fromkeys((".svg", ".eps", ".ps", ".ai", ".pdf"), "draw them to PNG"),
    **dict.fromkeys((".ico", ".icns", ".cur", ".dds", ".pcx", ".qoi", ".wmf", ".emf"), "convert them to PNG"),
    **dict.fromkeys((".mp4", ".mov", ".webm", ".avi", ".mkv"), "take single pictures out of them"),
}
"""Suffixes of pictures of other kinds, and what to do about those. They are tried by their content first:
what a phone or a browser calls so is often a JPEG."""
VERSION = 1
"""To be raised when the same bytes become other pixels."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_LYING = frozenset({5, 6, 7, 8})
"""Orientations in which width and height change places."""
_ORIENTATION = 0x0112
_NEARLY = 4
"""Levels of 255: a profile that changes no colour by more is sRGB by another name, and changes nothing."""


class PictureError(ValueError):
    """Bytes that are not a whole, sane picture; says why."""


def decode(data: bytes) -> Image.Image:
    """Bytes of a picture to an upright sRGB one: EXIF and colour profile applied, transparency laid on white.

    Raises:
        PictureError: not a whole, sane picture, whatever its decoder says to that.
    """
    first: Exception | None = None
    for version in _versions(data):
        try:
            return _decode(version)
        except Exception as error:  # a decoder raises what it likes
            first = first or error
    assert first is not None
    raise PictureError(_reason(first)) from first


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header of a JPEG, PNG or WebP; others are decoded.

    What was cut off is found, damage in the middle of the pixels is not.

    Raises:
        PictureError: not a whole, sane picture.
    """
    kind = next((kind for kind, is_it in _MAGIC.items() if is_it(data)), None)
    if kind is None or not _ENDS[kind](data):
        return decode(data).size
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as opened:
            size = opened.size
            if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            turned = (kind != "PNG" or _may_be_turned(data)) and _orientation(opened) in _LYING
    except Image.DecompressionBombError as error:
        raise PictureError(_reason(error)) from error
    except Exception:  # a PNG with large texts, for one
        return decode(data).size
    return size[::-1] if turned else size


def known_formats() -> frozenset[str]:
    """Those of `FORMATS` that can be decoded here."""
    if not {"PNG", "TGA"} <= Image.OPEN.keys():
        Image.init()
    _plug_in()
    return frozenset(FORMATS) & Image.OPEN.keys()


def remedy(suffix: str) -> str:
    """What to do about pictures of another kind; nothing where they can be read here."""
    given = {".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".jxl": "JXL"}
    return "" if given.get(suffix) in known_formats() else FOREIGN.get(suffix, "")


@cache
def _plug_in() -> None:
    """HEIC and JPEG XL, where their packages are installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")


def _decode(data: bytes) -> Image.Image:
    known = known_formats()
    with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in known]) as opened:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and opened.width * opened.height > limit:
            raise Image.DecompressionBombError
        opened.load()
        image = _upright(opened)
        profile = opened.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if isinstance(profile, bytes):
        image = _managed(image, profile)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says, where that can be read: whatever else is in it is not looked at."""
    turn = _UPRIGHT.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return cast(int, image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels (decompression bomb?)"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "it", lines[0])[:200]


# Headers ----------------------------------------------------------------------------------------------------

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAGIC: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda data: data.startswith(b"\xff\xd8\xff"),
    "PNG": lambda data: data.startswith(_SIGNATURE),
    "WEBP": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
}
_ENDS: dict[str, Callable[[bytes], bool]] = {
    # The last scan is followed by the mark of the end; a thumbnail, which has both, stands before it.
    "JPEG": lambda data: data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") > 0,
    "PNG": lambda data: any(kind == b"IEND" for kind, _, _ in _chunks(data)),
    "WEBP": lambda data: int.from_bytes(data[4:8], "little") + 8 <= len(data),
}
"""Whether a file is as long as it says; what is not may still be decoded."""
_SAYS_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def _may_be_turned(data: bytes) -> bool:
    """Whether a PNG has a chunk with an orientation; Pillow would decode it to look, for it may come last."""
    return any(
        (kind if kind == b"eXIf" else data[at + 8 : at + 32]).startswith(_SAYS_ORIENTATION)
        for kind, at, _ in _chunks(data)
        if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
    )


# Colour -----------------------------------------------------------------------------------------------------


def _managed(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of a profile to sRGB.

    The picture as it is where the profile is sRGB; and where it is damaged, or made for another mode, as
    programs show it.
    """
    transform = _to_srgb(profile, image.mode)
    if transform is None:
        return image
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        steps = range(0, 256, 15)
        grid = [[red, green, blue] for red in steps for green in steps for blue in steps]
        if mode == "CMYK":
            return made
        probe = Image.fromarray(np.array([grid], dtype=np.uint8)).convert(mode)
        shown = np.asarray(ImageCms.applyTransform(probe, made), dtype=int)
        as_it_is = np.asarray(probe.convert("RGB"), dtype=int)
    except Exception:  # damaged, or made for pictures of another mode
        return None
    return made if abs(shown - as_it_is).max() > _NEARLY else None


# PNG --------------------------------------------------------------------------------------------------------

_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_BESIDE = frozenset({b"eXIf", b"iCCP", b"sRGB", b"gAMA", b"cHRM"})


def _versions(data: bytes) -> Iterator[bytes]:
    """The file, and of a PNG what matters of it: Pillow refuses it for large texts."""
    yield data
    if data.startswith(_SIGNATURE):
        yield _with(data, _PIXELS | _BESIDE)
        yield _with(data, _PIXELS)


def _with(data: bytes, kept: frozenset[bytes]) -> bytes:
    return b"".join([_SIGNATURE, *(data[at:end] for kind, at, end in _chunks(data) if kind in kept)])


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each chunk of a PNG; the last may end behind the data."""
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end
