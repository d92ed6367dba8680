"""The pictures of every version of a model, side by side, and where they differ from their references.

A step that compares writes pictures of a reference and of a model, from the same prompts and seeds; the label
of its first picture names the reference. Steps that drew the same prompts and seeds share a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.artifacts import Step
from tunekit.provenance import shown
from tunekit.report.pictures import Album, Difference

if TYPE_CHECKING:
    from tunekit.passes.metrics import Metric

Key = tuple[str, int]
"""A prompt and a seed."""
MOST_COLUMNS = 8


@dataclass
class _Version:
    """A row.

    Attributes:
        label: the model and its runtime, as its step says.
        model: folder of the step that made it; empty for a reference that nobody looked at.
        reference: what its step compared it with; None for a reference.
        figures: of that comparison.
        runtimes: over which these are the worst.
        files: its pictures.
    """

    label: str
    model: str
    reference: _Version | None = None
    figures: str = ""
    runtimes: int = 1
    files: dict[Key, Path] = field(default_factory=dict)


@dataclass
class _Table:
    keys: dict[Key, None] = field(default_factory=dict)
    versions: list[_Version] = field(default_factory=list)

    def find(self, label: str, model: str | None = None) -> _Version | None:
        """The latest version of this label, of this model if it is said."""
        found = (v for v in reversed(self.versions) if v.label == label and model in (None, v.model))
        return next(found, None)


def tables(
    models: Sequence[tuple[Step, Sequence[Step]]], root: Path, album: Album, columns: Sequence[Metric]
) -> list[dict[str, Any]]:
    """A table for each set of prompts and seeds.

    Args:
        models: each step that made a model, with the steps that looked at it.
        root: the run folder.
        album: gives the pictures.
        columns: figures that are named beside a version.

    Returns:
        `{"heads", "note", "references", "rows"}`; a row has `label`, `note` and `cells`: None, or `alt` with
        either `image` or `number`, a picture's place in `references`, in which each that is looked at twice
        stands once, and `shape`, its width and height; `under`, the number of the picture that it is compared
        with; `difference`, a line about a map.
    """
    return [_drawn(table, album) for table in _gathered(models, root, columns)]


def _gathered(
    models: Sequence[tuple[Step, Sequence[Step]]], root: Path, columns: Sequence[Metric]
) -> list[_Table]:
    found: list[_Table] = []
    for made, looked_at in models:
        for step in (made, *looked_at):
            labelled: dict[str, dict[Key, Path]] = {}
            for picture in step.pictures:
                key = (str(picture.get("prompt", "")), int(picture.get("seed", 0)))
                file = root / step.artifact / str(picture["file"])
                labelled.setdefault(str(picture["label"]), {}).setdefault(key, file)
            if not labelled:
                continue
            keys = {key: None for files in labelled.values() for key in files}
            table = next((one for one in found if keys.keys() & one.keys.keys()), None)
            if table is None:
                table = _Table()
                found.append(table)
            table.keys |= keys
            _add(table, labelled, made.artifact, _figures(step, columns))
    return found


def _add(table: _Table, labelled: Mapping[str, dict[Key, Path]], model: str, figures: str) -> None:
    """What one step drew. What an earlier step drew of the same model, on the same runtime, is that."""
    first, *others = labelled
    reference = table.find(first)
    if reference is None:
        reference = _Version(first, "")
        table.versions.append(reference)
    for label in others:
        version = table.find(label, model)
        if version is None:
            version = _Version(label, model, reference)
            table.versions.append(version)
        version.figures = figures
        version.runtimes = len(others)
        for key, file in labelled[label].items():
            version.files.setdefault(key, file)
    for key, file in labelled[first].items():
        reference.files.setdefault(key, file)


def _figures(step: Step, columns: Sequence[Metric]) -> str:
    said = (
        f"{metric.column} {metric.format(value)}"
        for metric in columns
        if metric.name != "size_bytes" and (value := step.metrics.get(metric.name)) is not None
    )
    return ", ".join(said)


def _drawn(table: _Table, album: Album) -> dict[str, Any]:
    keys = list(table.keys)[:MOST_COLUMNS]
    references: list[str] = []
    numbers: dict[tuple[int, Key], int] = {}
    for version in table.versions:
        if version.reference is None or any(other.reference is version for other in table.versions):
            for key in keys:
                if key in version.files and (url := album.show(version.files[key])):
                    numbers[id(version), key] = len(references)
                    references.append(url)
    heads = [f"{shown(prompt)} (seed {seed})" for prompt, seed in keys]
    rows: list[dict[str, Any]] = []
    for index, version in enumerate(table.versions):
        rows.append(_row(version, keys, heads, numbers, album))
        for reference, what in _compared_with(version, table.versions[:index]):
            maps = [
                album.difference(version.files[key], reference.files[key])
                if key in version.files and key in reference.files
                else None
                for key in keys
            ]
            if any(maps):
                rows.append(_map_row(maps, version, reference, what, heads))
    missing = len(table.keys) - len(keys)
    return {
        "heads": heads,
        "note": f"{len(keys)} of {len(table.keys)} pictures are shown." if missing else "",
        "references": references,
        "rows": rows,
    }


def _compared_with(version: _Version, earlier: Sequence[_Version]) -> Iterator[tuple[_Version, str]]:
    """Its reference, and the model before it where that is another one."""
    if version.reference is None:
        return
    yield version.reference, "difference to"
    before = next((one for one in reversed(earlier) if one.model not in ("", version.model)), None)
    if before is not None and before is not version.reference and before.label != version.reference.label:
        yield before, "difference to the step before,"


def _row(
    version: _Version,
    keys: Sequence[Key],
    heads: Sequence[str],
    numbers: Mapping[tuple[int, Key], int],
    album: Album,
) -> dict[str, Any]:
    reference = version.reference
    cells: list[dict[str, Any] | None] = []
    for key, head in zip(keys, heads, strict=True):
        cell: dict[str, Any] = {"alt": f"{version.label}: {head}"}
        if (number := numbers.get((id(version), key))) is not None:
            cell |= {"number": number, "shape": album.shape(version.files[key])}
        elif key in version.files and (url := album.show(version.files[key])):
            cell["image"] = url
        else:
            cells.append(None)
            continue
        if reference and (under := numbers.get((id(reference), key))) is not None:
            cell["under"] = under
        cells.append(cell)
    note = "reference"
    if reference:
        worst = f", the worst of {version.runtimes} runtimes" if version.runtimes > 1 else ""
        note = f"to {reference.label}{worst}: {version.figures}" if version.figures else ""
    return {"label": version.label, "note": note, "cells": cells}


def _map_row(
    maps: Sequence[Difference | None],
    version: _Version,
    reference: _Version,
    what: str,
    heads: Sequence[str],
) -> dict[str, Any]:
    known = [one for one in maps if one]
    largest, mean = max(one.largest for one in known), sum(one.mean for one in known) / len(known)
    return {
        "label": f"{what} {reference.label}",
        "note": f"max {largest}, mean {mean:.2f}",
        "cells": [
            {
                "image": one.image,
                "alt": f"{version.label}, {what} {reference.label}: {head}",
                "difference": f"max {one.largest}, mean {one.mean:.2f}",
            }
            if one
            else None
            for one, head in zip(maps, heads, strict=True)
        ],
    }
