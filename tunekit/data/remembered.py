"""What the look at a picture gave, remembered by path, size and times: to decode it once is enough."""

from __future__ import annotations

import hashlib
import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import PIL

from tunekit.data import decoding
from tunekit.data.files import Raw, shown
from tunekit.kept import Kept

_SETTLED_NS = 2 * 10**9
"""A file that changed less than so long ago may change again within one tick of its clock."""
_WORTH_SECONDS = 1.0
"""A look that took less is not worth a file in the cache."""


class Looked(NamedTuple):
    """Size of the upright picture in pixels, and the hash of its pixels."""

    width: int
    height: int
    content: str


Stamp = tuple[int, int, int, int]
"""Bytes, two times and the inode of a file: what changes with its content, the change of times included."""


class Remembered:
    """The pictures of one source.

    Args:
        place: the folder or file.
    """

    def __init__(self, place: Path) -> None:
        self._place = Path(os.path.abspath(place))  # noqa: PTH100 - links stay as they are
        self._began = time.monotonic()
        decoders = [str(decoding.VERSION), PIL.__version__, _version("pillow-heif")]
        parts = [os.fsencode(self._place), *(part.encode() for part in decoders)]
        self._name = hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()
        self._kept = Kept.of("pictures")
        known = self._kept.read(self._name)
        self._known: dict[str, str] = known if isinstance(known, dict) else {}
        self._new: dict[str, str] = {}

    def stamp(self, item: Raw) -> Stamp | None:
        """To be taken before the file is read."""
        if item.file is None:
            return None
        try:
            found = item.file.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino

    def get(self, item: Raw, stamp: Stamp | None) -> Looked | None:
        """What was found, if the file is still the same."""
        if stamp is None:
            return None
        match str(self._known.get(self._key(item))).split():
            case [*then, width, height, content] if then == [str(part) for part in stamp]:
                return Looked(int(width), int(height), content)
        return None

    def put(self, item: Raw, stamp: Stamp | None, looked: Looked) -> None:
        """Remember it, if the file has been at rest for a while."""
        if stamp and max(stamp[1], stamp[2]) < time.time_ns() - _SETTLED_NS:
            self._new[self._key(item)] = " ".join(str(part) for part in (*stamp, *looked))

    def save(self) -> None:
        """Keep what is new."""
        if self._new and time.monotonic() - self._began > _WORTH_SECONDS:
            self._kept.write(self._name, {**self._known, **self._new})

    def _key(self, item: Raw) -> str:
        assert item.file is not None
        path = Path(os.path.abspath(item.file))  # noqa: PTH100
        inside = path.relative_to(self._place) if path.is_relative_to(self._place) else path
        return shown(inside)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
