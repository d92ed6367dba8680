"""Files and folders that are whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunekit.errors import output_errors


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(final: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `final`, renamed to it when the block ends well, else removed.

    A folder that already stands at `final` is replaced.

    Raises:
        OutputError: disk full, no permission and the like, also when raised by the block.
    """
    final = Path(final)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    replaced = final.with_name(f".{final.name}.old-{os.getpid()}")
    with output_errors(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            _sync(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path | str, text: str) -> Path:
    """Writes a text file whole or not at all.

    Raises:
        OutputError: when it cannot be written; what stood there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with output_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


def write_json(path: Path | str, value: Any) -> Path:
    """Writes JSON whole or not at all; see `write_text`."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def clean_leftovers(folder: Path | str) -> list[Path]:
    """Removes what killed processes left half-written in `folder`; brings back what they were replacing."""
    removed = []
    for path in sorted(Path(folder).glob(".*-*")):
        match = re.fullmatch(r"\.(.+)\.(tmp|old)-(\d+)", path.name)
        if not match or _alive(int(match[3])):
            continue
        whole = path.with_name(match[1])
        if match[2] == "old" and not whole.exists():
            path.rename(whole)
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def directory_size(path: Path | str) -> int:
    """Bytes of the files under `path`."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def remove_folder(path: Path | str) -> None:
    """Removes a folder so that no reader ever sees half of it."""
    path = Path(path)
    doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
