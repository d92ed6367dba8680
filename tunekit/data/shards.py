"""Tar files of pictures and captions, as WebDataset has them: members that follow each other and share a key.

`000123.jpg` and `000123.txt` are one sample: the key is a name up to its first dot, what follows says what a
member is. A picture is read where its bytes begin; so a shard is not unpacked, and may not be compressed.
https://huggingface.co/docs/hub/datasets-webdataset
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tunekit.data.decoding import FOREIGN, SUFFIXES
from tunekit.data.files import CAPTION_BYTES, PICTURE_BYTES, Ignored, Problem, check_regular, shown, why_not
from tunekit.data.index import Entry, Part, PartError, Place, file_stamp, stamp
from tunekit.data.rows import caption_of
from tunekit.errors import DataError

_MARKS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = {
    "tgz": "gzip",
    "tbz2": "bzip2",
    "txz": "xz",
    "gz": "gzip",
    "bz2": "bzip2",
    "xz": "xz",
    "zst": "zstd",
}
_BLOCK = 512
"""Tar files are made of such blocks, and end with two that are empty."""
_OPEN = 32
"""Shards that a process keeps open."""
_CAPTIONS = ("txt", "json", "cls")
"""What is a caption where `data.caption_column` does not say so: the first of these that a key has."""
_TEXTS = ("text", "caption")
"""Keys of a .json member that are one."""


class Member(NamedTuple):
    """One file in a shard: its name, its kind (what follows the key, in small letters), its bytes' place."""

    name: str
    key: str
    kind: str
    offset: int
    size: int


class _Handle:
    """A file that stays open as long as anybody reads it."""

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.descriptor)


class _Handles:
    """Shards that are open for reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Handle] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handles, ()

    def read(self, file: Path, wanted: str, offset: int, size: int) -> bytes:
        """Bytes of a shard.

        Raises:
            OSError: it has changed since it was looked at, or cannot be read.
        """
        with self._lock:
            opened = self._open.get(file)
            if opened is None:
                opened = self._open[file] = _Handle(file)
                if len(self._open) > _OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(file)
            if stamp(os.fstat(opened.descriptor)) != wanted:
                self._open.popitem()
                raise OSError("the shard has changed since it was looked at; run again")
            if not hasattr(os, "pread"):  # Windows
                os.lseek(opened.descriptor, offset, os.SEEK_SET)
                data = os.read(opened.descriptor, size)
        if hasattr(os, "pread"):
            data = os.pread(opened.descriptor, size, offset)
        if len(data) < size:
            raise OSError("the shard ends before it")
        return data


@dataclass(frozen=True)
class Shards:
    """Tar files as a source.

    Attributes:
        title: as the config names them.
        files: in order.
        image: kind of the members that are the pictures, where it was asked for.
        caption: kind of the members that are captions, or key of a .json member.
    """

    title: str
    files: tuple[Path, ...]
    image: str | None = None
    caption: str | None = None
    needs_caption: bool = True
    _handles: _Handles = field(default_factory=_Handles, compare=False, repr=False)

    repeats = False

    @property
    def settings(self) -> Sequence[str | None]:
        """See `index.Source`."""
        return self.image, self.caption, str(self.needs_caption)

    def parts(self) -> list[Part]:
        """See `index.Source`."""
        found = []
        for number, file in enumerate(self.files):
            try:
                check_regular(file)
                found.append(Part(shown(file), os.path.abspath(file), file_stamp(file), number))  # noqa: PTH100
            except OSError as error:
                raise DataError(f"cannot be read ({why_not(error)})", where=shown(file)) from error
        return found

    def entries(self, part: Part) -> Iterator[Entry | Problem | Ignored]:
        """See `index.Source`."""
        file = self.files[part.number]
        try:
            with file.open("rb") as opened:
                check_plain(file, opened)
                for _, group in groupby(_members(part.name, opened), key=lambda member: member.key):
                    yield from self._entry(part, list(group))
        except OSError as error:
            problem = Problem(
                part.name, f"cannot be read ({why_not(error)})", "make it readable, or remove it"
            )
            raise PartError(problem) from error

    def _entry(self, part: Part, members: list[Member]) -> Iterator[Entry | Problem | Ignored]:
        """What the members of one key are."""
        pictures = [member for member in members if self._is_picture(member)]
        where = f"{part.name}:{shown(members[0].key)}"
        if len(pictures) > 1:
            names = ", ".join(shown(member.name.rpartition("/")[2]) for member in pictures)
            fix = "keep one of them, or set data.image_column to the suffix of those to use"
            yield Problem(
                where, f"two pictures under one key ({names})", fix, f"two pictures under one key; {fix}"
            )
            return
        if not pictures:
            yield Ignored(where, f"keys without a {self.image or 'picture'}")
            return
        (picture,) = pictures
        if picture.size > PICTURE_BYTES:
            what = f"it has {picture.size:,} bytes, and {PICTURE_BYTES:,} are the most"
            yield Problem(
                f"{part.name}:{shown(picture.name)}", what, "shrink it or remove it", "too many bytes"
            )
            return
        place = picture.offset, picture.size
        text = partial(self._caption, part, members, picture) if self.needs_caption else _no_caption
        yield Entry(picture.name, place, partial(self.read, part, place), text, picture.size)

    def _is_picture(self, member: Member) -> bool:
        if self.image is not None:
            return member.kind == self.image.lower().lstrip(".")
        return "." + member.kind.rpartition(".")[2] in {*SUFFIXES, *FOREIGN}

    def _caption(self, part: Part, members: list[Member], picture: Member) -> tuple[str, Problem | None]:
        """The text of a key, or why there is none."""
        where = f"{part.name}:{shown(picture.name)}"
        kinds = {member.kind: member for member in members}
        asked = self.caption.lower().lstrip(".") if self.caption else None
        keys: tuple[str, ...] = _TEXTS
        wanted = [asked] if asked else list(_CAPTIONS)
        if self.caption and asked not in kinds:
            keys, wanted = (self.caption,), ["json"]
        chosen = next((kinds[kind] for kind in wanted if kind in kinds), None)
        if chosen is None:
            beside = f"beside it (there is {', '.join(sorted({*kinds} - {picture.kind})) or 'nothing'})"
            names = f".{asked}" if asked else ", ".join(f".{kind}" for kind in _CAPTIONS)
            fix = "members of one key follow each other: pack them sorted by name, each with its caption"
            return "", Problem(where, f"no caption: no {names} {beside}", fix, f"no caption; {fix}")
        place = f"{part.name}:{shown(chosen.name)}"
        if chosen.size > CAPTION_BYTES:
            fix = f"{CAPTION_BYTES:,} are the most"
            return "", Problem(
                place, f"the caption has {chosen.size:,} bytes", fix, "the caption has too many bytes"
            )
        try:
            data = self.read(part, (chosen.offset, chosen.size))
            text = data.decode("utf-8-sig")
            if chosen.kind.rpartition(".")[2] != "json":
                return caption_of(text, where, f".{chosen.kind}", place)
            row = json.loads(text)
        except OSError as error:
            return "", Problem(
                place, f"cannot be read ({why_not(error)})", "make it readable", "cannot be read"
            )
        except UnicodeDecodeError as error:
            return "", Problem(place, f"not UTF-8 (byte {error.start})", "save it as UTF-8", "not UTF-8")
        except (ValueError, RecursionError) as error:
            return "", Problem(place, f"no JSON ({str(error)[:100]})", "correct it", "no JSON")
        if not isinstance(row, dict):
            return "", Problem(place, "no JSON object, {...}", "correct it", "no JSON object")
        key = next((key for key in keys if key in row), keys[0])
        return caption_of(row.get(key), where, key, place)

    def read(self, part: Part, place: Place) -> bytes:
        """See `index.Source`."""
        return self._handles.read(self.files[part.number], part.stamp, *place)

    def where(self, part: Part, place: Place, name: str) -> str:
        """See `index.Source`."""
        return f"{part.name}:{shown(name)}"


def _no_caption() -> tuple[str, Problem | None]:
    return "", None


def check_plain(file: Path, opened: BinaryIO) -> None:
    """Refuse a file that is empty or compressed, whatever its name says.

    Raises:
        PartError: it is.
    """
    begin = opened.read(8)
    opened.seek(0)
    if not begin:
        raise PartError(Problem(shown(file), "is empty", "fetch it again, or remove it"))
    for mark, name in _MARKS.items():
        if begin.startswith(mark):
            raise PartError(compressed(file, name))


def compressed(file: Path, name: str = "") -> Problem:
    """The problem of a shard in which no picture can be found without unpacking all before it."""
    name = name or next((kind for part, kind in _SUFFIXES.items() if file.name.lower().endswith(part)), "lz4")
    tool = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd", "lz4": "unlz4"}[name]
    return Problem(
        shown(file),
        f"is compressed ({name}): a picture in it cannot be read without all that stands before it",
        f"unpack it once ({tool} {shown(file)}); pictures are compressed already",
    )


def _members(name: str, opened: BinaryIO) -> Iterator[Member]:
    """The files in a shard, in order; only headers are read.

    Raises:
        PartError: it is no tar file, or is cut off or damaged.
    """
    try:
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 - closed with the file that it reads
    except (tarfile.TarError, ValueError) as error:
        raise PartError(Problem(name, f"no tar file ({error})", "fetch it again, or remove it")) from error
    end = opened.seek(0, os.SEEK_END)
    at = 0
    while True:
        opened.seek(at)
        block = opened.read(_BLOCK)
        plain = _plain(block)
        if plain is not None:
            path, size, offset = *plain, at + _BLOCK
        else:  # a long name, a folder, a link, or the end: tarfile knows them all
            tar.offset, tar.firstmember = at, None  # type: ignore[attr-defined]
            opened.seek(at)
            try:
                found = tar.next()
            except (tarfile.TarError, ValueError) as error:
                raise _cut(name, at) from error
            if found is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
            if not found.isreg() or found.sparse is not None:
                at = tar.offset
                continue
            path, size, offset = found.name, found.size, found.offset_data
        at = offset + -(-size // _BLOCK) * _BLOCK
        if at > end:
            raise _cut(name, offset)
        path = path.removeprefix("./")
        folder, slash, file = path.rpartition("/")
        key, _, kind = file.partition(".")
        if key and kind:  # not hidden, as what a Mac adds is
            yield Member(path, f"{folder}{slash}{key}", kind.lower(), offset, size)
    if len(block) < _BLOCK or any(block):
        raise _cut(name, at)


def _plain(block: bytes) -> tuple[str, int] | None:
    """Name and size in the header of an ordinary file, the form of nearly all; None of any other.

    tarfile takes ten times as long, and there are two headers for each picture.
    """
    if block[257:262] != b"ustar" or block[156:157] not in (b"0", b"\0"):
        return None
    try:
        size, told = int(block[124:136].strip(b" \0"), 8), int(block[148:156].strip(b" \0"), 8)
    except ValueError:  # in base 256, or no header
        return None
    if sum(block) - sum(block[148:156]) + 8 * 32 != told:
        return None
    path = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (before := block[345:500].partition(b"\0")[0]):  # not of GNU's form
        path = before + b"/" + path
    return path.decode("utf-8", "surrogateescape"), size


def _cut(name: str, offset: int) -> PartError:
    what = f"is cut off or damaged (after byte {offset:,})"
    return PartError(Problem(name, what, "fetch it again, or remove it"))


# Names ------------------------------------------------------------------------------------------------------

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000


def expanded(path: str) -> list[str]:
    """The names that braces stand for, as in a shell: `{000..099}`, `{a,b}`.

    Raises:
        DataError: an empty or absurd range.

    >>> expanded("{train,more}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'more-08.tar']
    """
    pieces = _BRACES.split(path)
    choices: list[list[str]] = []
    count = 1
    for index, piece in enumerate(pieces):
        found = [piece]
        if index % 2:
            if match := _RANGE.fullmatch(piece):
                first, last = int(match[1]), int(match[2])
                width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
                if last < first or last - first >= _MOST:
                    raise DataError(
                        f"{{{piece}}} stands for no file", hint="write {first..last}, as {000..099}"
                    )
                found = [f"{number:0{width}d}" for number in range(first, last + 1)]
            elif "," in piece:
                found = piece.split(",")
            else:
                raise DataError(f"{{{piece}}} is no range", hint="write {first..last}, as {000..099}")
        count *= len(found)
        if count > _MOST:
            raise DataError(f"stands for more than {_MOST:,} files")
        choices.append(found)
    return ["".join(parts) for parts in product(*choices)]
