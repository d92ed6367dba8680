"""What a person sees of work that takes a while: which phase it is in, how far it is, and that it lives.

    with console().phase("encoding pictures", total=20) as phase:
        for picture in pictures:
            ...
            phase.advance()

On a terminal that is a line that moves several times a second. Elsewhere (a pipe, a log, TERM=dumb) it is a
line as soon as a phase has lasted two seconds, and then one after each half a minute of silence. Phases may
stand inside each other: a preview inside the training. Short phases leave no line anywhere.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO

from tunekit.units import format_count, format_seconds

SOON = 2.0
"""Without a moving line: seconds after which a phase says that it has begun."""
SILENCE = 30.0
"""Without a moving line: the longest silence in seconds."""
_TICK = 0.25


class Phase:
    """One piece of work; counts what is done of it.

    Attributes:
        title: what is done.
        total: how many there are; None where nobody knows.
        done: so many of them.
        note: figures that stand behind the count, instead of the pace.
    """

    def __init__(self, title: str, total: int | None = None, *, start: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = self.start = start
        self.note = ""
        self.began = self.spoken = time.monotonic()
        self.says = False
        """Whether it has had a line, where lines do not move."""
        self.task: Any = None

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "") -> None:
        """So many are done in all."""
        self.done = done
        self.note = note or self.note

    @property
    def count(self) -> str:
        """`12/400`, or nothing."""
        return f"{format_count(self.done)}/{format_count(self.total)}" if self.total is not None else ""

    @property
    def figures(self) -> str:
        """The note or, without one, the pace and what is left."""
        seconds = time.monotonic() - self.began
        made = self.done - self.start
        if self.note or self.total is None or made < 1:
            return self.note
        return f"{pace(seconds / made, 1, '')}  {left(seconds / made * (self.total - self.done))}".strip()

    def __str__(self) -> str:
        """As a line of a log."""
        parts = [self.count, self.figures]
        if not self.note:
            parts.append(f"({format_seconds(time.monotonic() - self.began)})")
        return f"{self.title}: {'  '.join(part for part in parts if part)}"


def pace(seconds: float, size: int, noun: str = "samples") -> str:
    """How fast steps of `size` samples are: `7.1 samples/s`, or `5.9 s/step` where a step takes a second."""
    if seconds >= 1:
        return f"{seconds:.3g} s/step" if noun else f"{seconds:.3g} s each"
    return f"{size / max(seconds, 1e-9):.3g} {noun}/s" if noun else f"{1 / max(seconds, 1e-9):.3g}/s"


def left(seconds: float) -> str:
    """`3 min 20 s left`, `7 s left`, `under 1 s left`; nothing where nothing is left."""
    if seconds <= 0:
        return ""
    if seconds < 1:
        return "under 1 s left"
    return f"{round(seconds)} s left" if seconds < 59.5 else f"{format_seconds(round(seconds))} left"


class Progress:
    """Shows phases and lines; one of them has the terminal of a process, see `console`.

    Args:
        say: takes lines; None means the streams of the process, with a line that moves where it can.
        quiet: shows nothing, as all processes of a run but the main one.

    Attributes:
        logs: standard output is a log, and phases belong there; else they are shown on standard error, beside
            what a command gives.
    """

    def __init__(self, say: Callable[[str], None] | None = None, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.logs = False
        self._say = say
        self._phases: list[Phase] = []
        self._ambient: Phase | None = None
        self._live: Any = None
        self._lock = threading.RLock()
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()
        self._spoken = time.monotonic()

    @property
    def moves(self) -> bool:
        """Whether phases are shown as they go, so that lines about them would only be in the way."""
        return self._live is not None

    def say(self, line: str) -> None:
        """Show a line of its own.

        Raises:
            OSError: standard output takes nothing more (a full disk, a closed pipe).
        """
        if self.quiet:
            return
        self.doing(None)
        self._show(line, sys.stdout)

    def _show(self, line: str, stream: TextIO) -> None:
        with self._lock:
            self._spoken = time.monotonic()
            if self._say is not None:
                self._say(line)
            elif self._live is not None and stream.isatty():
                self._live.console.print(line, highlight=False, markup=False, soft_wrap=True)
            else:
                _print(line, stream)

    @property
    def _stream(self) -> TextIO:
        return sys.stdout if self.logs else sys.stderr

    def doing(self, title: str | None) -> None:
        """What is done until a line is said or a phase begins; None ends that."""
        if self._ambient is not None:
            self._end(self._ambient)
        self._ambient = self._begin(Phase(title)) if title else None

    @contextmanager
    def phase(self, title: str, total: int | None = None, *, start: int = 0) -> Iterator[Phase]:
        """Show a phase for as long as the block runs."""
        self.doing(None)
        phase = self._begin(Phase(title, total, start=start))
        try:
            yield phase
        finally:
            self._end(phase)

    def _begin(self, phase: Phase) -> Phase:
        if self.quiet:
            return phase
        with self._lock:
            self._phases.append(phase)
            if self._live is None and self._say is None and _moves(self._stream):
                self._live = _Moving.start(self._stream)
            if self._live is not None:
                self._live.add(phase)
            elif self._heart is None:
                self._stop = threading.Event()
                beat = threading.Thread(target=self._beat, args=(self._stop,), name="progress", daemon=True)
                self._heart = beat
                beat.start()
        return phase

    def _end(self, phase: Phase) -> None:
        with self._lock:
            if phase not in self._phases:
                return
            self._phases.remove(phase)
            if self._live is not None:
                self._live.remove(phase)
            if not self._phases:
                if self._live is not None:
                    self._live.stop()
                    self._live = None
                self._stop.set()
                self._heart = None

    def _beat(self, stop: threading.Event) -> None:
        """Say where the innermost phase is, when nothing has been said for too long."""
        while not stop.wait(_TICK):
            with self._lock:
                if stop.is_set() or not self._phases:
                    continue
                phase, now = self._phases[-1], time.monotonic()
                soon = not phase.says and now - phase.began >= SOON and now - self._spoken >= SOON
                if soon or now - self._spoken >= SILENCE:
                    phase.says = True
                    with suppress(Exception):  # whoever works will meet the same error, and can be told
                        self._show(str(phase), self._stream)
                    self._spoken = now


class _Moving:
    """Phases on a terminal, one line each."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.console = bar.console

    @classmethod
    def start(cls, stream: TextIO) -> _Moving | None:
        """None where something else moves on the terminal already."""
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        class Figures(ProgressColumn):
            """What the phase says of itself at this moment."""

            max_refresh = None

            def render(self, task: Any) -> Any:
                phase: Phase = task.fields["phase"]
                task.completed = phase.done - phase.start
                return f"{phase.count}  {phase.figures}".strip()

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), Figures(), TimeElapsedColumn())
        bar = Bar(
            *columns,
            console=Console(file=stream),
            refresh_per_second=5,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        try:
            bar.start()
        except LiveError:
            return None
        return cls(bar)

    def add(self, phase: Phase) -> None:
        """Show it."""
        total = phase.total - phase.start if phase.total is not None else None
        phase.task = self.bar.add_task(phase.title, total=total, phase=phase)

    def remove(self, phase: Phase) -> None:
        """Show it no more."""
        if phase.task is not None:
            self.bar.remove_task(phase.task)

    def stop(self) -> None:
        """Leave the terminal."""
        self.bar.stop()


def _moves(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be written anew."""
    if not stream.isatty():
        return False
    from rich.console import Console

    return not Console(file=stream).is_dumb_terminal


def _print(line: str, stream: TextIO) -> None:
    """Print a line on a stream of whatever encoding."""
    try:
        print(line, file=stream, flush=True)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@cache
def console() -> Progress:
    """Return the progress that has the terminal of this process."""
    return Progress()
