"""Pictures that the rows of a metadata file name, and what a cell of any table is good for.

Metadata is read here and not by `datasets`, which keeps copies in the home folder, tells splits by words in
the names of files, and goes by the time of a file where it should look into it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunekit.data.files import (
    CAPTION_BYTES,
    Ignored,
    Listing,
    Problem,
    Tree,
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
            text = column_of("caption_column", caption_column, fitting, columns, ["text", "caption"])
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
            caption, problem = caption_of(row.get(text), shown(found), text, where) if text else ("", None)
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
        problems.append(Problem(shown(file), f"cannot be read ({reason(error)})", "write it again"))
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
            yield f":{number}", f"no JSON ({reason(error)})"
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


# Values -----------------------------------------------------------------------------------------------------


def caption_of(value: Any, where: str, column: str | None, place: str) -> tuple[str, Problem | None]:
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


def column_of(
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


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    if isinstance(error, OSError):
        return why_not(error)
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
