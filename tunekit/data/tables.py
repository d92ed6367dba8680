"""Pictures with captions in tables: parquet files, and data sets of the hub, whole or as a stream.

Parquet files on this machine are read here and not by `datasets`, which keeps copies in the home folder. The
hub is read through it, and with `data.streaming` whatever it can stream.
"""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from tunekit.data.files import (
    PICTURE_BYTES,
    SPLITS,
    Ignored,
    Listing,
    Problem,
    check_regular,
    no_split,
    read_file,
    shown,
    unreadable,
)
from tunekit.data.index import Entry, Part, PartError, Place, file_stamp, stamp
from tunekit.data.rows import caption_of, column_of, reason
from tunekit.errors import DataError

Columns = tuple[str | None, str | None]
"""Of the pictures and of the captions, where they were asked for."""
_BATCH = 64
"""Rows that are in memory at once while a table is looked through."""
_OPEN = 16
"""Files that a process keeps open."""


# Parquet files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parquet:
    """Parquet files as a source.

    Attributes:
        title: as the config names them.
        files: in order.
        columns: see `Columns`.
    """

    title: str
    files: tuple[Path, ...]
    columns: Columns = (None, None)
    needs_caption: bool = True

    repeats = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_groups"}

    @cached_property
    def _groups(self) -> _Groups:
        return _Groups(self.files)

    @property
    def settings(self) -> Sequence[str | None]:
        """See `index.Source`."""
        return *self.columns, str(self.needs_caption)

    def parts(self) -> list[Part]:
        """See `index.Source`."""
        return [_part(file, number) for number, file in enumerate(self.files)]

    def entries(self, part: Part) -> Iterator[Entry | Problem | Ignored]:
        """See `index.Source`."""
        import pyarrow.parquet

        file = self.files[part.number]
        try:
            check_regular(file)
            opened = pyarrow.parquet.ParquetFile(file)
            picture, text = self._chosen(opened.schema_arrow)
        except OSError as error:
            raise PartError(unreadable(file, error)) from error
        except DataError:
            raise
        except Exception as error:  # of pyarrow
            raise PartError(_broken(part, "no parquet", error)) from error
        row = 0
        try:
            for batch in opened.iter_batches(_BATCH, columns=[picture, *([text] if text else [])]):
                cells = batch.column(batch.schema.get_field_index(picture))
                texts = batch.column(batch.schema.get_field_index(text)).to_pylist() if text else []
                for index, cell in enumerate(cells):
                    where = f"{part.name}[{row}]"
                    words = partial(caption_of, texts[index], where, text, where) if text else _no_caption
                    found = cell.as_py()
                    load = partial(_bytes_of, found, file.parent)
                    yield Entry(_name_of(found), (row, 0), load, words, _size_of(found))
                    row += 1
        except Exception as error:  # of pyarrow
            raise PartError(_broken(part, "cannot be read", error)) from error
        finally:
            opened.close()

    def _chosen(self, schema: Any) -> tuple[str, str | None]:
        """The columns of the pictures and of the captions.

        Raises:
            DataError: it cannot be told, or is not there.
        """
        pictures = [part.name for part in schema if _holds_pictures(part.type)]
        picture = column_of("image_column", self.columns[0], pictures, schema.names, ["image"])
        if not self.needs_caption:
            return picture, None
        texts = [part.name for part in schema if _holds_text(part.type)]
        return picture, column_of("caption_column", self.columns[1], texts, schema.names, ["text", "caption"])

    def read(self, part: Part, place: Place) -> bytes:
        """See `index.Source`."""
        file = self.files[part.number]
        try:
            picture, _ = self._chosen(self._groups.opened(part).schema_arrow)
            cell = self._groups.cell(part, place[0], picture)
        except OSError:
            raise
        except Exception as error:  # of pyarrow
            raise OSError(reason(error)) from error
        return _bytes_of(cell, file.parent)

    def where(self, part: Part, place: Place, name: str) -> str:
        """See `index.Source`."""
        return f"{part.name}[{place[0]}]"


def parquet(
    title: str, root: Path, files: Sequence[Path], split: str, columns: Columns, *, needs_caption: bool
) -> Listing:
    """The parquet files of a split.

    Args:
        root: the folder that they lie in, or the one file.
        split: of those files whose names say one, as `train-00000-of-00001.parquet`.

    Raises:
        DataError: no such split.
    """
    made = Listing()
    chosen = []
    for file in of_split(root, files, split, made, "parquet files"):
        try:
            check_regular(file)
            chosen.append(file)
        except OSError as error:
            made.problems.append(unreadable(file, error))
    made.source = Parquet(title, tuple(chosen), columns, needs_caption)
    return made


def of_split(root: Path, files: Sequence[Path], split: str, made: Listing, what: str) -> list[Path]:
    """Files of the split, where names say which: their own, as the hub writes them, or their folders'.

    Args:
        made: gets the others, and a word where the split has no effect.
        what: they are.

    Raises:
        DataError: there is none of that name.
    """
    if root.is_file():
        named: dict[Path, str] = {}
    else:
        named = {file: found for file in files if (found := _split_of(file.relative_to(root)))}
    there = set(named.values())
    if not there:
        if split != "train":
            made.notes.append(f"data.split={split} has no effect: no name in {shown(root)} says a split")
        return list(files)
    if split not in there:
        if len(there) == 1 and split == "train":
            return list(files)
        raise no_split(split, there)
    for file in files:
        if (other := named.get(file)) != split:
            fix = (
                f"data.split={other} reads them" if other else "data.split reads only what is named after it"
            )
            made.ignored.append(Ignored(shown(file), f"{what} of another split", fix))
    return [file for file in files if named.get(file) == split]


def _split_of(file: Path) -> str | None:
    match = re.fullmatch(r"(\w[\w.]*?)-\d+-of-\d+", file.stem)
    if match:
        return match[1]
    match = re.fullmatch(r"([a-z]+)(?:[-_.]?\d+)?", file.stem)
    words = [*(match.groups() if match else ()), *reversed(file.parts[:-1])]
    return next((word for word in words if word in SPLITS), None)


def _part(file: Path, number: int) -> Part:
    try:
        stamp = file_stamp(file)
    except OSError as error:
        raise DataError(unreadable(file, error).what, where=shown(file)) from error
    return Part(shown(file), os.path.abspath(file), stamp, number)  # noqa: PTH100 - links stay as they are


def _broken(part: Part, what: str, error: BaseException) -> Problem:
    return Problem(part.name, f"{what} ({reason(error)})", "fetch it again")


def _no_caption() -> tuple[str, Problem | None]:
    return "", None


def _holds_pictures(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return "bytes" in {kind.field(index).name for index in range(kind.num_fields)}
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _holds_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


class _Groups:
    """Parquet files, of whose row groups the last two stay in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._lock = threading.RLock()
        self._open = lru_cache(maxsize=_OPEN)(self._opened)
        self._load = lru_cache(maxsize=2)(self._read)

    def opened(self, part: Part) -> Any:
        """A file.

        Raises:
            OSError: it has changed since it was looked at.
        """
        with self._lock:
            if stamp(self._files[part.number].stat()) != part.stamp:
                raise OSError("the file has changed since it was looked at; run again")
            return self._open(part)[0]

    def _opened(self, part: Part) -> tuple[Any, list[int]]:
        """A file, and the first row of each of its groups."""
        import pyarrow.parquet

        file = self._files[part.number]
        opened = pyarrow.parquet.ParquetFile(file)
        starts, at = [], 0
        for group in range(opened.metadata.num_row_groups):
            starts.append(at)
            at += opened.metadata.row_group(group).num_rows
        return opened, starts

    def _read(self, part: Part, group: int, column: str) -> Any:
        return self._open(part)[0].read_row_group(group, columns=[column]).column(0)

    def cell(self, part: Part, row: int, column: str) -> Any:
        """One value."""
        with self._lock:
            starts = self._open(part)[1]
            group = bisect_right(starts, row) - 1
            return self._load(part, group, column)[row - starts[group]].as_py()


# Cells ------------------------------------------------------------------------------------------------------


def _bytes_of(cell: Any, folder: Path, load: Callable[[str], bytes] | None = None) -> bytes:
    """The picture in a cell: its bytes, or the file that it names."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return load(cell) if load is not None else read_file(folder / cell, PICTURE_BYTES)
    if not isinstance(cell, bytes) or not cell:
        raise OSError("the row has no picture")
    if len(cell) > PICTURE_BYTES:
        raise OSError(f"it has {len(cell):,} bytes, and {PICTURE_BYTES:,} are the most")
    return cell


def _name_of(cell: Any, root: str = "") -> str:
    """The name of a picture, where its row has one: its path in the data set.

    Of a path on the machine that wrote it only the last part is kept; it says nothing elsewhere.
    """
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if not isinstance(path, str):
        return ""
    path = path.partition("::")[0]  # of what is in an archive, its name there
    path = re.sub(r"^hf://datasets/[^@]+@[^/]+/|^\w+://", "", path)
    if root and path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) + 1 :]
    elif path.startswith("/") or re.match(r"[A-Za-z]:[\\/]", path):
        path = re.split(r"[\\/]", path)[-1]
    return path.removeprefix("./").encode("utf-8", "replace").decode()


def _size_of(cell: Any) -> int:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return len(data) if isinstance(data, bytes) else 0


# datasets ---------------------------------------------------------------------------------------------------


class _OfSplit:
    """What data sets that `datasets` opens have in common: a split, and columns that may be named."""

    split: str
    columns: Columns
    needs_caption: bool
    repeats = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    @property
    def settings(self) -> Sequence[str | None]:
        """See `index.Source`."""
        return self.split, *self.columns, str(self.needs_caption)


@dataclass(frozen=True)
class Hub(_OfSplit):
    """A data set of the hub that `datasets` has fetched to this machine.

    Attributes:
        title: its id.
    """

    title: str
    split: str = "train"
    columns: Columns = (None, None)
    needs_caption: bool = True

    @cached_property
    def _table(self) -> _Table:
        """Undecoded, so that we meet the broken ones."""
        return _Table(_loaded(self.title, self.split), self.columns, needs_caption=self.needs_caption)

    def parts(self) -> list[Part]:
        """See `index.Source`."""
        return [Part(self.title, self.title, str(self._table.rows._fingerprint))]

    def entries(self, part: Part) -> Iterator[Entry | Problem | Ignored]:
        """See `index.Source`."""
        table = self._table
        yield from table.entries(table.rows, part.name, "")

    def read(self, part: Part, place: Place) -> bytes:
        """See `index.Source`."""
        try:
            cell = self._table.rows[place[0]][self._table.picture]
        except Exception as error:  # of datasets or pyarrow
            raise OSError(reason(error)) from error
        return _bytes_of(cell, Path(), _fetched)

    def where(self, part: Part, place: Place, name: str) -> str:
        """See `index.Source`."""
        return f"{part.name}[{place[0]}]"


class _Cursors:
    """How far the shards of a stream were read; few at a time, each forward."""

    _MOST = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[int, Iterator[Any]]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cursors, ()

    def row(self, number: int, wanted: int, begin: Callable[[], Any]) -> Any:
        """A row of a shard.

        Raises:
            OSError: the stream has no such row any more.
        """
        with self._lock:
            at, rows = self._open.pop(number, (0, None))
            if rows is None or at > wanted:
                at, rows = 0, iter(begin())
            for row in rows:
                at += 1
                if at > wanted:
                    self._open[number] = at, rows
                    if len(self._open) > self._MOST:
                        self._open.popitem(last=False)
                    return row
        raise OSError("the stream ends before it")


@dataclass(frozen=True)
class HubStream(_OfSplit):
    """What `datasets` streams: a data set of the hub, or files here in any form that it knows.

    Rows come in order and are not kept on this disk. A picture that is asked for again, behind others, is
    reached from the beginning of its shard; pictures in order, or skipping some, are one pass.

    Attributes:
        title: hub id, folder or file.
    """

    title: str
    path: str
    split: str = "train"
    columns: Columns = (None, None)
    needs_caption: bool = True
    _cursors: _Cursors = field(default_factory=_Cursors, compare=False, repr=False)

    @cached_property
    def _table(self) -> _Table:
        rows = _loaded(self.path, self.split, streaming=True)
        return _Table(rows, self.columns, needs_caption=self.needs_caption)

    def parts(self) -> list[Part]:
        """See `index.Source`."""
        count = self._table.rows.num_shards
        stamps = _origins(self.path, self.split)
        if len(stamps) != count:  # a shard that is not one file
            stamps = [str(stamps)] * count
        return [
            Part(
                f"{self.title}[{number}]" if count > 1 else self.title,
                f"{self.title} {number} of {count}",
                stamp,
                number,
            )
            for number, stamp in enumerate(stamps)
        ]

    def _shard(self, number: int) -> Any:
        rows = self._table.rows
        return rows.shard(num_shards=rows.num_shards, index=number) if rows.num_shards > 1 else rows

    def entries(self, part: Part) -> Iterator[Entry | Problem | Ignored]:
        """See `index.Source`."""
        yield from self._table.entries(self._shard(part.number), part.name, os.path.abspath(self.path))  # noqa: PTH100

    def read(self, part: Part, place: Place) -> bytes:
        """See `index.Source`."""
        try:
            row = self._cursors.row(part.number, place[0], partial(self._shard, part.number))
        except Exception as error:  # of datasets, pyarrow or the network
            raise OSError(reason(error)) from error
        return _bytes_of(row[self._table.picture], Path(), _fetched)

    def where(self, part: Part, place: Place, name: str) -> str:
        """See `index.Source`."""
        return f"{part.name}[{place[0]}]"


class _Table:
    """Rows of `datasets`, and which of their columns are used; pictures come as bytes or paths.

    Args:
        rows: a data set, or one that is streamed.

    Raises:
        DataError: no such column.
    """

    def __init__(self, rows: Any, columns: Columns, *, needs_caption: bool) -> None:
        import datasets

        if rows.features is None:
            raise DataError(
                "the stream does not say which columns it has",
                hint="give the data set features, or use parquet files or shards",
            )
        features: dict[str, Any] = dict(rows.features)
        pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        self.picture = column_of("image_column", columns[0], pictures, list(features), ["image"])
        self.text = None
        if needs_caption:
            texts = [key for key, part in features.items() if getattr(part, "dtype", "") in _STRINGS]
            texts = [key for key in texts if not key.startswith("__")]  # of shards: key and url
            usual = ["text", "caption", "txt"]
            self.text = column_of("caption_column", columns[1], texts, list(features), usual)
        rows = rows.select_columns([self.picture, *([self.text] if self.text else [])])
        if self.picture not in pictures:
            rows = rows.cast_column(self.picture, datasets.Image())
        self.rows = rows.cast_column(self.picture, datasets.Image(decode=False))

    def entries(self, rows: Any, name: str, root: str) -> Iterator[Entry | Problem | Ignored]:
        """See `index.Source`."""
        try:
            for number, row in enumerate(rows):
                where = f"{name}[{number}]"
                cell = row[self.picture]
                words = _no_caption
                if self.text:
                    words = partial(caption_of, row[self.text], where, self.text, where)
                load = partial(_bytes_of, cell, Path(), _fetched)
                yield Entry(_name_of(cell, root), (number, 0), load, words, _size_of(cell))
        except Exception as error:  # of datasets, pyarrow or the network
            raise PartError(
                Problem(name, f"cannot be read to its end ({reason(error)})", "try again")
            ) from error


_STRINGS = ("string", "large_string")


def _fetched(path: str) -> bytes:
    """A picture that a row names, here or on the hub."""
    if "://" not in path:
        return read_file(Path(path), PICTURE_BYTES)
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as opened:
            return bytes(opened.read(PICTURE_BYTES))
    except Exception as error:  # of the network
        raise OSError(reason(error)) from error


def _given(path: str, split: str) -> tuple[str, dict[str, Any]]:
    """What `datasets` is told: a name or folder, or how to read files of a kind."""
    place = Path(path)
    if place.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}.get(place.suffix)
        if kind is None:
            hint = "give a folder, a .parquet or .tar file, or a hub id"
            raise DataError("is a file that cannot be streamed", hint=hint)
        return kind, {"data_files": {split: str(place)}}
    return path, {}


def _loaded(path: str, split: str, *, streaming: bool = False) -> Any:
    """A data set.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    datasets.disable_progress_bars()
    name, more = _given(path, split)
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming, **more)
    except Exception as error:  # anything from ValueError to its own and the hub's exceptions
        raise DataError(
            f"neither a folder here nor a data set that could be loaded from the hub ({reason(error)})"
            if not Path(path).exists()
            else f"cannot be streamed ({reason(error)})",
            hint="check the spelling, the split and the connection",
        ) from error


def _origins(path: str, split: str) -> list[str]:
    """Of each file of a stream, what changes with it: the commit of the hub, or its time here."""
    import datasets

    name, more = _given(path, split)
    try:
        files = datasets.load_dataset_builder(name, **more).config.data_files or {}
    except Exception as error:
        raise DataError(
            f"cannot be listed ({reason(error)})", hint="check the connection, and try again"
        ) from error
    own = files.get(split, [])
    origins = list(getattr(own, "origin_metadata", ()))
    local = [file_stamp(Path(file)) if Path(file).is_file() else "" for file in own]
    return [str([file, *origin, here]) for file, origin, here in zip(own, origins, local, strict=True)]
