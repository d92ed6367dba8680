"""The files that tunekit writes for itself, read back strictly: each is as it should be, or an error of ours.

A record is a small text file of a run: artifact.json, chain.json, plan.json, a checkpoint's state.json, a
line of metrics.jsonl. Anybody may have edited, cut or replaced it, so nothing of it is used before it was
looked at.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tunekit import install
from tunekit.errors import ArtifactError, TunekitError

FORMATS = ("adapter", "torch", "onnx", "openvino", "tensorrt")
"""Of artifacts."""
MOST_BYTES = 256 * 2**20
"""A text file of ours is never larger: half a million steps of metrics are 80 MB."""
_DIGITS = 20
_LARGEST = 1e100
"""Of a figure; what is beyond says as little as infinity."""

R = TypeVar("R", bound="Record")


# Reading ----------------------------------------------------------------------------------------------------


def read_bytes(path: Path, *, error: type[TunekitError] = ArtifactError) -> bytes:
    """The content of a regular file of bounded size.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: (or `error`) it is something else, or cannot be read.
    """
    try:
        # Never waits for a writer, as opening a named pipe would.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error("is no regular file", where=str(path))
            if found.st_size > MOST_BYTES:
                message = f"is too large for what it should be ({found.st_size} bytes)"
                raise error(message, where=str(path))
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise FileNotFoundError(*problem.args) from problem
    except (OSError, ValueError) as problem:
        raise error(f"cannot be read: {_reason(problem)}", where=str(path)) from problem


def read_json(path: Path, *, error: type[TunekitError] = ArtifactError, hint: str | None = None) -> Any:
    """The JSON of a file. What JSON has no word for, NaN and infinity, is None.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: (or `error`) it cannot be read, or is no JSON.
    """
    content = read_bytes(path, error=error)
    try:
        return parse(content)
    except ValueError as problem:
        raise _damaged(path, _reason(problem), error, hint) from problem


def parse(content: bytes) -> Any:
    """JSON out of bytes; NaN and infinity are None.

    Raises:
        ValueError: it is no JSON in UTF-8, is nested too deeply, or holds an endless number.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_none, parse_float=_float, parse_int=_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(
    path: Path, record: type[R], *, error: type[TunekitError] = ArtifactError, hint: str | None = None
) -> R:
    """A record out of its file.

    Raises:
        FileNotFoundError: there is none.
        ArtifactError: (or `error`) it is damaged, or of a newer version; says what and where.
    """
    content = read_json(path, error=error, hint=hint)
    record.check_version(content, path, error)
    try:
        return record.model_validate(content)
    except ValidationError as problem:
        raise _damaged(path, first_problem(problem), error, hint) from problem


def read_plain(
    path: Path, record: type[Record], *, error: type[TunekitError] = ArtifactError
) -> dict[str, Any]:
    """What a record's file holds, as it stands there, once it is known to be one; see `read`."""
    read(path, record, error=error)
    content: dict[str, Any] = read_json(path, error=error)
    return content


def read_mapping(path: Path, *, error: type[TunekitError] = ArtifactError) -> dict[str, Any]:
    """The JSON object of a file; see `read_json`."""
    content = read_json(path, error=error)
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no mapping of keys to values", error, None)
    return content


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong: "lineage[0].seconds: input should be a valid number"."""
    found = error.errors(include_url=False, include_input=False)[0]
    text = ""
    for part in found["loc"]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    message = found["msg"].removeprefix("Value error, ")
    return f"{text}: {message[:1].lower()}{message[1:]}" if text else message


def _damaged(path: Path, why: str, error: type[TunekitError], hint: str | None) -> TunekitError:
    return error(f"{path.name} is damaged ({why})", where=str(path), hint=hint)


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0] if text else type(error).__name__


def _none(_: str) -> None:
    return None


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


# Records ----------------------------------------------------------------------------------------------------


def _folder_name(text: str) -> str:
    if not text or text in {".", ".."} or any(letter in text for letter in "/\\\0"):
        raise ValueError("is no name of a folder")
    return text


def _place(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("is no path")
    return text


def _inside(text: str) -> str:
    parts = _place(text).replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ValueError("is no path inside the folder")
    return text


FolderName = Annotated[str, AfterValidator(_folder_name)]
Place = Annotated[str, AfterValidator(_place)]
Inside = Annotated[str, AfterValidator(_inside)]
Figure = float | int | bool | str | None
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """A file of ours. Types are exact; keys that are not known are from a later version, and let be."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @classmethod
    def newest(cls) -> int | None:
        """The highest version that is known; None where files of this kind have none."""
        return None

    @classmethod
    def check_version(cls, content: Any, path: Path, error: type[TunekitError]) -> None:
        """Raises an error if the content is of a version that is not known."""
        newest = cls.newest()
        if newest is None or not isinstance(content, dict):
            return
        version = content.get("version")
        if isinstance(version, int) and not isinstance(version, bool) and version > newest:
            raise error(
                f"written by a newer tunekit (version {version}, this one knows {newest})",
                where=str(path),
                hint=install.newer(),
            )


class PictureRecord(Record):
    """A picture of a step."""

    model_config = ConfigDict(extra="allow")

    file: Inside
    label: str
    prompt: str = ""
    seed: int = 0


class DetailsRecord(Record):
    """What a step says beside its figures; what is read by name is as it should be."""

    model_config = ConfigDict(extra="allow")

    failure: str | None = None
    artifacts: dict[str, dict[str, Any]] | None = None
    identity: dict[str, Any] = {}
    step: Count = 0


class StepRecord(Record):
    """A step of a lineage."""

    kind: str
    artifact: FolderName
    settings: dict[str, Any] = {}
    seconds: Seconds = 0.0
    metrics: dict[str, Figure] = {}
    parent_hash: str | None = None
    details: DetailsRecord = DetailsRecord()
    pictures: list[PictureRecord] = []

    def plain(self) -> dict[str, Any]:
        """As it was written."""
        return {
            **{name: getattr(self, name) for name in type(self).model_fields},
            "details": self.details.model_dump(exclude_unset=True),
            "pictures": [picture.model_dump(exclude_unset=True) for picture in self.pictures],
        }


class OpenedRecord(Record):
    """How a model is opened."""

    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    base: Place | None = None


class FileRecord(Record):
    """A file of a model, as it was written."""

    bytes: Count
    modified_ns: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _format(text: str) -> str:
    if text not in FORMATS:
        raise ValueError(f'unknown format "{text}"')
    return text


class ArtifactRecord(Record):
    """artifact.json."""

    version: Annotated[int, Field(ge=1)]
    format: Annotated[str, AfterValidator(_format)]
    family: str
    model: Place | None
    source: Place | None = None
    base: Place | None = None
    opened: OpenedRecord | None = None
    sampling: dict[str, Any] | None = None
    runtime: dict[str, Any] | None = None
    hash: Annotated[str, Field(min_length=1)]
    files: dict[Inside, FileRecord] | None = None
    made: dict[str, str] = {}
    lineage: list[StepRecord]

    @classmethod
    def newest(cls) -> int:
        """See `Record.newest`."""
        return 2


class ChainRecord(Record):
    """chain.json."""

    version: Annotated[int, Field(ge=1)] = 1
    folders: list[FolderName]

    @classmethod
    def newest(cls) -> int:
        """See `Record.newest`."""
        return 1


class PeaksRecord(Record):
    """What was measured of a phase; each is null where nobody can measure it."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


class PhaseRecord(Record):
    """A phase of a plan."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    measured: PeaksRecord = PeaksRecord()
    error: dict[str, float] = {}


class RanOutRecord(Record):
    """Once that memory ran out."""

    budget_bytes: int
    why: str = ""


class PlanRecord(Record):
    """plan.json, as far as it is read again."""

    device: str
    budget_bytes: int
    device_bytes: int
    peak_phase: str
    phases: dict[str, PhaseRecord]
    levers: list[str] = []
    ran_out: list[RanOutRecord] = []
    optimizer: str | None = None
    optimizer_in_backward: bool | None = None
    precision: str | None = None
    base_precision: str | None = None


class StateRecord(Record):
    """state.json of a checkpoint."""

    model_config = ConfigDict(extra="allow")

    version: int
    step: Count
    identity: dict[str, Any]
    seconds: Seconds = 0.0
    metrics: dict[str, float | int | None] = {}
    recent: list[float] = []
    scaler: dict[str, Any] | None = None
    waiting: list[dict[str, Any]] = []


# Metrics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """What a metrics.jsonl holds.

    Attributes:
        rows: by step, in rising order; of two with one step the later.
        lines: the line of each row, as it stands there.
        unread: lines that are no rows.
    """

    rows: list[dict[str, Any]]
    lines: list[bytes]
    unread: list[bytes]


def metrics_of(path: Path) -> Metrics:
    """Reads a metrics.jsonl line by line; one that is damaged costs no other.

    Raises:
        ArtifactError: the file is there and cannot be read.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return Metrics([], [], [])
    rows: dict[int, tuple[dict[str, Any], bytes]] = {}
    unread = []
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            unread.append(line)
        else:
            rows[row["step"]] = (row, line)
    found = [rows[step] for step in sorted(rows)]
    return Metrics([row for row, _ in found], [line for _, line in found], unread)


@cache
def _row_type() -> TypeAdapter[dict[str, float | int | None]]:
    return TypeAdapter(dict[str, float | int | None], config=ConfigDict(strict=True))


def _row(line: bytes) -> dict[str, Any] | None:
    """A row, or None for a line that is none."""
    try:
        row = _row_type().validate_json(line)
    except ValidationError:
        return None
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**_DIGITS:
        return None
    return {
        name: value if value is not None and abs(value) < _LARGEST else None for name, value in row.items()
    }


def finite(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a figure."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]
