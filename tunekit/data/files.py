"""Folders of pictures, each with its caption in a text file beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


@dataclass(frozen=True)
class Problem:
    """Something wrong with one picture, and what to change."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Raw:
    """A picture before anyone looked at it."""

    id: str
    where: str
    read: Callable[[], bytes]
    caption: str = ""
    problem: Problem | None = None


def folder(root: Path, *, needs_caption: bool) -> Iterator[Raw]:
    """The pictures below a folder, in the order of their paths."""
    files = sorted(
        item
        for item in root.rglob("*")
        if item.suffix.lower() in SUFFIXES
        and item.is_file()
        and not any(part.startswith(".") for part in item.relative_to(root).parts)
    )
    for file in files:
        caption, problem = _caption(file) if needs_caption else ("", None)
        yield Raw(file.relative_to(root).as_posix(), str(file), file.read_bytes, caption, problem)


def _caption(picture: Path) -> tuple[str, Problem | None]:
    """Text beside a picture."""
    file = picture.with_suffix(".txt")
    try:
        text = " ".join(file.read_bytes().decode("utf-8-sig").split())
    except FileNotFoundError:
        return "", Problem(
            str(picture), f"no caption: {file.name} is missing", f"write what it shows into {file.name}"
        )
    except UnicodeDecodeError as error:
        return "", Problem(str(file), f"not UTF-8 (byte {error.start})", "save it as UTF-8")
    except OSError as error:
        return "", Problem(str(file), f"cannot be read ({error.strerror})", "make it readable")
    if not text:
        return "", Problem(str(file), "the caption is empty", "write what the picture shows into it")
    return text, None
