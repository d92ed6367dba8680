"""Rows of a metadata file, of parquet files, or of a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunekit.data.files import Problem, Raw
from tunekit.errors import DataError, did_you_mean

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def dataset_rows(
    kind: str,
    path: str,
    place: Path,
    split: str,
    image_column: str | None,
    caption_column: str | None,
    needs_caption: bool,
) -> Iterator[Raw]:
    """Rows of an imagefolder, parquet files or a hub data set, undecoded, so that we meet the broken ones."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind == "imagefolder":
            loaded = datasets.load_dataset("imagefolder", data_dir=str(place), split=split)
        elif kind == "parquet":
            files = (
                [str(place)] if place.is_file() else sorted(str(item) for item in place.rglob("*.parquet"))
            )
            loaded = datasets.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # datasets raises anything from ValueError to its own and the hub's exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if kind == "hub":
            raise DataError(
                f"neither a folder here nor a data set that could be loaded from the hub ({reason})",
                hint="check the spelling, the split and the connection",
            ) from error
        raise DataError(
            f"`datasets` cannot load it ({reason})", hint="check the metadata file and data.split"
        ) from error

    features: dict[str, Any] = dict(loaded.features)
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    picture = _column("image_column", image_column, pictures, features, ["image"])
    texts = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    text = (
        _column("caption_column", caption_column, texts, features, ["text", "caption"])
        if needs_caption
        else None
    )
    if picture not in pictures:
        loaded = loaded.cast_column(picture, datasets.Image())
    loaded = loaded.cast_column(picture, datasets.Image(decode=False))
    for row in range(len(loaded)):
        yield _row(loaded, row, path, place, picture, text)


def _row(loaded: Any, row: int, path: str, place: Path, picture: str, text: str | None) -> Raw:
    item = loaded[row]
    cell = item[picture] or {}
    file = cell.get("path") or ""
    name = f"{row:06d}"
    if file and Path(file).is_absolute() and Path(file).is_relative_to(place):
        name = Path(file).relative_to(place).as_posix()
    where = f"{path}[{row}]" if name == f"{row:06d}" else str(place / name)

    def read() -> bytes:
        cell = loaded[row][picture]
        if not cell:
            raise OSError("the row has no picture")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    caption = " ".join(str(item[text] or "").split()) if text is not None else ""
    problem = None
    if text is not None and not caption:
        problem = Problem(where, f"no caption in column {text!r}", "write what the picture shows there")
    return Raw(name, where, read, caption, problem)


def _column(
    key: str, asked: str | None, fitting: list[str], features: dict[str, Any], usual: list[str]
) -> str:
    """The column to use: the one asked for, else a usual name, else the only fitting one."""
    if asked is not None:
        if asked not in features:
            nearest = did_you_mean(asked, list(features)) or f"columns: {', '.join(features)}"
            raise DataError(f"data.{key}: no column {asked!r}", hint=nearest)
        return asked
    for name in [*(name for name in usual if name in fitting), *(fitting if len(fitting) == 1 else [])]:
        return name
    raise DataError(
        f"cannot tell which column to use (columns: {', '.join(features)})", hint=f"set data.{key}"
    )
