"""Pictures and captions from a folder or Hugging Face `datasets`, all looked at before anything starts.

    scan = scan_data(config.data)
    scan.check()                      # one DataError that lists every problem
    scan.samples, scan.held_out

A folder is read recursively; the caption of ``a/b.jpg`` is the text of ``a/b.txt``. A folder with
``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` at its top, a ``.parquet`` file, a folder of
them, or a hub id goes through `datasets`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tunekit.config import DataConfig, DreamboothData
from tunekit.errors import DataError, did_you_mean
from tunekit.resources import resolve_path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CROPS = 4
"""Random crops cached per picture, see `Transform`."""


@dataclass(frozen=True)
class Sample:
    """One picture with its caption. The pixels are read again when needed, never kept."""

    id: str
    """Path relative to the data folder, or the row's number: what draws and cache keys use."""
    caption: str
    width: int
    """After EXIF orientation."""
    height: int
    content: str
    """Hash of the decoded RGB pixels."""
    where: str
    """For messages: the file, or `path[row]`."""
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The upright RGB picture."""
        return decode(self.read())


@dataclass(frozen=True)
class Problem:
    """Something wrong with one picture, and what to change."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Scan:
    """Everything found under a data section."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()
    held_out: tuple[Sample, ...] = ()
    """Validation pictures."""
    prior: tuple[Sample, ...] = ()
    """Class pictures that exist already (DreamBooth)."""

    def check(self) -> None:
        """Raise one DataError that lists all problems."""
        if self.problems:
            count = len(self.problems)
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise DataError(f"{count} {'problem' if count == 1 else 'problems'} in the pictures:\n{lines}")


def scan_data(data: DataConfig | DreamboothData) -> Scan:
    """Look at every picture a data section names, once.

    Args:
        data: the `data:` section of a recipe.

    Returns:
        The usable samples and all problems. A missing or empty folder is a problem too, so `check` lists it
        with the others.
    """
    if isinstance(data, DreamboothData):
        samples, problems = _scan_source(data.path, data.resolution, caption=data.instance_prompt)
        prior: list[Sample] = []
        if data.class_prompt is not None and data.class_path is not None:
            prior, more = _scan_source(data.class_path, data.resolution, caption=data.class_prompt)
            problems += more + _repeated(samples, prior, "an instance picture")
        return Scan(tuple(samples), tuple(problems), prior=tuple(prior))
    samples, problems = _scan_source(
        data.path,
        data.resolution,
        split=data.split,
        image_column=data.image_column,
        caption_column=data.caption_column,
        prefix=data.caption_prefix,
    )
    held_out: list[Sample] = []
    if isinstance(data.validation, str):
        held_out, more = _scan_source(
            data.validation,
            data.resolution,
            split=data.split,
            image_column=data.image_column,
            caption_column=data.caption_column,
            prefix=data.caption_prefix,
        )
        problems += more + _repeated(samples, held_out, "a training picture")
    elif data.validation is not None and samples:
        samples, held_out = _hold_out(samples, data.validation)
        if not samples or not held_out:
            total = len(samples) + len(held_out)
            problems.append(
                Problem(
                    data.path,
                    f"data.validation: {data.validation:g} of {total} pictures leaves one side empty",
                    "add pictures or change the fraction",
                )
            )
    return Scan(tuple(samples), tuple(problems), tuple(held_out))


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


# Shapes, crops and flips


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


# Reading


def _scan_source(
    path: str,
    resolution: int,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    prefix: str = "",
    caption: str | None = None,
) -> tuple[list[Sample], list[Problem]]:
    """Read one source. `caption` given: every picture has it, and no caption is looked for."""
    try:
        kind, place = _locate(path)
        if kind == "folder":
            raw = list(_folder(place, needs_caption=caption is None))
        else:
            raw = list(_dataset(kind, path, place, split, image_column, caption_column, caption is None))
    except DataError as error:
        return [], [Problem(path, error.message, error.hint or "correct the path")]
    samples: list[Sample] = []
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for item, outcome in _look(raw, resolution):
        if isinstance(outcome, Problem):
            problems.append(outcome)
        if item.problem is not None:
            problems.append(item.problem)
        if isinstance(outcome, Problem) or item.problem is not None:
            continue
        width, height, content = outcome
        if content in seen:
            problems.append(Problem(item.where, f"same picture as {seen[content]}", "remove one of the two"))
            continue
        seen[content] = item.where
        text = caption if caption is not None else prefix + item.caption
        samples.append(Sample(item.id, text, width, height, content, item.where, item.read))
    if not samples and not problems:
        problems.append(
            Problem(path, "no pictures found", f"looked for {', '.join(sorted(SUFFIXES))} files in it")
        )
    return samples, problems


@dataclass(frozen=True)
class _Raw:
    """A picture before anyone looked at it."""

    id: str
    where: str
    read: Callable[[], bytes]
    caption: str = ""
    problem: Problem | None = None


def _look(raw: Sequence[_Raw], resolution: int) -> Iterator[tuple[_Raw, Problem | tuple[int, int, str]]]:
    """Decode each picture, in order; Pillow leaves the interpreter lock while it does, hence threads."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield from zip(raw, pool.map(lambda item: _look_at(item, resolution), raw), strict=True)


def _look_at(item: _Raw, resolution: int) -> Problem | tuple[int, int, str]:
    try:
        image = decode(item.read())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return Problem(
            item.where, f"more than {limit} megapixels (decompression bomb?)", "shrink it or remove it"
        )
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "it", reason)
        return Problem(item.where, f"cannot be read as a picture ({reason})", "replace it or remove it")
    if min(image.size) < resolution / 2:
        return Problem(
            item.where,
            f"{image.width}x{image.height} pixels is tiny for data.resolution {resolution}",
            f"use {math.ceil(resolution / 2)} pixels or more on each side, or a smaller resolution",
        )
    digest = hashlib.blake2b(f"{image.width}x{image.height}".encode() + image.tobytes(), digest_size=16)
    return image.width, image.height, digest.hexdigest()


def _locate(path: str) -> tuple[str, Path]:
    """What `path` is: a plain folder, an imagefolder or parquet for `datasets`, or a hub id."""
    place = Path(resolve_path(path)).expanduser()
    if place.is_dir():
        if any((place / name).is_file() for name in METADATA):
            return "imagefolder", place
        pictures = any(item.suffix.lower() in SUFFIXES for item in place.rglob("*"))
        if not pictures and any(place.rglob("*.parquet")):
            return "parquet", place
        return "folder", place
    if place.is_file():
        if place.suffix == ".parquet":
            return "parquet", place
        raise DataError("is a file", hint="give a folder of pictures, a .parquet file or a hub id")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return "hub", place
    siblings = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    nearest = did_you_mean(place.name, siblings)
    raise DataError(
        "no such folder", hint=nearest or "give a folder of pictures, a .parquet file or a hub id"
    )


def _folder(root: Path, *, needs_caption: bool) -> Iterator[_Raw]:
    files = sorted(
        item
        for item in root.rglob("*")
        if item.suffix.lower() in SUFFIXES
        and item.is_file()
        and not any(part.startswith(".") for part in item.relative_to(root).parts)
    )
    for file in files:
        caption, problem = _caption(file) if needs_caption else ("", None)
        yield _Raw(file.relative_to(root).as_posix(), str(file), file.read_bytes, caption, problem)


def _caption(picture: Path) -> tuple[str, Problem | None]:
    """Text beside a picture."""
    file = picture.with_suffix(".txt")
    try:
        text = " ".join(file.read_bytes().decode("utf-8-sig").split())
    except FileNotFoundError:
        return "", Problem(
            str(picture), f"no caption: {file.name} is missing", f"write what it shows into {file.name}"
        )
    except UnicodeDecodeError as error:
        return "", Problem(str(file), f"not UTF-8 (byte {error.start})", "save it as UTF-8")
    except OSError as error:
        return "", Problem(str(file), f"cannot be read ({error.strerror})", "make it readable")
    if not text:
        return "", Problem(str(file), "the caption is empty", "write what the picture shows into it")
    return text, None


def _dataset(
    kind: str,
    path: str,
    place: Path,
    split: str,
    image_column: str | None,
    caption_column: str | None,
    needs_caption: bool,
) -> Iterator[_Raw]:
    """Rows of an imagefolder, parquet files or a hub data set, undecoded, so that we meet the broken ones."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind == "imagefolder":
            loaded = datasets.load_dataset("imagefolder", data_dir=str(place), split=split)
        elif kind == "parquet":
            files = (
                [str(place)] if place.is_file() else sorted(str(item) for item in place.rglob("*.parquet"))
            )
            loaded = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # datasets raises anything from ValueError to its own and the hub's exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if kind == "hub":
            raise DataError(
                f"neither a folder here nor a data set that could be loaded from the hub ({reason})",
                hint="check the spelling, the split and the connection",
            ) from error
        raise DataError(
            f"`datasets` cannot load it ({reason})", hint="check the metadata file and data.split"
        ) from error

    features: dict[str, Any] = dict(loaded.features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    picture = _column("image_column", image_column, pictures, features, ["image"])
    texts = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    text = (
        _column("caption_column", caption_column, texts, features, ["text", "caption"])
        if needs_caption
        else None
    )
    if picture not in pictures:
        loaded = loaded.cast_column(picture, datasets.Image())
    loaded = loaded.cast_column(picture, datasets.Image(decode=False))
    for row in range(len(loaded)):
        yield _row(loaded, row, path, place, picture, text)


def _row(loaded: Any, row: int, path: str, place: Path, picture: str, text: str | None) -> _Raw:
    item = loaded[row]
    cell = item[picture] or {}
    file = cell.get("path") or ""
    name = f"{row:06d}"
    if file and Path(file).is_absolute() and Path(file).is_relative_to(place):
        name = Path(file).relative_to(place).as_posix()
    where = f"{path}[{row}]" if name == f"{row:06d}" else str(place / name)

    def read() -> bytes:
        cell = loaded[row][picture]
        if not cell:
            raise OSError("the row has no picture")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    caption = " ".join(str(item[text] or "").split()) if text is not None else ""
    problem = None
    if text is not None and not caption:
        problem = Problem(where, f"no caption in column {text!r}", "write what the picture shows there")
    return _Raw(name, where, read, caption, problem)


def _column(
    key: str, asked: str | None, fitting: list[str], features: dict[str, Any], usual: list[str]
) -> str:
    """The column to use: the one asked for, else a usual name, else the only fitting one."""
    if asked is not None:
        if asked not in features:
            nearest = did_you_mean(asked, list(features)) or f"columns: {', '.join(features)}"
            raise DataError(f"data.{key}: no column {asked!r}", hint=nearest)
        return asked
    for name in [*(name for name in usual if name in fitting), *(fitting if len(fitting) == 1 else [])]:
        return name
    raise DataError(
        f"cannot tell which column to use (columns: {', '.join(features)})", hint=f"set data.{key}"
    )


def _hold_out(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split off a fraction, chosen by a hash of the id: neither the order nor the run's seed matters."""
    count = max(1, round(fraction * len(samples)))
    ranked = sorted(samples, key=lambda sample: hashlib.blake2b(sample.id.encode()).digest())
    chosen = {sample.id for sample in ranked[:count]}
    return [s for s in samples if s.id not in chosen], [s for s in samples if s.id in chosen]


def _repeated(samples: Sequence[Sample], others: Sequence[Sample], what: str) -> list[Problem]:
    known = {sample.content: sample.where for sample in samples}
    return [
        Problem(other.where, f"same picture as {what} ({known[other.content]})", "remove one of the two")
        for other in others
        if other.content in known
    ]
