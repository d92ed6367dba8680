"""GGUF files: what lies in them, and a tensor as floats.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
The header is read here, so that a damaged one costs no more than its own size; what the blocks of a quantized
type mean is the business of the package `gguf`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tunekit.errors import ModelError, require

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
ARCHITECTURE = "general.architecture"
SHAPE = "comfy.gguf.orig_shape."
"""Where the shape of a tensor is kept that was laid out in another one to be quantized."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of settings that are numbers -> what `struct` calls them."""
_TEXT, _LIST = 8, 9
_MOST_NAMED = 10**6
"""Tensors, or settings: a header that counts more is a damaged one."""
_CUT = "the file is cut, damaged or of another kind: load it again from where it came"


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        kind: number of its type.
        shape: rows first, as torch has it.
        laid: the shape in which it is stored.
        start: its first byte in the file.
    """

    kind: int
    shape: tuple[int, ...]
    laid: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, and its tensors by name."""

    settings: dict[str, Any]
    tensors: dict[str, Stored]


def header(file: Path) -> Header:
    """Reads the header of a file; no weight is read.

    Raises:
        ModelError: it is damaged, cut, or of another kind.
    """
    try:
        with file.open("rb") as opened:
            return _Reader(opened, file.stat().st_size).header()
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"cannot be read as GGUF: {error}", where=str(file), hint=_CUT) from error


class _Reader:
    def __init__(self, opened: BinaryIO, size: int) -> None:
        self._file, self._size = opened, size

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, and {' and '.join(map(str, VERSIONS))} are known")
        tensors, settings = self._number("Q"), self._number("Q")
        if max(tensors, settings) > _MOST_NAMED:
            raise ValueError(f"{tensors} tensors and {settings} settings")
        said = {self._text(): self._value(self._number("I")) for _ in range(settings)}
        listed = [self._tensor() for _ in range(tensors)]
        alignment = said.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{ALIGNMENT} is {alignment!r}")
        begin = -(-self._file.tell() // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, laid, kind, offset in listed:
            if name in found:
                raise ValueError(f"{name} is there twice")
            shape = said.get(SHAPE + name, laid)
            if not all(isinstance(side, int) and side >= 0 for side in shape):
                raise ValueError(f"{name} is {shape!r}")
            if math.prod(shape) != math.prod(laid):
                raise ValueError(f"{name} is {list(shape)}, and stored as {list(laid)}")
            found[name] = Stored(kind, tuple(shape), laid, begin + offset)
        return Header(said, found)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, sides = self._text(), self._number("I")
        if sides > 8:
            raise ValueError(f"{name} has {sides} sides")
        laid = tuple(reversed([self._number("Q") for _ in range(sides)]))
        return name, laid, self._number("I"), self._number("Q")

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise ValueError("it ends within its header")
        return self._file.read(count)

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST and depth < 4:
            inner, count = self._number("I"), self._number("Q")
            if inner in _NUMBERS:
                size = struct.calcsize(_NUMBERS[inner])
                return struct.unpack(f"<{count}{_NUMBERS[inner]}", self._bytes(count * size))
            if count > self._size:
                raise ValueError("a list that is longer than the file")
            return [self._value(inner, depth + 1) for _ in range(count)]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        raise ValueError(f"a setting of the kind {kind}")


def _package(name: str) -> Any:
    return require(name, extra="gguf", why="GGUF files need")


def _kinds() -> Any:
    return _package("gguf.constants").GGMLQuantizationType


def type_names(file: Path, found: Header) -> dict[str, str]:
    """The name of each tensor's type, such as "Q4_K".

    Raises:
        ModelError: types that cannot be read as floats, which are named.
        MissingPackageError: without the package `gguf`.
    """
    kinds = [stored.kind for stored in found.tensors.values()]
    names, unread = {}, set()
    for kind in sorted(set(kinds)):
        names[kind] = f"number {kind}"
        try:
            known = _kinds()(kind)
            names[kind] = str(known.name)
            _, row = _block(known)
            _floats(bytes(row), known, row)
        except (ValueError, NotImplementedError):
            unread.add(kind)
    if unread:
        count, listed = sum(kind in unread for kind in kinds), (names[kind] for kind in sorted(unread))
        raise ModelError(
            f"{count} of its tensors are of a type that cannot be read: {', '.join(listed)}",
            where=str(file),
            hint="use a file in another type, such as Q8_0 or Q4_K_M, or a newer gguf: pip install -U gguf",
        )
    size = file.stat().st_size
    for name, stored in found.tensors.items():
        many, bytes_each = _block(_kinds()(stored.kind))
        if stored.laid and stored.laid[-1] % many:
            raise ModelError(f"{name} has rows of {stored.laid[-1]}, no multiple of {many}", where=str(file))
        if stored.start + math.prod(stored.laid) // many * bytes_each > size:
            raise ModelError(f"it ends before {name}", where=str(file), hint=_CUT)
    return {name: names[stored.kind] for name, stored in found.tensors.items()}


def _block(kind: Any) -> tuple[int, int]:
    """Elements and bytes of a block."""
    many, size = _package("gguf.constants").GGML_QUANT_SIZES[kind]
    return int(many), int(size)


def _floats(raw: bytes, kind: Any, row: int) -> Tensor:
    """Quantized rows of `row` bytes each, as float32 [rows, elements]."""
    import numpy as np

    made = _package("gguf.quants").dequantize(np.frombuffer(raw, np.uint8).reshape(-1, row), kind)
    return torch.from_numpy(made if made.flags.writeable else made.copy())


@contextmanager
def reading(file: Path) -> Iterator[Callable[[str, tuple[int, int] | None], Tensor]]:
    """Gives a function of a tensor's name and of the rows wanted of it (None: all), which gives floats.

    float32; of a tensor that is stored in bfloat16 or float16, that.
    """
    found = header(file)
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def get(name: str, rows: tuple[int, int] | None) -> Tensor:
            stored = found.tensors[name]
            kind = _kinds()(stored.kind)
            many, size = _block(kind)
            shape = stored.shape
            whole = math.prod(stored.laid) // many * size
            begin, end = 0, whole
            if rows is not None and shape == stored.laid:  # rows are whole blocks
                begin, end = (edge * whole // max(1, shape[0]) for edge in rows)
                shape = (rows[1] - rows[0], *shape[1:])
            row = stored.laid[-1] // many * size if len(stored.laid) > 1 else end - begin
            values = _floats(mapped[stored.start + begin : stored.start + end], kind, row)
            values = values.reshape(shape).to(narrow.get(kind.name, torch.float32))
            return values[slice(*rows)] if rows is not None and stored.shape != stored.laid else values

        yield get
