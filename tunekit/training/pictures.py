"""Which pictures a run was begun with (pictures.json): a run that cannot go on names what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunekit.data.samples import Indexed, Sample
from tunekit.errors import ArtifactError
from tunekit.files import write_json
from tunekit.records import Record, read

NAME = "pictures.json"
_NAMED = 5

Groups = Mapping[str, Sequence[Sample]]
"""Part of an identity -> the pictures it is the hash of."""


class PicturesRecord(Record):
    """pictures.json: part of an identity -> id -> hashes of the pixels and of the caption.

    Of parquet files and shards: file -> hashes of all ids and pictures in it, and of all captions.
    """

    version: int
    groups: dict[str, dict[str, list[str]]]


def keep(folder: Path, groups: Groups) -> None:
    """Write down the pictures of a run, unless they are already.

    Raises:
        OutputError: it cannot be written.
    """
    found = {key: _hashes(samples) for key, samples in groups.items()}
    if _kept(folder) != found:
        write_json(folder / NAME, {"version": 1, "groups": found})


def changes(folder: Path, groups: Groups) -> dict[str, str]:
    """What has changed since, in words, by part of an identity; nothing where nobody knows how it was."""
    before = _kept(folder)
    return {
        key: words
        for key, found in groups.items()
        if key in before and (words := _difference(before[key], _hashes(found)))
    }


def _kept(folder: Path) -> dict[str, dict[str, list[str]]]:
    try:
        return read(folder / NAME, PicturesRecord).groups
    except (ArtifactError, FileNotFoundError):
        return {}


def _hashes(samples: Sequence[Sample]) -> dict[str, list[str]]:
    if isinstance(samples, Indexed):  # a line for each file: there may be millions of pictures
        return samples.hashes()
    return {sample.id: [sample.content, _hash(sample.caption)] for sample in samples}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _difference(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> str:
    both = before.keys() & now.keys()
    groups = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "other pixels in": {name for name in both if before[name][:1] != now[name][:1]},
        "another caption of": {name for name in both if before[name][1:] != now[name][1:]},
    }
    return "; ".join(f"{what} {_listed(names)}" for what, names in groups.items() if names)


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:_NAMED]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")
