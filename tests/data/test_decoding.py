"""Bytes to pixels: what a viewer shows, and one kind of error for everything that is no picture."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tunekit.data import decoding
from tunekit.data.decoding import FORMATS, PictureError, decode


def picture(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 9, y * 15, 255 - x * 5], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, bytes]) -> bytes:
    """A block written by hand of (tag, type, at most four bytes): types may be what they should not be."""
    rows = b"".join(struct.pack("<HHI", tag, kind, 1) + value.ljust(4, b"\0") for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + b"\0\0\0\0"


LYING = (0x112, 3, b"\6\0")


@pytest.mark.parametrize(
    "other", [(0x128, 2, b"2\0"), (0x11A, 2, b"72\0"), (0x11A, 3, b"\1"), (0x8769, 4, b"\xff" * 4)]
)
def test_exif_of_a_wrong_type_is_not_the_picture(other: tuple[int, int, bytes]) -> None:
    upright = decode(encoded(picture(), "JPEG", exif=exif(LYING, other)))
    assert upright.size == (16, 24)


def test_damaged_exif_is_not_the_picture() -> None:
    assert decode(encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (24, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_a_viewer(orientation: int) -> None:
    from PIL import ImageOps

    block = Image.Exif()
    block[0x112] = orientation
    data = encoded(picture(), exif=block)
    with Image.open(io.BytesIO(data)) as opened:
        assert decode(data).tobytes() == ImageOps.exif_transpose(opened).tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_png_with_a_long_text_is_its_pixels(zipped: bool) -> None:
    info = PngInfo()
    info.add_itxt("workflow", "x" * 1_500_000, zip=zipped)
    block = Image.Exif()
    block[0x112] = 6
    data = encoded(picture(), pnginfo=info, exif=block)
    assert decode(data).tobytes() == decode(encoded(picture(), exif=block)).tobytes()


def test_a_damaged_chunk_beside_the_pixels_is_not_the_picture() -> None:
    data = encoded(picture())
    profile = b"name\0\0" + zlib.compress(b"\0" * 5_000_000)
    chunk = (
        struct.pack(">I", len(profile)) + b"iCCP" + profile + struct.pack(">I", zlib.crc32(b"iCCP" + profile))
    )
    assert decode(data[:33] + chunk + data[33:]).tobytes() == picture().tobytes()


def test_what_runs_a_program_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def ghostscript(*_: object, **__: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"
    with pytest.raises(PictureError, match="cannot identify"):
        decode(script)
    assert not {"EPS", "WMF", "PDF", "FITS", "MPEG"} & {*FORMATS}


class Odd(Exception):
    """What a decoder may raise."""


@pytest.mark.parametrize(
    "error", [Odd("no frame"), RuntimeError("no frame"), MemoryError("no frame"), KeyError("no frame")]
)
def test_whatever_a_decoder_raises_is_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(PictureError, match="no frame"):
        decode(b"whatever")


# Colour


def profile(primaries: list[tuple[float, float, float]], gamma: float) -> bytes:
    """A matrix profile (version 2.1) of primaries adapted to D50, and one gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = {b"desc": text, b"wtpt": xyz((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0x\0\0\0"}
    tags |= {key: xyz(value) for key, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256)) + b"\0\0"
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    offset, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += key + struct.pack(">II", offset + len(data), len(value))
        data += value
    head = struct.pack(">I4s", 128 + len(table) + len(data), b"\0" * 4) + b"\x02\x10\0\0mntrRGB XYZ "
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    return (head + fixed(0.9642) + fixed(1) + fixed(0.8249)).ljust(128, b"\0") + table + data


# Published primaries of Adobe RGB (1998), adapted to D50
ADOBE = profile([(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_a_profile_are_those_that_a_viewer_shows(mode: str) -> None:
    meant = np.asarray(picture(), dtype=int)
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(ADOBE))
    stored = ImageCms.profileToProfile(picture(), ImageCms.createProfile("sRGB"), adobe)
    assert stored is not None
    stored = Image.fromarray(np.asarray(stored))  # Pillow would write its profile with it
    data = encoded(stored.convert(mode), icc_profile=ADOBE)
    error = abs(np.asarray(decode(data), dtype=int) - meant)
    without = abs(np.asarray(decode(encoded(stored)), dtype=int) - meant)
    print(f"mean error {error.mean():.2f} levels, without the profile {without.mean():.2f}")
    assert error.mean() < 1
    assert without.mean() > 5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("attached", [SRGB, b"no profile", ADOBE[:200]], ids=["srgb", "junk", "cut"])
def test_srgb_by_any_name_and_damaged_profiles_change_nothing(mode: str, attached: bytes) -> None:
    image = picture().convert(mode)
    assert decode(encoded(image, icc_profile=attached)).tobytes() == decode(encoded(image)).tobytes()


def test_a_profile_of_another_mode_changes_nothing() -> None:
    grey = picture().convert("L")
    assert decode(encoded(grey, icc_profile=ADOBE)).tobytes() == decode(encoded(grey)).tobytes()


# Any bytes


WHOLE = [encoded(picture(), form) for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA")] + [
    encoded(picture(), "JPEG", exif=exif(LYING), icc_profile=ADOBE),
    encoded(picture().convert("RGBA"), icc_profile=ADOBE),
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 3000),
)
def test_damaged_bytes_are_a_picture_or_one_error(
    data: bytes, patches: list[tuple[int, bytes]], cut: int
) -> None:
    for at, patch in patches:
        at %= len(data)
        data = data[:at] + patch + data[at + len(patch) :]
    data = data[: len(data) - cut % len(data)]
    try:
        found = decode(data)
    except PictureError as error:
        told = str(error)
    else:
        assert found.mode == "RGB"
        told = "fine"
    assert told
    assert "\n" not in told


def test_suffixes_and_formats_belong_together(tmp_path: Path) -> None:
    Image.init()
    forms = {Image.registered_extensions()[suffix] for suffix in decoding.SUFFIXES}
    assert forms <= {*FORMATS}
    assert not decoding.SUFFIXES & decoding.FOREIGN.keys()
