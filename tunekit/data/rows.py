"""Pictures with captions in rows: of a metadata file, of parquet files, or of a data set on the hub.

What is on this machine is read here and not by `datasets`, which keeps copies in the home folder, tells
splits by words in the names of files, and goes by the time of a file where it should look into it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tunekit.data.files import (
    CAPTION_BYTES,
    PICTURE_BYTES,
    SPLITS,
    Ignored,
    Listing,
    Problem,
    Raw,
    Tree,
    check_regular,
    no_split,
    picture_of,
    read_file,
    same_name,
    shown,
    unreadable,
    why_not,
)
from tunekit.errors import DataError, did_you_mean

METADATA_BYTES = 2**28
"""Most that is read of a metadata file: some million rows."""
Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its values."""


# Metadata ---------------------------------------------------------------------------------------------------


def metadata(
    tree: Tree, image_column: str | None, caption_column: str | None, *, needs_caption: bool
) -> tuple[Listing, set[Path]]:
    """The pictures that the metadata files of a folder name, and all picture files that those decide about.

    A file name counts from the folder of the metadata file; that decides about everything below it.

    Raises:
        DataError: it cannot be told, or is not there, which column to use.
    """
    made = Listing()
    known = {same_name(tree.id_of(picture)): picture for picture in tree.pictures}
    named: set[Path] = set()
    governed: dict[Path, Path] = {}
    for file in tree.metadata:
        if file.parent in governed:
            first = governed[file.parent].name
            made.ignored.append(Ignored(shown(file), "metadata files beside another", f"{first} is read"))
            continue
        governed[file.parent] = file
        rows, problems = _read(file)
        made.problems += problems
        if not rows:
            continue
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        picture = _name_column(image_column, columns, file)
        text = None
        if needs_caption:
            fitting = [name for name in columns if _is_text([row.get(name) for _, row in rows])]
            fitting = [name for name in fitting if name != picture and not name.endswith("file_name")]
            text = _column("caption_column", caption_column, fitting, columns, ["text", "caption"])
        for where, row in rows:
            found = _named(tree, file, known, where, row.get(picture), picture)
            if isinstance(found, Problem):
                made.problems.append(found)
                continue
            if found in named:
                what, fix = f"names {tree.id_of(found)} once more", "remove one of the rows"
                made.problems.append(Problem(where, shown(what), fix, "names a picture once more"))
                continue
            named.add(found)
            caption, problem = _caption(row.get(text), shown(found), text, where) if text else ("", None)
            made.raw.append(picture_of(tree, found, caption, problem))
    decided: set[Path] = set()
    for picture_file in tree.pictures:
        above = next((governed[folder] for folder in picture_file.parents if folder in governed), None)
        if above is not None:
            decided.add(picture_file)
            if picture_file not in named:
                why = f"pictures that no row of {above.name} names"
                made.ignored.append(Ignored(shown(picture_file), why, f"add rows to {shown(above)}"))
    return made, decided


def _read(file: Path) -> tuple[list[Row], list[Problem]]:
    """Rows of a metadata file of any kind, and what is wrong in it."""
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        data = read_file(file, METADATA_BYTES)
        for where, row in {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[file.suffix](
            data
        ):
            place = f"{shown(file)}{where}"
            if isinstance(row, str):
                problems.append(Problem(place, row, "correct the line", "a line that cannot be read"))
            else:
                rows.append((place, row))
    except OSError as error:
        problems.append(unreadable(file, error))
    except UnicodeDecodeError as error:
        problems.append(Problem(shown(file), f"not UTF-8 (byte {error.start})", "save it as UTF-8"))
    except Exception as error:  # of pyarrow
        problems.append(Problem(shown(file), f"cannot be read ({_reason(error)})", "write it again"))
    if not rows and not problems:
        problems.append(Problem(shown(file), "has no rows", "fill it, or remove it to use text files"))
    return rows, problems


def _json_rows(data: bytes) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield f":{number}", f"not UTF-8 (byte {error.start} of the line)"
        except (ValueError, RecursionError) as error:
            yield f":{number}", f"no JSON ({_reason(error)})"
        else:
            yield f":{number}", row if isinstance(row, dict) else "no JSON object, {...}"


def _csv_rows(data: bytes) -> Iterator[tuple[str, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield f":{reader.line_num}", f"no CSV ({error})"
            return
        if row is None:
            return
        if None in row:
            yield f":{reader.line_num}", "more fields than the first line names"
        else:
            yield f":{reader.line_num}", {str(key): value for key, value in row.items()}


def _parquet_rows(data: bytes) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    for number, row in enumerate(table.to_pylist()):
        yield f"[{number}]", row


def _name_column(asked: str | None, columns: Sequence[str], file: Path) -> str:
    """The column of file names: `file_name`, or `x_file_name` if `x` is asked for or it is the only one."""
    others = [name for name in columns if name.endswith("_file_name")]
    if asked is not None:
        wanted = [asked, f"{asked}_file_name", *(["file_name"] if asked == "image" else [])]
        for name in wanted:
            if name in columns:
                return name
        raise _no_column("image_column", asked, columns)
    if "file_name" in columns:
        return "file_name"
    if len(others) == 1:
        return others[0]
    raise DataError(
        f"{shown(file)} has no column file_name (columns: {_listed(columns)})",
        hint="name the pictures in a column file_name, or set data.image_column",
    )


def _named(
    tree: Tree, file: Path, known: Mapping[str, Path], where: str, name: Any, column: str
) -> Path | Problem:
    """The picture that a row names."""
    if not isinstance(name, str) or not name or "\0" in name:
        return Problem(where, f"no file name in {column}", "write the picture's path there", "no file name")
    root = tree.root.absolute()
    place = file.absolute().parent / name
    if "\\" in name and not os.path.lexists(place):  # written on Windows
        place = file.absolute().parent / name.replace("\\", "/")
    parts: list[str] = []
    for part in place.relative_to(root).parts if place.is_relative_to(root) else ("..",):
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            return Problem(
                where, f"names {shown(name)!r}, which is outside the folder", "copy it there", "outside"
            )
    inside = "/".join(parts)
    if (found := known.get(same_name(inside))) is not None:
        return found
    if inside and os.path.lexists(tree.root / inside):
        return tree.root / inside
    fix = did_you_mean(shown(inside), map(shown, known)) or "correct the name, or remove the row"
    return Problem(
        where, f"names {shown(name)!r}, which is not there", fix, "names what is not there; correct the names"
    )


# Parquet files ----------------------------------------------------------------------------------------------


def parquet(
    root: Path,
    files: Sequence[Path],
    split: str,
    columns: tuple[str | None, str | None],
    *,
    needs_caption: bool,
) -> Listing:
    """The rows of parquet files.

    Args:
        root: the folder that they lie in, or the one file.
        split: of those files whose names say one, as `train-00000-of-00001.parquet`.
        columns: of the pictures and the captions, where they were asked for.

    Raises:
        DataError: no such split or column.
    """
    import pyarrow.parquet

    made = Listing()
    files = _of_split(root, files, split, made)
    groups = _Groups(files)
    row = 0
    for index, file in enumerate(files):
        try:
            check_regular(file)
            schema = groups.open(index).schema_arrow
        except OSError as error:
            made.problems.append(unreadable(file, error))
            continue
        except Exception as error:  # of pyarrow
            made.problems.append(Problem(shown(file), f"no parquet ({_reason(error)})", "fetch it again"))
            continue
        pictures = [part.name for part in schema if _holds_pictures(part.type)]
        picture = _column("image_column", columns[0], pictures, schema.names, ["image"])
        text, captions = None, None
        if needs_caption:
            texts = [part.name for part in schema if _holds_text(part.type)]
            text = _column("caption_column", columns[1], texts, schema.names, ["text", "caption"])
        try:
            if text is not None:
                captions = pyarrow.parquet.read_table(file, columns=[text]).column(0).to_pylist()
            count = groups.open(index).metadata.num_rows
        except Exception as error:  # of pyarrow
            made.problems.append(Problem(shown(file), f"cannot be read ({_reason(error)})", "fetch it again"))
            continue
        for at in range(count):
            where = f"{shown(file)}[{at}]"
            caption, problem = _caption(captions[at], where, text, where) if captions else ("", None)
            read = partial(_cell, partial(groups.cell, index, at, picture), file.parent)
            made.raw.append(Raw(f"{row:06d}", where, read, caption, problem, file, part=f"[{at}].{picture}"))
            row += 1
    return made


def _of_split(root: Path, files: Sequence[Path], split: str, made: Listing) -> list[Path]:
    """Files of the split, where names say which: their own, as the hub writes them, or their folders'."""
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
            made.ignored.append(Ignored(shown(file), "parquet files of another split", fix))
    return [file for file in files if named.get(file) == split]


def _split_of(file: Path) -> str | None:
    match = re.fullmatch(r"(\w[\w.]*?)-\d+-of-\d+", file.stem)
    if match:
        return match[1]
    match = re.fullmatch(r"([a-z]+)(?:[-_.]?\d+)?", file.stem)
    words = [*(match.groups() if match else ()), *reversed(file.parts[:-1])]
    return next((word for word in words if word in SPLITS), None)


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
        self._lock = threading.Lock()
        self.open = lru_cache(maxsize=None)(self._open)
        self._starts = lru_cache(maxsize=None)(self._first_rows)
        self._load = lru_cache(maxsize=2)(self._read)

    def _open(self, index: int) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self._files[index])

    def _read(self, index: int, group: int, column: str) -> Any:
        return self.open(index).read_row_group(group, columns=[column]).column(0)

    def _first_rows(self, index: int) -> list[int]:
        """Of each row group."""
        found, at = [], 0
        known = self.open(index).metadata
        for group in range(known.num_row_groups):
            found.append(at)
            at += known.row_group(group).num_rows
        return found

    def cell(self, index: int, row: int, column: str) -> Any:
        """One value."""
        with self._lock:
            starts = self._starts(index)
            group = bisect_right(starts, row) - 1
            return self._load(index, group, column)[row - starts[group]].as_py()


def _cell(get: Callable[[], Any], folder: Path) -> bytes:
    """The picture in a cell: its bytes, or the file that it names."""
    try:
        cell = get()
    except Exception as error:  # of pyarrow or datasets
        raise OSError(_reason(error)) from error
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return read_file(folder / cell, PICTURE_BYTES)
    if not isinstance(cell, bytes) or not cell:
        raise OSError("the row has no picture")
    if len(cell) > PICTURE_BYTES:
        raise OSError(f"it has {len(cell):,} bytes, and {PICTURE_BYTES:,} are the most")
    return cell


# The hub ----------------------------------------------------------------------------------------------------


def hub(name: str, split: str, columns: tuple[str | None, str | None], *, needs_caption: bool) -> Listing:
    """The rows of a data set on the hub, undecoded, so that we meet the broken ones.

    Raises:
        DataError: it cannot be loaded, or it has no such column.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # anything from ValueError to its own and the hub's exceptions
        raise DataError(
            f"neither a folder here nor a data set that could be loaded from the hub ({_reason(error)})",
            hint="check the spelling, the split and the connection",
        ) from error
    features: dict[str, Any] = dict(loaded.features)
    pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    picture = _column("image_column", columns[0], pictures, list(features), ["image"])
    text = None
    if needs_caption:
        texts = [key for key, part in features.items() if getattr(part, "dtype", "") in _STRINGS]
        text = _column("caption_column", columns[1], texts, list(features), ["text", "caption"])
    loaded = loaded.select_columns([picture, *([text] if text else [])])
    if picture not in pictures:
        loaded = loaded.cast_column(picture, datasets.Image())
    loaded = loaded.cast_column(picture, datasets.Image(decode=False))
    made = Listing()
    for row in range(len(loaded)):
        where = f"{name}[{row}]"
        caption, problem = _caption(loaded[row][text], where, text, where) if text else ("", None)
        read = partial(_cell, partial(_hub_cell, loaded, row, picture), Path())
        made.raw.append(Raw(f"{row:06d}", where, read, caption, problem))
    return made


_STRINGS = ("string", "large_string")


def _hub_cell(loaded: Any, row: int, column: str) -> Any:
    return loaded[row][column]


# Values -----------------------------------------------------------------------------------------------------


def _caption(value: Any, where: str, column: str | None, place: str) -> tuple[str, Problem | None]:
    """The text of a cell, or why there is none.

    Args:
        where: of the picture, which a missing caption is told of.
        place: of the row.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        fix = "write what the picture shows there"
        return "", Problem(where, f"no caption in column {column!r}", fix, "no caption")
    if not isinstance(value, str):
        kind = (
            f"a list of {len(value)}"
            if isinstance(value, list | tuple)
            else f"of type {type(value).__name__}"
        )
        fix = f"write one text into {column!r}, or name another column with data.caption_column"
        return "", Problem(
            place, f"the caption in column {column!r} is {kind}, not a text", fix, "not a text"
        )
    if len(value) > CAPTION_BYTES:
        what = f"the caption has {len(value):,} characters"
        return "", Problem(
            place, what, f"{CAPTION_BYTES:,} are the most", "the caption has too many characters"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"the caption holds what is no text ({value[error.start]!a})"
        return "", Problem(place, what, "write it again", "the caption holds what is no text")
    text = " ".join(value.split())
    if not text:
        return "", Problem(where, f"no caption in column {column!r}", "write what the picture shows there")
    return text, None


def _is_text(values: Iterable[Any]) -> bool:
    """Whether a column holds texts and gaps alone."""
    kinds = {type(value) for value in values}
    return str in kinds and kinds <= {str, type(None)}


def _column(
    key: str, asked: str | None, fitting: Sequence[str], columns: Sequence[str], usual: Sequence[str]
) -> str:
    """The column to use: the one asked for, else a usual name, else the only fitting one."""
    if asked is not None:
        if asked not in columns:
            raise _no_column(key, asked, columns)
        return asked
    named = [name for name in usual if name in fitting]
    alone = list(fitting) if len(fitting) == 1 else []
    for name in [*named, *alone, *(name for name in usual if name in columns)]:
        return name
    raise DataError(f"cannot tell which column to use (columns: {_listed(columns)})", hint=f"set data.{key}")


def _no_column(key: str, asked: str, columns: Sequence[str]) -> DataError:
    nearest = did_you_mean(asked, columns) or f"columns: {_listed(columns)}"
    return DataError(f"data.{key}: no column {asked!r}", hint=nearest)


def _listed(columns: Sequence[str]) -> str:
    return shown(", ".join(columns))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return why_not(error)
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
