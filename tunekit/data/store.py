"""Tensors by key in a folder: each in a file of its own, or many of them in a shard.

    store = Store(Path("runs/.cache/latents"))
    store.put(key, {"moments": moments}, together=True)
    store.close()
    store.get(key)

A key is the hash of everything that the tensors depend on, 32 hex digits. Alone they are `KEY.safetensors`.
A shard holds the very bytes of many such files, one entry behind the other:

    mark (4 bytes), key (16), bytes of the content (8), CRC-32 of all this (4); the content

It has one writer. While that writes, the shard is `HOST-PROCESS-NAME.part`, and locked; once it is full, or
the writer is done, an index of its entries is put behind them, and `.part` becomes `.shard`. The index says
nothing that the entries do not say: where it is missing or damaged, they are read from the first one on, up
to one that is not whole. So whatever ends a writer, what it has put stays, and whoever comes next ends the
shard in its place (`Store.tidy`).
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import time
import uuid
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from tunekit.errors import DataError, output_errors
from tunekit.files import atomic_file, clean_leftovers, is_alive

SHARD_BYTES = 2**30
"""A shard that has so many bytes is ended, and the next begun."""
RESTED = 600.0
"""Seconds in which the unfinished shard of another machine has not grown, after which its writer is gone:
not every shared disk carries locks."""
_OPEN = 64
"""Shards that are open for reading at a time."""

_HEAD = struct.Struct("<4s16sQI")
_TAIL = struct.Struct("<Q8s")
"""Behind the index: where it begins, and a mark."""
_ENTRY, _INDEX, _END = b"tkE1", b"tkI1", b"tkshard1"
_NONE = bytes(16)
_PIECE = 2**24
_NAME = re.compile(r"([0-9a-f]{32})\.safetensors")
_SHARD = re.compile(r"(\w+-\d+-[0-9a-f]{16})\.(part|shard)")

Numbers = NDArray[np.uint64]
Rows: TypeAlias = "array[int]"
"""Of each entry of a shard the high and the low half of its key, its place and its bytes."""
Say = Callable[[str], None]


class Store:
    """Tensors by key, in files or in shards; either is found wherever it lies.

    Args:
        folder: need not be there.
        say: takes lines about shards that were mended or are damaged.
    """

    def __init__(self, folder: Path, *, say: Say = lambda line: None) -> None:
        self.folder = folder
        self.say = say
        self._files: _Table | None = None
        self._shards = Shards(folder, say=say)
        self._looked = self._stale = False

    def path(self, key: str) -> Path:
        """The file of tensors that lie alone."""
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether they are there, and whole."""
        return not self.absent([key])[0]

    def absent(self, keys: Sequence[str]) -> list[bool]:
        """Which of some keys are not there; what other processes put since the last `refresh` is not seen."""
        if self._stale or not self._looked:
            self.refresh()
        pairs = _pairs(keys)
        found = self._shards.holds(pairs)
        if self._files is None:
            self._files = _listed(self.folder)
        alone = self._files.holds(pairs)
        return [
            not in_shard and not (in_file and is_whole(self.path(key)))
            for key, in_shard, in_file in zip(keys, found.tolist(), alone.tolist(), strict=True)
        ]

    def get(self, key: str) -> dict[str, Tensor]:
        """Read them.

        Raises:
            DataError: they are not there, or damaged; says what to remove.
        """
        if not self._looked:
            self.refresh()
        content = self._shards.get(key)
        if content is None and not self.path(key).exists():
            self._shards.refresh()  # another process may have put it since
            content = self._shards.get(key)
        return _load(self.path(key)) if content is None else content

    def put(self, key: str, tensors: Mapping[str, Tensor], *, together: bool = False) -> int:
        """Write them, whole or not at all.

        Args:
            together: in a shard of this process; `close` ends it.

        Returns:
            Bytes written.

        Raises:
            OutputError: the disk is full, or may not be written; what was put before stays.
        """
        content = as_bytes(tensors)
        if together:
            self._shards.put(key, content)
        else:
            write_tensors(self.path(key), content)
        self._stale = True
        return len(content)

    def refresh(self) -> None:
        """Look again at what there is."""
        self._looked, self._stale, self._files = True, False, None
        self._shards.refresh()

    def tidy(self) -> None:
        """End the shards of processes that are gone, and remove what others left half-written."""
        clean_leftovers(self.folder)
        self._shards.mend()

    def close(self) -> None:
        """End this process's shard."""
        self._shards.close()


# Shards -----------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """What is known of a shard.

    Attributes:
        number: of the shards of a folder.
        ended: whether it has an index and its last name.
        count: entries that were read.
        end: bytes that they take.
    """

    number: int
    ended: bool = False
    count: int = 0
    end: int = 0


class Shards:
    """The shards of a folder, and one that this process writes."""

    def __init__(self, folder: Path, *, limit: int = SHARD_BYTES, say: Say = lambda line: None) -> None:
        self.folder = folder
        self.say = say
        self._writer = Writer(folder, limit)
        self._shards: dict[str, _Shard] = {}
        self._names: list[str] = []
        self._table = _Table()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._table)

    def holds(self, pairs: Numbers) -> NDArray[np.bool_]:
        """Which keys are there, see `_pairs`."""
        return self._table.holds(pairs)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What is kept under a key; None if nothing is.

        Raises:
            DataError: it is damaged.
        """
        content = self.read(key)
        if content is None:
            return None
        try:
            return load(content)
        except SafetensorError as error:
            raise _damaged(self._place(key), str(error)) from error

    def read(self, key: str) -> bytes | None:
        """The bytes under a key."""
        with self._lock:
            found = self._table.find(*_numbers(key))
            if found is None:
                return None
            shard, at, size = found
            whole = _read(self._opened(self._names[shard]), at - _HEAD.size, _HEAD.size + size)
        wanted = _HEAD.pack(_ENTRY, bytes.fromhex(key), size, 0)[:28]
        if whole[:28] != wanted or zlib.crc32(whole[_HEAD.size :], zlib.crc32(wanted)) != _crc(whole):
            raise _damaged(self._place(key), "an entry is not what was written")
        return whole[_HEAD.size :]

    def put(self, key: str, content: bytes) -> None:
        """Append an entry to this process's shard; it is found after `refresh`."""
        self._writer.put(bytes.fromhex(key), content)

    def close(self) -> None:
        """End this process's shard."""
        self._writer.close()

    def refresh(self) -> None:
        """Look for new shards, and for what was put into others since."""
        with self._lock:
            new: list[tuple[int, Numbers]] = []
            for name, ended in sorted(_shards_in(self.folder).items()):
                known = self._shards.get(name)
                if known is None:
                    known = self._shards[name] = _Shard(len(self._names))
                    self._names.append(name)
                if not known.ended:
                    with suppress(FileNotFoundError):  # removed by hand
                        new.append((known.number, self._entries(name, known, ended=ended)))
            self._table.add(new)

    def mend(self) -> None:
        """End the shards whose writers are gone."""
        for name, ended in _shards_in(self.folder).items():
            if ended or name == self._writer.name:
                continue
            path = self.folder / f"{name}.part"
            try:
                file = os.open(path, os.O_RDWR)
            except OSError:  # another process was quicker, or it is somebody else's, and read as it is
                continue
            try:
                if _is_left(file, name):
                    with output_errors(path):
                        self._mend(file, path)
            finally:
                os.close(file)

    def _mend(self, file: int, path: Path) -> None:
        size = os.fstat(file).st_size
        rows, end = _scan(file, 0, size)
        if size > end:
            os.ftruncate(file, end)
        if not rows:
            path.unlink()
            return
        _end(file, rows, path)
        torn = f", and dropped {size - end:,} bytes behind them" if size > end else ""
        self.say(f"{path.stem}.shard: kept {len(rows) // 4:,} entries of a process that is gone{torn}")

    def _entries(self, name: str, known: _Shard, *, ended: bool) -> Numbers:
        """The entries of a shard that are not known yet."""
        try:
            file = os.open(_path(self.folder, name, ended=ended), os.O_RDONLY)
        except FileNotFoundError:  # it was ended meanwhile
            ended = True
            file = os.open(_path(self.folder, name, ended=ended), os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            rows = _index(file, size) if ended else None
            if rows is not None:
                rows = rows[known.count :]
                known.end = size
            else:
                found, known.end = _scan(file, known.end, size)
                rows = np.frombuffer(found, dtype=np.uint64).reshape(-1, 4)
                if ended and known.end < size:
                    count = known.count + len(rows)
                    self.say(
                        f"{name}.shard: damaged behind its first {count:,} entries; what else it held is"
                        " encoded again"
                    )
        finally:
            os.close(file)
        known.ended, known.count = ended, known.count + len(rows)
        return rows

    def _opened(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        for ended in (self._shards[name].ended, True):
            with suppress(FileNotFoundError):
                self._open[name] = os.open(_path(self.folder, name, ended=ended), os.O_RDONLY)
                break
        else:
            place = self.folder / f"{name}.shard"
            raise DataError("the shard is gone", where=str(place), hint="run again: it is encoded anew")
        while len(self._open) > _OPEN:
            os.close(self._open.popitem(last=False)[1])
        return self._open[name]

    def _place(self, key: str) -> Path:
        found = self._table.find(*_numbers(key))
        return self.folder / f"{self._names[found[0]] if found else key}.shard"

    def __del__(self) -> None:
        for file in self._open.values():
            with suppress(OSError):
                os.close(file)


@dataclass
class Writer:
    """Writes one shard after another; nobody else writes to them.

    Attributes:
        folder: need not be there.
        limit: bytes after which a shard is ended.
        name: of the shard that is written; "" if none is.
    """

    folder: Path
    limit: int = SHARD_BYTES
    name: str = ""
    _file: int = -1
    _rows: Rows = field(default_factory=lambda: array("Q"))

    def put(self, key: bytes, content: bytes) -> None:
        """Append an entry.

        Raises:
            OutputError: it cannot be written; the entries before it stay.
        """
        if self._file < 0:
            self._begin()
        path = self.folder / f"{self.name}.part"
        with output_errors(path):
            at = os.lseek(self._file, 0, os.SEEK_END)
            try:
                _write(self._file, _framed(_ENTRY, key, content))
            except OSError:
                os.ftruncate(self._file, at)
                raise
            at = os.lseek(self._file, 0, os.SEEK_CUR) - len(content)
            self._rows.extend((*_split(key), at, len(content)))
        if at + len(content) >= self.limit:
            self.close()

    def close(self) -> None:
        """End the shard, if one is written.

        Raises:
            OutputError: there is no room for its index; its entries stay without.
        """
        if self._file < 0:
            return
        path = self.folder / f"{self.name}.part"
        file, rows = self._file, self._rows
        self._file, self._rows, self.name = -1, array("Q"), ""
        try:
            with output_errors(path):
                _end(file, rows, path)
        finally:
            os.close(file)

    def _begin(self) -> None:
        self.name = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:16]}"
        path = self.folder / f"{self.name}.part"
        with output_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        _lock(self._file)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:40] or "host"


def _lock(file: int) -> bool | None:
    """Gets hold of a shard; False if its writer has it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_left(file: int, name: str) -> bool:
    """Whether the writer of a shard is gone; then its lock is held."""
    host, process, _ = name.split("-")
    locked = _lock(file)
    if locked is False:
        return False
    if host != _host():
        return time.time() - os.fstat(file).st_mtime > RESTED
    return locked is not None or not is_alive(int(process))


def _path(folder: Path, name: str, *, ended: bool) -> Path:
    return folder / f"{name}.{'shard' if ended else 'part'}"


def _shards_in(folder: Path) -> dict[str, bool]:
    """Name -> whether it is ended."""
    found: dict[str, bool] = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _SHARD.fullmatch(entry.name):
                found[match[1]] = found.get(match[1], False) or match[2] == "shard"
    return found


def _end(file: int, rows: Rows, path: Path) -> None:
    """Puts the index behind the entries, and gives a shard its last name."""
    at = os.lseek(file, 0, os.SEEK_END)
    index = np.frombuffer(rows, dtype=np.uint64).astype("<u8").tobytes()
    try:
        _write(file, _framed(_INDEX, _NONE, index) + _TAIL.pack(at, _END))
        os.fsync(file)
    except OSError:
        os.ftruncate(file, at)
        raise
    try:
        path.rename(path.with_suffix(".shard"))
    except FileNotFoundError:  # a machine that does not see this one's lock has done so
        if not path.with_suffix(".shard").exists():
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _framed(mark: bytes, key: bytes, content: bytes) -> bytes:
    head = _HEAD.pack(mark, key, len(content), 0)[:28]
    return head + struct.pack("<I", zlib.crc32(content, zlib.crc32(head))) + content


def _crc(framed: bytes) -> int:
    return int.from_bytes(framed[28:32], "little")


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read(file: int, at: int, size: int) -> bytes:
    """Bytes of a file; fewer where it ends."""
    parts = []
    while size > 0 and (part := os.pread(file, min(size, _PIECE), at)):
        parts.append(part)
        at, size = at + len(part), size - len(part)
    return b"".join(parts)


def _scan(file: int, at: int, size: int) -> tuple[Rows, int]:
    """The whole entries from a place on, and where the last of them ends."""
    rows: Rows = array("Q")
    while len(head := _read(file, at, _HEAD.size)) == _HEAD.size:
        mark, key, length, crc = _HEAD.unpack(head)
        begin = at + _HEAD.size
        if mark not in (_ENTRY, _INDEX) or begin + length > size:
            break
        made = zlib.crc32(head[:28])
        for place in range(begin, begin + length, _PIECE):
            made = zlib.crc32(_read(file, place, min(_PIECE, begin + length - place)), made)
        if made != crc:
            break
        if mark == _ENTRY:
            rows.extend((*_split(key), begin, length))
            at = begin + length
        elif begin + length + _TAIL.size <= size:  # it was ended, and its writer went on
            at = begin + length + _TAIL.size
        else:
            break
    return rows, at


def _index(file: int, size: int) -> Numbers | None:
    """The entries by the index; None where that is not whole."""
    tail = _read(file, size - _TAIL.size, _TAIL.size) if size >= _TAIL.size else b""
    if len(tail) < _TAIL.size:
        return None
    at, mark = _TAIL.unpack(tail)
    if mark != _END or at + _HEAD.size + _TAIL.size > size:
        return None
    framed = _read(file, at, size - _TAIL.size - at)
    content = framed[_HEAD.size :]
    if len(content) % 32 or framed != _framed(_INDEX, _NONE, content):
        return None
    return np.frombuffer(content, dtype="<u8").reshape(-1, 4)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"the shard is damaged ({why})", where=str(path), hint="remove it and run again: it is encoded anew"
    )


# Keys -------------------------------------------------------------------------------------------------------


class _Table:
    """Where entries are, by key: 36 bytes for each."""

    def __init__(self) -> None:
        none = np.zeros(0, dtype=np.uint64)
        self._high, self._low, self._at, self._size = none, none, none, none
        self._shard = np.zeros(0, dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._high)

    def add(self, new: Sequence[tuple[int, Numbers]]) -> None:
        """Add entries of shards: rows of high and low half of the key, place and bytes."""
        new = [(shard, rows) for shard, rows in new if len(rows)]
        if not new:
            return
        high, low, at, size = (
            np.concatenate([known, *(rows[:, column] for _, rows in new)]).astype(np.uint64, copy=False)
            for column, known in enumerate((self._high, self._low, self._at, self._size))
        )
        shard = np.concatenate(
            [self._shard, *(np.full(len(rows), number, dtype=np.uint32) for number, rows in new)]
        )
        order = first_of_each(high, low)
        self._high, self._low, self._at, self._size = high[order], low[order], at[order], size[order]
        self._shard = shard[order]

    def find(self, high: int, low: int) -> tuple[int, int, int] | None:
        """Shard, place and bytes of a key."""
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return int(self._shard[at]), int(self._at[at]), int(self._size[at])
            at += 1
        return None

    def holds(self, pairs: Numbers) -> NDArray[np.bool_]:
        """Which keys it has."""
        if not len(self._high) or not len(pairs):
            return np.zeros(len(pairs), dtype=np.bool_)
        high, low = pairs[:, 0], pairs[:, 1]
        at = np.minimum(np.searchsorted(self._high, high), len(self._high) - 1)
        near = self._high[at] == high
        found: NDArray[np.bool_] = near & (self._low[at] == low)
        for place in np.flatnonzero(near & ~found):  # two keys whose first half is the same
            found[place] = self.find(int(high[place]), int(low[place])) is not None
        return found


def first_of_each(high: Numbers, low: Numbers) -> NDArray[np.intp]:
    """Places of the different keys, sorted by key; of equal ones the first."""
    order = np.lexsort((low, high))
    if len(order) < 2:
        return order
    high, low = high[order], low[order]
    new = np.empty(len(order), dtype=np.bool_)
    new[0] = True
    np.logical_or(high[1:] != high[:-1], low[1:] != low[:-1], out=new[1:])
    return order[new]


def _numbers(key: str) -> tuple[int, int]:
    return int(key[:16], 16), int(key[16:], 16)


def _split(key: bytes) -> tuple[int, int]:
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")


def _pairs(keys: Iterable[str]) -> Numbers:
    """High and low half of each key, [N, 2]."""
    return pairs_of(bytes.fromhex("".join(keys)))


def pairs_of(keys: bytes | bytearray) -> Numbers:
    """High and low half of each of some keys of 16 bytes, [N, 2]."""
    return np.frombuffer(keys, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _listed(folder: Path) -> _Table:
    """The keys of the files in a folder."""
    keys = bytearray()
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _NAME.fullmatch(entry.name):
                keys += bytes.fromhex(match[1])
    table, pairs = _Table(), pairs_of(keys)
    table.add([(0, np.concatenate([pairs, np.zeros_like(pairs)], axis=1))])
    return table


# Files ------------------------------------------------------------------------------------------------------


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there, as long as its header says; what was cut or emptied is not."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                return False
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return bool(ends) and 8 + length + max(ends) == size
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return False


def as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """What a file of these tensors holds."""
    content: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return content


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of the cache, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_tensors(path, as_bytes(tensors))


def write_tensors(path: Path, content: bytes) -> None:
    """See `save_tensors`."""
    with atomic_file(path) as temporary:
        # safetensors' own way into a file has a temporary name that nobody can tell from another process's.
        temporary.write_bytes(content)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the cached file cannot be read ({error})", where=str(path), hint="remove it and run again"
        ) from error


class Stores:
    """The stores of a cache's folders, by the path that a file has, or would have, in them."""

    def __init__(self, say: Say = lambda line: None) -> None:
        self.say = say
        self._stores: dict[Path, Store] = {}
        self._lock = threading.Lock()

    def of(self, folder: Path) -> Store:
        """The store in a folder; the same one each time."""
        with self._lock:
            return self._stores.setdefault(folder, Store(folder, say=self.say))

    def load(self, path: Path) -> dict[str, Tensor]:
        """What is kept under a path, in a file or in a shard beside it.

        Raises:
            DataError: it is not there, or damaged.
        """
        if not _NAME.fullmatch(path.name):
            return _load(path)
        return self.of(path.parent).get(path.stem)
