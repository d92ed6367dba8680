"""Pictures and captions from a folder or Hugging Face `datasets`, all looked at before anything starts.

    scan = scan_data(config.data)
    scan.notes                        # what lies there and is not used, and what else is to be known
    scan.check()                      # one DataError that lists every problem
    scan.samples, scan.held_out

A folder is read recursively; the caption of ``a/b.jpg`` is the text of ``a/b.txt`` (`files`), unless a
``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` lies there or above it. A ``.parquet`` file, a
folder of them or the id of a data set on the hub has its pictures and captions in rows (`rows`).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from tunekit.config import DataConfig, DreamboothData
from tunekit.data import rows
from tunekit.data.decoding import SUFFIXES, PictureError, decode
from tunekit.data.files import (
    Ignored,
    Listing,
    Problem,
    Raw,
    captioned,
    in_split,
    nearest,
    shown,
    told,
    unused,
    walk,
    why_not,
)
from tunekit.data.remembered import Looked, Remembered
from tunekit.data.samples import Sample
from tunekit.data.shapes import bucket_for
from tunekit.errors import DataError
from tunekit.progress import Progress
from tunekit.resources import resolve_path

__all__ = ["Sample", "Scan", "scan_data"]

_SHOWN = 20
"""So many problems of a kind are listed, the others counted."""
_KEPT = 0.5
"""A picture that loses more to the crop is worth a word."""


@dataclass(frozen=True)
class Scan:
    """Everything found under a data section."""

    samples: Sequence[Sample]
    """In the order of the source; `Stored` where they are rows or members of shards."""
    problems: tuple[Problem, ...] = ()
    held_out: Sequence[Sample] = ()
    """Validation pictures."""
    prior: tuple[Sample, ...] = ()
    """Class pictures that exist already (DreamBooth)."""
    notes: tuple[str, ...] = ()
    """Lines for people: what lies there and is not used, and what else is not as they may think."""

    def check(self) -> None:
        """Raise one DataError that lists all problems, of each kind the first ones."""
        if not self.problems:
            return
        kinds: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault((problem.kind, "" if problem.kind else problem.what), []).append(problem)
        lines = []
        for (kind, what), found in kinds.items():
            lines += [f"  {problem}" for problem in found[:_SHOWN]]
            if len(found) > _SHOWN:
                fixes = {problem.fix for problem in found}  # some name one file: the kind says it for all
                remedy = f"; {fixes.pop()}" if len(fixes) == 1 else ""
                lines.append(f"  and {len(found) - _SHOWN:,} more: {kind or what}{remedy}")
        count = len(self.problems)
        head = f"{count:,} {'problem' if count == 1 else 'problems'} in the pictures"
        raise DataError("\n".join([f"{head}:", *lines]))


def scan_data(
    data: DataConfig | DreamboothData, *, multiple: int = 8, progress: Progress | None = None
) -> Scan:
    """Look at every picture a data section names, once.

    Args:
        data: the `data:` section of a recipe.
        multiple: that the model's sizes in pixels are divisible by, which decides about crops.
        progress: shows how far it is.

    Returns:
        The usable samples and all problems. A missing or empty folder is a problem too, so `check` lists it
        with the others.
    """
    look = partial(_scan_source, resolution=data.resolution, progress=progress or Progress(quiet=True))
    if isinstance(data, DreamboothData):
        samples, problems, notes = look(data.path, caption=data.instance_prompt, key="instance_prompt")
        prior: list[Sample] = []
        if data.class_prompt is not None and data.class_path is not None:
            prior, more, others = look(data.class_path, caption=data.class_prompt, key="class_prompt")
            problems += more + _repeated(samples, prior, "an instance picture")
            notes += others
        notes += _cropped([*samples, *prior], data.resolution, multiple, many=False)
        return Scan(tuple(samples), tuple(problems), prior=tuple(prior), notes=tuple(notes))
    look = partial(
        look,
        split=data.split,
        columns=(data.image_column, data.caption_column),
        prefix=data.caption_prefix,
    )
    samples, problems, notes = look(data.path)
    held_out: list[Sample] = []
    if isinstance(data.validation, str):
        held_out, more, others = look(data.validation)
        problems += more + _repeated(samples, held_out, "a training picture")
        notes += [line for line in others if line not in notes]
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
    notes += _cropped([*samples, *held_out], data.resolution, multiple, many=data.buckets)
    return Scan(tuple(samples), tuple(problems), tuple(held_out), notes=tuple(notes))


def _cropped(samples: Sequence[Sample], resolution: int, multiple: int, *, many: bool) -> list[str]:
    """Which pictures lose most of themselves to the crop."""
    found = []
    for sample in samples:
        width, height = bucket_for(sample.width, sample.height, resolution, multiple, many=many)
        ratio = sample.width * height / (sample.height * width)
        kept = min(ratio, 1 / ratio)
        if kept < _KEPT:
            size = f"{sample.width}x{sample.height}"
            found.append((kept, f"{sample.where} ({size}: {kept:.0%} is kept, as {width}x{height})"))
    if not found:
        return []
    worst = [text for _, text in sorted(found)[:3]]
    count = f"{len(found)} {'picture loses' if len(found) == 1 else 'pictures lose'}"
    return [
        f"{count} more than half to the crop, and the caption stays: {', '.join(worst)}"
        f"{', ...' if len(found) > len(worst) else ''}; cut them into pieces that are less long"
    ]


# Reading


def _scan_source(
    path: str,
    *,
    resolution: int,
    split: str = "train",
    columns: tuple[str | None, str | None] = (None, None),
    prefix: str = "",
    caption: str | None = None,
    key: str = "",
    progress: Progress,
) -> tuple[list[Sample], list[Problem], list[str]]:
    """Read one source.

    Args:
        caption: every picture has it, and no other is looked for.
        key: of `data:` that it comes from.
    """
    try:
        with progress.phase(f"looking through {path}"):
            place, listing = _list(path, split, columns, key)
    except DataError as error:
        return [], [Problem(path, error.message, error.hint or "correct the path")], []
    except OSError as error:  # a folder above it that may not be gone into, a name that is too long
        return [], [Problem(path, f"cannot be read ({why_not(error)})", "correct the path")], []
    samples: list[Sample] = []
    problems = listing.problems
    ignored = listing.ignored
    seen: dict[str, str] = {}
    if prefix and not prefix[-1].isspace():
        prefix += " "
    for item, outcome in _look(listing.raw, resolution, Remembered(place), progress):
        if isinstance(outcome, Ignored):
            ignored.append(outcome)
            continue
        if isinstance(outcome, Problem):
            problems.append(outcome)
        if item.problem is not None:
            problems.append(item.problem)
        if isinstance(outcome, Problem) or item.problem is not None:
            continue
        width, height, content = outcome
        if content in seen:
            what, fix = f"same picture as {seen[content]}", "remove one of the two"
            problems.append(Problem(item.where, what, fix, "same picture as another"))
            continue
        seen[content] = item.where
        text = caption if caption is not None else prefix + item.caption
        samples.append(Sample(item.id, text, width, height, content, item.where, item.read))
    notes = [*told(path, ignored, len(samples)), *listing.notes]
    if not samples and not problems:
        why = "".join(f"\n  {line}" for line in notes)
        looked = f"looked for {', '.join(sorted(SUFFIXES))} files in it{why}"
        problems.append(Problem(path, "no pictures found", looked))
    return samples, problems, notes


def _list(path: str, split: str, columns: tuple[str | None, str | None], key: str) -> tuple[Path, Listing]:
    """What a source has, and where it is.

    Raises:
        DataError: no such source, split or column.
    """
    place, needs_caption = Path(resolve_path(path)).expanduser(), not key
    if place.is_file():
        if place.suffix != ".parquet":
            raise DataError("is a file", hint="give a folder of pictures, a .parquet file or a hub id")
        return place, rows.parquet(place, [place], split, columns, needs_caption=needs_caption)
    if not place.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
            return place, rows.hub(path, split, columns, needs_caption=needs_caption)
        hint = nearest(place) or "give a folder of pictures, a .parquet file or a hub id"
        raise DataError("no such folder", hint=hint)
    whole = walk(place)
    if whole.parquet and not whole.metadata and not any(_suffix(file) in SUFFIXES for file in whole.pictures):
        made = rows.parquet(place, whole.parquet, split, columns, needs_caption=needs_caption)
        beside = [Ignored(shown(file), "pictures beside parquet files") for file in whole.pictures]
        whole.parquet = []
        made.problems, made.ignored = whole.problems + made.problems, unused(whole) + beside + made.ignored
        return place, made
    tree = in_split(whole, split)
    made, decided = rows.metadata(tree, *columns, needs_caption=needs_caption)
    made.raw += captioned(
        tree, [file for file in tree.pictures if file not in decided], needs_caption=needs_caption
    )
    if tree is whole and split != "train" and not (place / split).is_dir():
        made.notes.append(f"data.split={split} has no effect: there are no sub-folders of splits in {path}")
    for name, column in zip(("image_column", "caption_column"), columns, strict=True):
        if column is not None and not tree.metadata:
            made.notes.append(f"data.{name}={column} has no effect: there is no metadata file in {path}")
    fix = ""
    unread = "captions beside pictures that a metadata file decides about"
    if key:
        unread = f"captions, as data.{key} is that of all pictures"
        fix = "recipe: lora reads captions"
        decided = set(tree.pictures)
        if tree.metadata:
            made.notes.append(
                f"captions of {shown(tree.metadata[0])} are not read: data.{key} is that of all"
            )
    made.problems = tree.problems + made.problems
    made.ignored = unused(tree, decided, unread, fix) + made.ignored
    return place, made


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _look(
    raw: Sequence[Raw], resolution: int, known: Remembered, progress: Progress
) -> Iterator[tuple[Raw, Problem | Ignored | Looked]]:
    """Decode each picture, in order; Pillow leaves the interpreter lock while it does, hence threads."""
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` raises instead
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        try:
            found = pool.map(lambda item: _look_at(item, resolution, known), raw)
            with progress.phase("looking at pictures", len(raw)) as phase:
                for pair in zip(raw, found, strict=True):
                    yield pair
                    phase.advance()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    known.save()


def _look_at(item: Raw, resolution: int, known: Remembered) -> Problem | Ignored | Looked:
    stamp = known.stamp(item)
    looked = known.get(item, stamp)
    if looked is None:
        try:
            image = decode(item.read())
        except PictureError as error:
            if item.foreign:
                return Ignored(
                    item.where, f"{_suffix(Path(item.where))} files, which are not read", item.foreign
                )
            what = f"cannot be read as a picture ({error})"
            return Problem(
                item.where, what, "replace it, shrink it or remove it", "cannot be read as a picture"
            )
        except OSError as error:
            what = f"cannot be read ({why_not(error)})"
            return Problem(item.where, what, "make it readable, or remove it", "cannot be read")
        pixels = f"{image.width}x{image.height}".encode() + image.tobytes()
        digest = hashlib.blake2b(pixels, digest_size=16)
        looked = Looked(image.width, image.height, digest.hexdigest())
        known.put(item, stamp, looked)
    if min(looked.width, looked.height) < resolution / 2:
        return Problem(
            item.where,
            f"{looked.width}x{looked.height} pixels is tiny for data.resolution {resolution}",
            f"use {math.ceil(resolution / 2)} pixels or more on each side, or a smaller resolution",
            "tiny for data.resolution",
        )
    return looked


def _hold_out(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Split off a fraction, chosen by a hash of the id: neither the order nor the run's seed matters."""
    count = max(1, round(fraction * len(samples)))
    ranked = sorted(
        samples, key=lambda sample: hashlib.blake2b(sample.id.encode("utf-8", "surrogateescape")).digest()
    )
    chosen = {sample.id for sample in ranked[:count]}
    return [s for s in samples if s.id not in chosen], [s for s in samples if s.id in chosen]


def _repeated(samples: Sequence[Sample], others: Sequence[Sample], what: str) -> list[Problem]:
    known = {sample.content: sample.where for sample in samples}
    return [
        Problem(
            other.where,
            f"same picture as {what} ({known[other.content]})",
            "remove one of the two",
            f"same picture as {what}",
        )
        for other in others
        if other.content in known
    ]
