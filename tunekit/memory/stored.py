"""How the weights of a base lie on disk, as far as that decides what reading them takes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tunekit.families.loading import weight_files
from tunekit.families.single_file import held
from tunekit.families.sizes import Sizes
from tunekit.families.weights import PICKLES, Entry, entries
from tunekit.resources import Source

NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
OTHER = "other"
"""What no run holds weights in: floats of 8 bits, blocks of a few."""


@dataclass(frozen=True)
class Stored:
    """How the weights of a network lie on disk.

    Attributes:
        dtype: "fp32", "bf16", "fp16" or "other"; None where a network is not read but made, in float32.
        largest: bytes of the largest file; None where it is not here.
        packs: whether weights can be packed while they are read, tensor by tensor.
    """

    dtype: str | None
    largest: int | None = None
    packs: bool = True


def stored(sizes: Sizes, source: Source) -> dict[str, Stored]:
    """How each network of a base is stored; of what is not here, as it is usual.

    Raises:
        ModelError: a damaged file.
    """
    if source.name == "tiny":
        return {part.name: Stored(dtype=None, packs=False) for part in sizes.networks}
    path, rest = source.path, source.rest
    published = "fp16" if source.variant == "fp16" else sizes.family.facts.stored
    usual = Stored(published, packs=path is None)
    found = stored(sizes, rest) if rest else {part.name: usual for part in sizes.networks}
    if path is None:
        return found
    if path.is_file():
        return found | _in_file(path, sizes)
    for part in sizes.networks:
        files = weight_files(path / part.name, source.variant)
        if files:
            largest = max(files, key=lambda file: file.stat().st_size)
            found[part.name] = Stored(_usual(entries([largest]).values()), largest.stat().st_size)
    return found


def _in_file(file: Path, sizes: Sizes) -> dict[str, Stored]:
    """The networks that a single file has."""
    size = file.stat().st_size
    if file.suffix in PICKLES:
        return {part.name: Stored("fp32", size, packs=False) for part in sizes.networks}
    listed = entries([file])
    parts = held(listed, sizes.family.facts)
    return {
        name: Stored(_usual([entry for key, entry in listed.items() if key.startswith(prefix)]), size)
        for name, prefix in parts.items()
    }


def _usual(listed: Collection[Entry]) -> str:
    """The type of most numbers."""
    counts: dict[str, int] = {}
    for entry in listed:
        if entry.is_float:
            kind = NAMES.get(entry.dtype, OTHER)
            counts[kind] = counts.get(kind, 0) + math.prod(entry.shape)
    return max(counts, key=lambda kind: counts[kind], default="fp32")
