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
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data.decoding import decode
from tunekit.data.files import SUFFIXES, Problem, Raw, folder
from tunekit.data.rows import METADATA, dataset_rows
from tunekit.errors import DataError, did_you_mean
from tunekit.resources import resolve_path


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
            raw = list(folder(place, needs_caption=caption is None))
        else:
            raw = list(dataset_rows(kind, path, place, split, image_column, caption_column, caption is None))
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


def _look(raw: Sequence[Raw], resolution: int) -> Iterator[tuple[Raw, Problem | tuple[int, int, str]]]:
    """Decode each picture, in order; Pillow leaves the interpreter lock while it does, hence threads."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield from zip(raw, pool.map(lambda item: _look_at(item, resolution), raw), strict=True)


def _look_at(item: Raw, resolution: int) -> Problem | tuple[int, int, str]:
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
