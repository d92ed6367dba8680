"""What is kept between calls to save time, in the user's cache folder: plans, traces, hashes.

Nothing needs it. Where it cannot be read, is damaged or is not there, it is made again; where it cannot be
written, that is said once and all goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunekit.errors import OutputError
from tunekit.files import clean_leftovers, write_json
from tunekit.resources import cache_dir


@dataclass(frozen=True)
class Kept:
    """JSON values by name, each a file in a folder; None keeps nothing."""

    folder: Path | None

    @classmethod
    def of(cls, kind: str) -> Kept:
        """Those of a kind, in the user's cache."""
        home = cache_dir()
        return cls(home / kind if home is not None else None)

    def read(self, name: str) -> Any:
        """The value, or None: it was never kept, or is not what was written."""
        if self.folder is None:
            return None
        _tidy(self.folder)
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return found["value"] if found["sha256"] == _digest(found["value"]) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Keeps a value, if that can be."""
        if self.folder is None:
            _say("there is no home folder (HOME, XDG_CACHE_HOME)")
            return
        _tidy(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{name}.json", {"sha256": _digest(value), "value": value})
        except (OSError, OutputError) as error:
            why = error.message if isinstance(error, OutputError) else error.strerror
            _say(f"{self.folder}: {why}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _tidy(folder: Path) -> None:
    """Removes what killed processes left half-written; once, at the first use."""
    try:
        clean_leftovers(folder)
    except OSError:
        return


@cache
def _complain() -> None:
    """Marks that something was said; once in a process is enough."""


def _say(why: str) -> None:
    """One line, from one of the processes of a run."""
    if _complain.cache_info().currsize or int(os.environ.get("RANK", "0")):
        return
    _complain()
    print(f"note: plans and traces are not kept for the next time ({why})", file=sys.stderr, flush=True)
