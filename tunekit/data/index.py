"""The index of pictures in rows and shards: looked at once, kept on disk, opened in no time.

    samples, bad, ignored, notes = opened(source, resolution=512, progress=progress)

A source (`shards`, `tables`) has parts: tar files, parquet files, shards of a stream. Each that is new, or
has changed, is read once from its beginning to its end: the size of every picture from its header, a hash of
its bytes, its caption. What was found is one file in the user's cache, named after the part and its times,
whole or not there; so what was killed goes on at the part where it was, and a part that changed is looked at
alone. Opening an index reads 40 bytes of a picture, and keeps 16 of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tunekit.data import decoding
from tunekit.data.decoding import PictureError, size_of
from tunekit.data.files import Ignored, Problem, why_not
from tunekit.data.samples import Indexed, Sample
from tunekit.errors import DataError
from tunekit.files import atomic_file, clean_leftovers
from tunekit.progress import Progress
from tunekit.resources import cache_dir

VERSION = 1
"""To be raised when the same files give other rows, or an index has other tables."""
SHOWN = 20
"""So many problems of a kind are kept of a part, and listed; the others are counted."""
_BLOCK = 2**16
"""Pictures whose sizes and hashes are one row of an index."""
_CHUNK = 64
_CHUNK_BYTES = 2**23
"""Most pictures, and bytes of them, that a thread looks at in one go."""
_PART_BITS = 32
_OPEN = 128
"""Files of an index that a process keeps open, with 64 KiB of each in its memory."""
_OLD_SECONDS = 30 * 24 * 3600.0
"""Age at which the index of a part that has changed since is removed; until then a run may still read it."""


class PartError(Exception):
    """A part that cannot be listed to its end.

    Args:
        problem: what it is.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()  # no text: nobody must take its words for those of the disk that is written to
        self.problem = problem


@dataclass(frozen=True)
class Part:
    """One file of a source, or a shard of a stream.

    Attributes:
        name: for messages.
        key: what tells it from all others, such as its absolute path.
        stamp: what changes with its content.
        number: its place in the source.
    """

    name: str
    key: str
    stamp: str
    number: int = 0


Place = tuple[int, int]
"""Where a part has a picture; what the numbers mean is its source's affair."""


@dataclass(frozen=True)
class Entry:
    """One row before anyone looked at its picture.

    Attributes:
        id: its name; "" where it has none, and is known by the hash of its content.
        load: gives the bytes of the picture.
        text: gives the caption, or what is wrong with it.
        size: bytes of the picture, where that is known.
    """

    id: str
    place: Place
    load: Callable[[], bytes]
    text: Callable[[], tuple[str, Problem | None]]
    size: int = 0


class Source(Protocol):
    """Where pictures come from that are too many for a list. It can be pickled."""

    @property
    def title(self) -> str:
        """As the config names it."""

    @property
    def settings(self) -> Sequence[str | None]:
        """All that decides what is found, beside the parts."""

    @property
    def repeats(self) -> bool:
        """Whether two pictures may have one name, and are then told apart by their contents."""

    def parts(self) -> list[Part]:
        """Its parts, in order.

        Raises:
            DataError: they cannot be listed.
        """

    def entries(self, part: Part) -> Iterator[Entry | Problem | Ignored]:
        """The rows of a part, in order.

        Raises:
            PartError: it cannot be read to its end.
            DataError: it cannot be told what is the picture, or the caption.
        """

    def read(self, part: Part, place: Place) -> bytes:
        """The bytes of a picture.

        Raises:
            OSError: they cannot be read, or the part has changed.
        """

    def where(self, part: Part, place: Place, name: str) -> str:
        """A picture, for messages."""


class Opened(NamedTuple):
    """What a source has.

    Attributes:
        bad: what is wrong with single pictures.
        problems: what is wrong with whole parts.
    """

    samples: Indexed
    bad: list[Problem]
    problems: list[Problem]
    ignored: list[Ignored]
    notes: list[str]


def opened(
    source: Source, *, resolution: int, prefix: str = "", caption: str | None = None, progress: Progress
) -> Opened:
    """The pictures of a source; parts that nobody has looked at yet are looked at first.

    Args:
        resolution: pictures smaller than half of it are problems.
        prefix: put before each caption.
        caption: every picture has it instead of its own.

    Raises:
        DataError: the source cannot be listed, or has no such columns.
        OutputError: the disk of the index is full.
    """
    parts = source.parts()
    folder, notes = _folder()
    files = [_file(folder, source, part) for part in parts]
    problems = _look_at_new(source, parts, files, progress)
    there = [number for number, file in enumerate(files) if number not in problems]
    store = _Store(source, parts, files)
    counts = [store.count(number) for number in there]
    rows = np.concatenate(
        [
            np.arange(count, dtype=np.int64) | (number << _PART_BITS)
            for number, count in zip(there, counts, strict=True)
        ]
        or [np.empty(0, np.int64)]
    )
    sizes = store.column(there, "sizes", "<i4", 2, sum(counts))
    tally = _Tally()
    ignored: list[Ignored] = []
    for number in there:
        bad, more = store.told(number)
        ignored += more
        for problem in bad:
            tally.add(problem)
    view = _Indexed(store, rows, sizes, prefix=prefix, caption=caption)
    good = _without_small(view, resolution, tally)
    good = _without_repeated(view, good, source, tally)
    if len(good) < len(rows):
        view = view.take(good)
    if source.repeats:
        view.tell_apart()
    return Opened(view, tally.problems, [problems[number] for number in sorted(problems)], ignored, notes)


# Looking ----------------------------------------------------------------------------------------------------


def _folder() -> tuple[Path, list[str]]:
    """Where the index is: the user's cache; else a folder that goes with the process, and a note."""
    home = cache_dir()
    why = "there is no home folder (HOME, XDG_CACHE_HOME)"
    if home is not None:
        folder = home / "index"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            why = f"{folder}: {why_not(error)}"
        else:
            return folder, []
    note = f"the index of the pictures is not kept for the next time ({why}): set XDG_CACHE_HOME"
    return Path(_passing().name), [note]


@cache
def _passing() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tunekit-index-")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process looks at pictures, those beside it wait for what it finds."""
    try:
        import fcntl
    except ImportError:  # Windows: all of them look, which is slower and not wrong
        yield
        return
    with (folder / ".lock").open("w") as lock:
        with suppress(OSError):  # a disk that has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _file(folder: Path, source: Source, part: Part) -> Path:
    known = [VERSION, decoding.VERSION, type(source).__name__, part.key, *source.settings]
    return folder / f"{_hash(known)}-{_hash([part.stamp])}.sqlite"


def _hash(parts: Sequence[Any]) -> str:
    text = json.dumps(parts).encode()
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _look_at_new(
    source: Source, parts: Sequence[Part], files: Sequence[Path], progress: Progress
) -> dict[int, Problem]:
    """Make the index of each part that has none; gives the parts that cannot be."""
    if all(_is_whole(file) for file in files):
        return {}
    with _alone(files[0].parent):
        return _look_at_parts(source, parts, files, progress)


def _look_at_parts(
    source: Source, parts: Sequence[Part], files: Sequence[Path], progress: Progress
) -> dict[int, Problem]:
    missing = [number for number, file in enumerate(files) if not _is_whole(file)]
    problems: dict[int, Problem] = {}
    before: dict[str, list[Path]] = {}
    clean_leftovers(files[0].parent)
    for file in files[0].parent.glob("*.sqlite"):
        before.setdefault(file.stem.partition("-")[0], []).append(file)
    workers = min(8, os.cpu_count() or 1)
    many = len(missing) > 1
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers, thread_name_prefix="look") as pool,
        progress.phase("looking at pictures", len(missing) if many else None) as phase,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `size_of` raises instead
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        seen = 0
        for done, number in enumerate(missing):

            def told(count: int, done: int = done, base: int = seen) -> None:
                phase.update(done if many else base + count, f"{base + count:,} pictures")

            try:
                seen += _make(source, parts[number], files[number], partial(_looked, pool, workers), told)
            except PartError as error:
                problems[number] = error.problem
            for old in before.get(files[number].stem.partition("-")[0], ()):
                with suppress(OSError):
                    if old != files[number] and time.time() - old.stat().st_mtime > _OLD_SECONDS:
                        old.unlink()
            phase.update(done + 1 if many else seen)
    return problems


def _is_whole(file: Path) -> bool:
    """Whether an index is there and can be read; it has its name only when it is whole."""
    if not file.exists():
        return False
    try:
        with _Connected(file) as found:
            return found.execute("SELECT value FROM meta WHERE key = 'count'").fetchone() is not None
    except sqlite3.Error:
        return False


class _Connected:
    """An index that is open for reading within a block."""

    def __init__(self, file: Path) -> None:
        self.connection = _connect(file)

    def __enter__(self) -> sqlite3.Connection:
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def _connect(file: Path) -> sqlite3.Connection:
    """An index is never written again once it has its name: no locks are needed, on any disk."""
    name = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
    found = sqlite3.connect(name, uri=True, check_same_thread=False)
    found.execute("PRAGMA cache_size = -64")
    return found


_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE rows (
        n INTEGER PRIMARY KEY, id BLOB, caption TEXT, a INTEGER, b INTEGER, content BLOB,
        width INTEGER, height INTEGER
    );
    CREATE TABLE blocks (n INTEGER PRIMARY KEY, sizes BLOB, ids BLOB, contents BLOB, captions BLOB);
    CREATE TABLE problems (place TEXT, what TEXT, fix TEXT, kind TEXT, count INTEGER);
    CREATE TABLE ignored (place TEXT, why TEXT, fix TEXT, count INTEGER);
    CREATE TABLE meta (key TEXT PRIMARY KEY, value);
"""
"""A file for each part: `rows` for what is asked by its number; in `blocks` what is read of all at once, of
`_BLOCK` pictures each: width and height, hashes of id and content (16 bytes), of the caption (8)."""


class _Looked(NamedTuple):
    """What there is to know of a picture, without its pixels; `content` is the hash of its bytes."""

    width: int
    height: int
    content: bytes


def _make(
    source: Source,
    part: Part,
    file: Path,
    looked: Callable[[Iterable[Entry | Problem | Ignored]], Iterator[Any]],
    told: Callable[[int], None],
) -> int:
    """Look at all pictures of a part; gives how many there are."""
    tally, ignored = _Tally(), _Leftovers()
    with atomic_file(file) as temporary:
        made = sqlite3.connect(temporary)
        try:
            made.executescript(_TABLES)
            count = 0
            block = _Block()
            waiting: list[tuple[Any, ...]] = []
            for item in looked(source.entries(part)):
                if isinstance(item, Problem):
                    tally.add(item)
                    continue
                if isinstance(item, Ignored):
                    ignored.add(item)
                    continue
                entry, text, wrong, outcome = item
                where = source.where(part, entry.place, entry.id)
                if isinstance(outcome, _Looked) and wrong is None:
                    width, height, content = outcome
                    name = (entry.id or content.hex()).encode("utf-8", "surrogateescape")
                    waiting.append((count, name, text, *entry.place, content, width, height))
                    block.add(width, height, name, content, text)
                    count += 1
                    if not count % _BLOCK:
                        block.write(made)
                    if len(waiting) >= 1000:
                        made.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", waiting)
                        waiting.clear()
                        told(count)
                    continue
                if not isinstance(outcome, _Looked):
                    tally.add(Problem(where, *outcome))
                if wrong is not None:
                    tally.add(wrong)
            made.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", waiting)
            block.write(made)
            made.executemany(
                "INSERT INTO problems VALUES (?, ?, ?, ?, ?)",
                [(found.where, found.what, found.fix, found.kind, found.count) for found in tally.problems],
            )
            made.executemany(
                "INSERT INTO ignored VALUES (?, ?, ?, ?)",
                [(found.where, found.why, found.fix, found.count) for found in ignored.items],
            )
            made.execute("INSERT INTO meta VALUES ('count', ?)", (count,))
            made.commit()
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, str(error)) from error
        finally:
            made.close()
    told(count)
    return count


class _Block:
    """Sizes and hashes that are read of many pictures at once."""

    def __init__(self) -> None:
        self.parts = [bytearray() for _ in range(4)]
        self.written = 0

    def add(self, width: int, height: int, name: bytes, content: bytes, text: str) -> None:
        """One picture more."""
        for part, value in zip(
            self.parts,
            (
                width.to_bytes(4, "little") + height.to_bytes(4, "little"),
                rank(name),
                content,
                hashlib.blake2b(text.encode(), digest_size=8).digest(),
            ),
            strict=True,
        ):
            part += value

    def write(self, made: sqlite3.Connection) -> None:
        """As a row, if there are any."""
        if self.parts[0]:
            made.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", (self.written, *map(bytes, self.parts)))
            self.written += 1
            for part in self.parts:
                part.clear()


def rank(name: bytes) -> bytes:
    """16 bytes of the hash of an id; by their order pictures are held out."""
    return hashlib.blake2b(name).digest()[:16]


def _looked(
    pool: ThreadPoolExecutor, workers: int, entries: Iterable[Entry | Problem | Ignored]
) -> Iterator[Problem | Ignored | tuple[Entry, str, Problem | None, Any]]:
    """Each entry with what its picture is, in order; a few chunks are in memory at a time."""
    waiting: deque[tuple[list[Entry | Problem | Ignored], Future[list[Any]]]] = deque()
    for chunk in _chunks(entries):
        waiting.append(
            (chunk, pool.submit(_look_at_all, [item for item in chunk if isinstance(item, Entry)]))
        )
        if len(waiting) > 2 * workers:
            yield from _paired(*waiting.popleft())
    while waiting:
        yield from _paired(*waiting.popleft())


def _paired(chunk: list[Entry | Problem | Ignored], made: Future[list[Any]]) -> Iterator[Any]:
    found = iter(made.result())
    for item in chunk:
        yield (item, *next(found)) if isinstance(item, Entry) else item


def _chunks(entries: Iterable[Entry | Problem | Ignored]) -> Iterator[list[Entry | Problem | Ignored]]:
    chunk: list[Entry | Problem | Ignored] = []
    size = 0
    for item in entries:
        chunk.append(item)
        size += item.size if isinstance(item, Entry) else 0
        if len(chunk) >= _CHUNK or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _look_at_all(entries: Sequence[Entry]) -> list[tuple[str, Problem | None, _Looked | tuple[str, ...]]]:
    return [(*entry.text(), _look_at(entry)) for entry in entries]


def _look_at(entry: Entry) -> _Looked | tuple[str, str, str]:
    """Size and hash, or `what`, `fix` and `kind` of a problem."""
    try:
        data = entry.load()
        return _Looked(*size_of(data), hashlib.blake2b(data, digest_size=16).digest())
    except PictureError as error:
        what = f"cannot be read as a picture ({error})"
        return what, "replace it, shrink it or remove it", "cannot be read as a picture"
    except OSError as error:
        return f"cannot be read ({why_not(error)})", "make it readable, or remove it", "cannot be read"


class _Tally:
    """Problems: the first of each kind, and how many more."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, list[Problem]] = OrderedDict()
        self._more: Counter[str] = Counter()

    def add(self, problem: Problem) -> None:
        """One problem, or one that stands for several."""
        kind = problem.kind or problem.what
        kept = self._kinds.setdefault(kind, [])
        if len(kept) < SHOWN and problem.count == 1:
            kept.append(problem)
        else:
            self._more[kind] += problem.count
            if not kept:
                kept.append(problem)
                self._more[kind] -= problem.count

    @property
    def problems(self) -> list[Problem]:
        """Those that are kept; the last of a kind stands for all that are not."""
        found = []
        for kind, kept in self._kinds.items():
            found += kept
            if self._more[kind]:
                last = kept[-1]
                found.append(
                    Problem(last.where, last.what, last.fix, last.kind or last.what, self._more[kind])
                )
        return found


class _Leftovers:
    """What is not used: the first of a reason, and how many."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], list[str]] = {}
        self._count: Counter[tuple[str, str]] = Counter()

    def add(self, item: Ignored) -> None:
        """One more."""
        key = (item.why, item.fix)
        first = self._first.setdefault(key, [])
        if len(first) < 3:
            first.append(item.where)
        self._count[key] += item.count

    @property
    def items(self) -> list[Ignored]:
        """A few by name, the last for all others of its reason."""
        found = []
        for (why, fix), names in self._first.items():
            rest = self._count[why, fix] - len(names) + 1
            found += [Ignored(name, why, fix) for name in names[:-1]]
            found.append(Ignored(names[-1], why, fix, rest))
        return found


# Reading ----------------------------------------------------------------------------------------------------


class _Store:
    """The indexes of all parts of a source, a few of them open at a time."""

    def __init__(self, source: Source, parts: Sequence[Part], files: Sequence[Path]) -> None:
        self.source = source
        self.parts = list(parts)
        self._files = list(files)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, sqlite3.Connection] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def ask(self, number: int, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that a query of a part gives.

        Raises:
            DataError: the index is not there any more.
        """
        if self._process != os.getpid():  # a connection does not survive a fork
            self._forget()
        with self._lock:
            try:
                if number not in self._open:
                    self._open[number] = _connect(self._files[number])
                    if len(self._open) > _OPEN:
                        self._open.popitem(last=False)[1].close()
                self._open.move_to_end(number)
                return self._open[number].execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise DataError(
                    f"the index of {self.parts[number].name} cannot be read ({error})",
                    where=str(self._files[number]),
                    hint="run again: what is missing is made again",
                ) from error

    def count(self, number: int) -> int:
        """Pictures of a part."""
        ((count,),) = self.ask(number, "SELECT value FROM meta WHERE key = 'count'")
        return int(count)

    def told(self, number: int) -> tuple[list[Problem], list[Ignored]]:
        """What is wrong in a part, and what is not used."""
        bad = [Problem(*row) for row in self.ask(number, "SELECT * FROM problems ORDER BY rowid")]
        ignored = [Ignored(*row) for row in self.ask(number, "SELECT * FROM ignored ORDER BY rowid")]
        return bad, ignored

    def blocks(self, number: int, *columns: str) -> Iterator[tuple[bytes, ...]]:
        """Sizes or hashes of a part's pictures, in order."""
        names = ", ".join(columns)
        for (block,) in self.ask(number, "SELECT n FROM blocks ORDER BY n"):
            query = f"SELECT {names} FROM blocks WHERE n = ?"  # noqa: S608 - columns of ours
            yield from self.ask(number, query, (block,))

    def column(self, numbers: Sequence[int], name: str, kind: Any, width: int, count: int) -> NDArray[Any]:
        """[count, width]: one value of all pictures of some parts."""
        made = np.empty((count, width), kind)
        at = 0
        for number in numbers:
            for (block,) in self.blocks(number, name):
                found = np.frombuffer(block, kind).reshape(-1, width)
                made[at : at + len(found)] = found
                at += len(found)
        return made


_AHEAD = 512
"""Pictures that are read from an index at once when all are asked for."""


@dataclass
class _Indexed(Indexed):
    """Samples of an index.

    Attributes:
        rows: of each, the number of its part and its number in it.
        sizes_: width and height of each.
        prefix, caption: see `opened`.
        shared: rows, in order, whose name another one has, too.
    """

    store: _Store
    rows: NDArray[np.int64]
    sizes_: NDArray[np.int32]
    prefix: str = ""
    caption: str | None = None
    shared: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _digests: tuple[str, dict[str, list[str]]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """See `Indexed`."""
        return self.sizes_

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Indexed: ...
    def __getitem__(self, index: int | slice) -> Sample | Indexed:
        """One sample, or some."""
        if isinstance(index, slice):
            return self.take(index)
        (found,) = self._samples(self.rows[[index]])
        return found

    def __iter__(self) -> Iterator[Sample]:
        for at in range(0, len(self.rows), _AHEAD):
            yield from self._samples(self.rows[at : at + _AHEAD])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, positions: NDArray[np.int64] | slice) -> _Indexed:
        """See `Indexed`."""
        return _Indexed(
            self.store, self.rows[positions], self.sizes_[positions], self.prefix, self.caption, self.shared
        )

    def _samples(self, rows: NDArray[np.int64]) -> Iterator[Sample]:
        """Of some rows, in their order: each stretch of one part with one question."""
        numbers = rows >> _PART_BITS
        inside = rows & (2**_PART_BITS - 1)
        ends = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(inside) <= 0)) + 1
        for start, end in pairwise([0, *ends.tolist(), len(rows)]):
            if start == end:
                continue
            number, wanted = int(numbers[start]), inside[start:end].tolist()
            if wanted[-1] - wanted[0] < 4 * len(wanted):
                query = "SELECT * FROM rows WHERE n BETWEEN ? AND ? ORDER BY n"
                some = set(wanted)
                found = [
                    row for row in self.store.ask(number, query, (wanted[0], wanted[-1])) if row[0] in some
                ]
            else:
                query = "SELECT * FROM rows WHERE n = ?"
                found = [row for n in wanted for row in self.store.ask(number, query, (n,))]
            for row in found:
                yield self._sample(number, row)

    def _sample(self, number: int, row: tuple[Any, ...]) -> Sample:
        n, name, text, a, b, content, width, height = row
        source, part = self.store.source, self.store.parts[number]
        own = id_ = name.decode("utf-8", "surrogateescape")
        key = number << _PART_BITS | n
        if (
            len(self.shared)
            and self.shared[min(np.searchsorted(self.shared, key), len(self.shared) - 1)] == key
        ):
            id_ = f"{own}@{content.hex()[:16]}"
        return Sample(
            id_,
            self.caption if self.caption is not None else self.prefix + text,
            width,
            height,
            content.hex(),
            source.where(part, (a, b), own),
            partial(_same, source, part, (a, b), content),
        )

    # Many at once -------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """See `Indexed`."""
        return self._hashed()[0]

    def hashes(self) -> dict[str, list[str]]:
        """See `Indexed`."""
        return self._hashed()[1]

    def _hashed(self) -> tuple[str, dict[str, list[str]]]:
        if self._digests is None:
            whole = [hashlib.blake2b(digest_size=16) for _ in range(3)]
            head = json.dumps([self.prefix, self.caption]).encode()
            by_part: dict[str, list[Any]] = {}
            for number, (ids, contents, captions) in self._by_part("ids", "contents", "captions"):
                mine = [hashlib.blake2b(digest_size=16), hashlib.blake2b(head, digest_size=8)]
                own, texts = by_part.setdefault(self.store.parts[number].name, mine)
                own.update(ids + contents)
                texts.update(captions)
                for digest, value in zip(whole, (ids, contents, captions), strict=True):
                    digest.update(value)
            last = hashlib.blake2b(head + b"".join(digest.digest() for digest in whole), digest_size=16)
            named = {name: [part.hexdigest() for part in found] for name, found in by_part.items()}
            self._digests = last.hexdigest(), named
        return self._digests

    def _by_part(self, *columns: str) -> Iterator[tuple[int, list[bytes]]]:
        """Hashes of the samples, those that follow each other in one part together."""
        widths = {"ids": 16, "contents": 16, "captions": 8}
        numbers = self.rows >> _PART_BITS
        ends = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(self.rows) <= 0)) + 1
        for start, end in pairwise([0, *ends.tolist(), len(numbers)]):
            if start == end:
                continue
            number = int(numbers[start])
            inside = self.rows[start:end] & (2**_PART_BITS - 1)
            found = [bytearray() for _ in columns]
            for block, values in enumerate(self.store.blocks(number, *columns)):
                mine = inside[(inside >= block * _BLOCK) & (inside < (block + 1) * _BLOCK)] - block * _BLOCK
                for column, part, value in zip(columns, found, values, strict=True):
                    part += np.frombuffer(value, f"V{widths[column]}")[mine].tobytes()
            yield number, [bytes(part) for part in found]

    def keys(self, column: str) -> NDArray[np.uint64]:
        """[n, 2]: the hash of each id or content."""
        made = np.empty((len(self), 2), ">u8")
        at = 0
        for _, (found,) in self._by_part(column):
            own = np.frombuffer(found, ">u8").reshape(-1, 2)
            made[at : at + len(own)] = own
            at += len(own)
        return made.byteswap(inplace=True).view(np.uint64) if np.little_endian else made.view(np.uint64)

    def contents(self) -> NDArray[np.uint64]:
        """See `Indexed`."""
        return self.keys("contents")

    def tell_apart(self) -> None:
        """Give ids of their own to those that share a name."""
        later, first = _repeats(self.keys("ids"))
        self.shared = np.unique(self.rows[np.concatenate([later, first])])

    def ranks(self) -> NDArray[np.uint64]:
        """See `Indexed`."""
        made = self.keys("ids")
        for at in np.flatnonzero(np.isin(self.rows, self.shared)).tolist():
            made[at] = np.frombuffer(rank(self[at].id.encode("utf-8", "surrogateescape")), ">u8")
        return made


def _same(source: Source, part: Part, place: Place, content: bytes) -> bytes:
    """The picture that was looked at; never another one that has taken its place, in a file or on the hub.

    Raises:
        OSError: it cannot be read, or is not the same.
    """
    data = source.read(part, place)
    if hashlib.blake2b(data, digest_size=16).digest() != content:
        raise OSError("it is another picture than when it was looked at; run again")
    return data


def _without_small(view: _Indexed, resolution: int, tally: _Tally) -> NDArray[np.int64]:
    """Those that are large enough."""
    small = view.sizes.min(axis=1, initial=2**31 - 1) < resolution / 2
    found = np.flatnonzero(small)
    for index, at in enumerate(found[: SHOWN + 1].tolist()):
        sample = view[at]
        problem = too_small(sample.where, sample.width, sample.height, resolution)
        tally.add(replace(problem, count=len(found) - SHOWN) if index == SHOWN else problem)
    return np.flatnonzero(~small)


def too_small(where: str, width: int, height: int, resolution: int) -> Problem:
    """The problem of a picture that would have to be blown up."""
    return Problem(
        where,
        f"{width}x{height} pixels is tiny for data.resolution {resolution}",
        f"use {-(-resolution // 2)} pixels or more on each side, or a smaller resolution",
        "tiny for data.resolution",
    )


def _without_repeated(
    view: _Indexed, good: NDArray[np.int64], source: Source, tally: _Tally
) -> NDArray[np.int64]:
    """The first of all that have one content and, where names are not to be shared, of one name."""
    columns = [("contents", "same picture as {}", "remove one of the two", "same picture as another")]
    if not source.repeats:
        fix = "give each picture a key of its own, in all shards"
        columns.append(("ids", "its key is that of {}", fix, "its key is that of another"))
    for column, what, fix, kind in columns:
        later, first = _repeats(view.take(good).keys(column) if len(good) < len(view) else view.keys(column))
        for index, (at, other) in enumerate(zip(good[later].tolist(), good[first].tolist(), strict=True)):
            where = view[at].where
            count_ = 1 if index < SHOWN else len(later) - SHOWN
            tally.add(Problem(where, what.format(view[other].where), fix, kind, count_))
            if index == SHOWN:
                break
        good = np.delete(good, later)
    return good


def _repeats(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions whose key stands before, in order, and where each stands first."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    again = np.zeros(len(order), bool)
    own = keys[order, 0]
    same = np.flatnonzero(own[1:] == own[:-1]) + 1
    again[same] = keys[order[same], 1] == keys[order[same - 1], 1]
    starts = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    later, first = order[again], order[starts[again]]
    sorting = np.argsort(later)
    return later[sorting], first[sorting]


def file_stamp(path: Path) -> str:
    """What changes with a file's content: bytes, times and inode.

    A file that was written within the last tick of its clock might change in it again: that is waited for.
    """
    found = path.stat()
    times = (found.st_mtime_ns, found.st_ctime_ns)
    tick = 2.0 if not any(when % 10**6 for when in times) else 0.05
    if 0 <= (age := time.time() - max(times) / 1e9) < tick:
        time.sleep(tick - age)
        found = path.stat()
    return stamp(found)


def stamp(found: os.stat_result) -> str:
    """See `file_stamp`."""
    return " ".join(map(str, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)))
