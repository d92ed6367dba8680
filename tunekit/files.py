"""Files and folders that are whole or absent, with the permissions that the umask gives; and JSON."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import time
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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _allow(path: Path, mode: int) -> None:
    """Gives a file the permissions of `mode`; some native writers make files for their owner alone."""
    with suppress(OSError):  # a file system that has none
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


@contextmanager
def atomic_file(final: Path | str) -> Iterator[Path]:
    """Yields an empty file beside `final`, renamed to it when the block ends well, else removed.

    Raises:
        OutputError: disk full, no permission and the like, also when raised by the block; what stood at
            `final` before is untouched.
    """
    final = Path(final)
    temporary = _temporary(final)
    with output_errors(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            _allow(temporary, mode)
            _sync(temporary)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(final: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `final`, renamed to it when the block ends well, else removed.

    A folder that already stands at `final` is replaced. Files get the permissions that the umask gives.

    Raises:
        OutputError: disk full, no permission and the like, also when raised by the block.
    """
    final = Path(final)
    temporary = _temporary(final)
    replaced = final.with_name(f".{final.name}.old-{os.getpid()}")
    with output_errors(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _allow(Path(folder, name), mode)
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


def link_file(path: Path, to: Path) -> None:
    """The same file under a second name, in folders that need not be there; a copy where no disk links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)


def write_text(path: Path | str, text: str) -> Path:
    """Writes a text file whole or not at all.

    Raises:
        OutputError: when it cannot be written; what stood there before is untouched.
    """
    path = Path(path)
    with atomic_file(path) as temporary:
        # What no UTF-8 can hold, as the bytes of some file names, is written as \udc80 and the like.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    with output_errors(path):
        _sync(path.parent)
    return path


def json_text(value: Any, *, indent: int | None = 2, ascii_only: bool = False) -> str:
    """JSON that every reader takes: what is not finite is null, for JSON has no word for it."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # as the bytes of some file names
        text = json.dumps(_finite(value), indent=indent)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path | str, value: Any) -> Path:
    """Writes JSON whole or not at all; see `json_text` and `write_text`."""
    return write_text(path, json_text(value) + "\n")


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_OURS = re.compile(r"\.(.+)\.(tmp|old)-(\d+)")
_FOREIGN = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""What safetensors writes into before it renames; without the process, so that only its age tells."""
_HOUR = 3600.0


def clean_leftovers(folder: Path | str, *, deep: bool = False) -> list[Path]:
    """Removes what killed processes left half-written in `folder`; brings back what they were replacing.

    Args:
        folder: where it lay; it need not be there.
        deep: look into all folders below, too.

    Returns:
        What was removed.
    """
    removed = []
    for root, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            ours = _OURS.fullmatch(name)
            if ours is None:
                with suppress(OSError):
                    if _FOREIGN.fullmatch(name) and time.time() - path.stat().st_mtime > _HOUR:
                        path.unlink()
                        removed.append(path)
                continue
            if is_alive(int(ours[3])):
                continue
            whole = path.with_name(ours[1])
            if ours[2] == "old" and not whole.exists():
                path.rename(whole)
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
        folders[:] = [name for name in folders if deep and not _OURS.fullmatch(name)]
    return removed


def directory_size(path: Path | str) -> int:
    """Bytes of the files under `path`."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def remove_folder(path: Path | str) -> None:
    """Removes a folder so that no reader ever sees half of it."""
    path = Path(path)
    doomed = _temporary(path)
    with suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
