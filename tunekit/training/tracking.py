"""What a run writes down while it trains: metrics.jsonl, and further places if asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tunekit.errors import output_errors
from tunekit.files import atomic_file, json_text
from tunekit.records import metrics_of
from tunekit.training.boards import Boards

LOOK_SECONDS = 15.0
"""Between two looks at a run, at least."""
UNREADABLE = "metrics.unreadable"
"""Beside metrics.jsonl: lines of it that are no rows."""


class Tracker:
    """Writes `metrics.jsonl`: one object per optimizer step.

    `{"step", "loss", "lr", "grad_norm", "samples_per_second", "seconds"}`, with `"val_loss"` where validation
    ran, and `"clip"` where previews are scored; step 0 is the untrained model. `seconds` counts all lives of
    the run.

    Args:
        path: `runs/<name>/metrics.jsonl`.
        boards: further places; None are none.
        say: takes a line about what was found there.
        look: shows what was written so far, as a page; called at the start and then at times, never for more
            than a fiftieth of them. It fails in silence, for nothing depends on it.
    """

    def __init__(
        self,
        path: Path,
        *,
        boards: Boards | None = None,
        say: Callable[[str], None] | None = None,
        look: Callable[[], object] | None = None,
    ) -> None:
        self.path = path
        self._look = look
        self._due = 0.0
        self._say = say or partial(print, flush=True)
        self._boards = boards

    def rewind(self, step: int) -> None:
        """Drop what a killed life wrote after `step`, so that no step is there twice.

        Lines that cannot be read are not this class's to delete: they go into a file beside it.
        """
        found = metrics_of(self.path)
        if found.unread:
            self._put_aside(found.unread)
        kept = [
            line for row, line in zip(found.rows, found.lines, strict=True) if step and row["step"] <= step
        ]
        if self.path.exists() or kept:
            with atomic_file(self.path) as file:
                file.write_bytes(b"".join(line + b"\n" for line in kept))
        self._show()
        if self._boards is not None:
            self._boards.begin(step)

    def _show(self) -> None:
        began = time.monotonic()
        if self._look is None or began < self._due:
            return
        with suppress(Exception):  # whatever it is, the training goes on
            self._look()
        ended = time.monotonic()
        self._due = ended + max(LOOK_SECONDS, 50 * (ended - began))

    def _put_aside(self, lines: Sequence[bytes]) -> None:
        aside = self.path.with_name(UNREADABLE)
        with output_errors(aside), aside.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        count = f"{len(lines)} lines" if len(lines) > 1 else "a line"
        self._say(f"{self.path}: {count} could not be read and went into {aside.name}")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; they survive the process, though not yet the machine (see `sync`)."""
        if not rows:
            return
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json_text(row, indent=None) + "\n" for row in rows))
        if self._boards is not None:
            self._boards.log(rows)
        self._show()

    def sync(self) -> None:
        """Make what was written survive the machine; called before a checkpoint refers to it."""
        if self.path.exists():
            with output_errors(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the further places."""
        if self._boards is not None:
            self._boards.end()
            self._boards = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in the order of their steps; lines that are no rows are left out."""
    return metrics_of(path).rows
