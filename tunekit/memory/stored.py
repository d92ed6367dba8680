"""How the weights of a base lie on disk, as far as that decides what reading them takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunekit.families.loading import weight_files
from tunekit.families.sizes import Sizes
from tunekit.families.weights import entries
from tunekit.resources import Source

NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Stored:
    """How the weights of a network lie on disk.

    Attributes:
        dtype: "fp32", "bf16" or "fp16"; None where a network is not read but made, in float32.
        largest: bytes of the largest file; None where it is not here.
        packs: whether weights can be packed while they are read, tensor by tensor.
    """

    dtype: str | None
    largest: int | None = None
    packs: bool = True


def stored(sizes: Sizes, source: Source) -> dict[str, Stored]:
    """How each network of a base is stored; of what is not here, as it is usual."""
    if source.name == "tiny":
        return {part.name: Stored(dtype=None, packs=False) for part in sizes.networks}
    folder = source.path
    usual = Stored("fp16" if source.variant == "fp16" else "fp32", packs=folder is None)
    if folder is None:
        return {part.name: usual for part in sizes.networks}
    if folder.is_file():
        dtype = _dtype(folder) if folder.suffix == ".safetensors" else "fp32"
        one = Stored(dtype, folder.stat().st_size, packs=False)
        return {part.name: one for part in sizes.networks}

    def found(name: str) -> Stored:
        files = weight_files(folder / name, source.variant)
        largest = max(files, key=lambda file: file.stat().st_size, default=None)
        return usual if largest is None else Stored(_dtype(largest), largest.stat().st_size)

    return {part.name: found(part.name) for part in sizes.networks}


def _dtype(file: Path) -> str:
    """The type of most tensors in a file.

    Raises:
        ModelError: it is damaged.
    """
    kinds = [entry.dtype for entry in entries([file]).values()]
    known = [NAMES[kind] for kind in kinds if kind in NAMES]
    return max(set(known), key=known.count, default="fp32")
