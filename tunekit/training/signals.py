"""SIGINT and SIGTERM while a run trains."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from tunekit.errors import Interrupted


class Signals:
    """Turns SIGINT and SIGTERM into a note that the loop reads between steps, while it runs.

    A launcher often passes on the signal that the terminal has sent already; so a second one counts as a wish
    to leave at once only when it comes a second later.
    """

    def __init__(self, *, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.told: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.told is not None and time.monotonic() - self._when > 1:
            raise KeyboardInterrupt
        if self.told is None:
            self.told, self._when = number, time.monotonic()

    def interrupted(self, step: int, total: int) -> Interrupted:
        """The error to raise after the checkpoint."""
        number = self.told or signal.SIGTERM
        error = Interrupted(
            f"stopped by {signal.Signals(number).name} after step {step} of {total}; a checkpoint was saved",
            hint="give the same command again to continue",
        )
        error.exit_code = 128 + number
        return error
