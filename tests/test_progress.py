"""What is seen of long work: on a terminal, on a dumb one, and in a pipe."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pytest

from tunekit import progress
from tunekit.progress import Phase, Progress, console, left, pace


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute passes in a fifth of a second."""
    monkeypatch.setattr(progress, "SOON", 0.1)
    monkeypatch.setattr(progress, "SILENCE", 0.2)
    monkeypatch.setattr(progress, "_TICK", 0.01)


def wait_for(lines: list[str], count: int) -> None:
    until = time.monotonic() + 5
    while len(lines) < count and time.monotonic() < until:
        time.sleep(0.01)


def test_short_phases_leave_no_line():
    lines: list[str] = []
    shown = Progress(lines.append)
    for _ in range(20):
        with shown.phase("encoding pictures", total=3) as phase:
            phase.advance()
    assert lines == []


def test_long_phases_say_where_they_are_and_go_on_saying_it():
    lines: list[str] = []
    with Progress(lines.append).phase("encoding pictures", total=20) as phase:
        phase.advance(3)
        wait_for(lines, 3)
    assert len(lines) >= 3
    assert all(line.startswith("encoding pictures: 3/20  ") and " left" in line for line in lines)


def test_the_innermost_phase_speaks():
    lines: list[str] = []
    shown = Progress(lines.append)
    with shown.phase("training", total=100) as outer:
        outer.update(50, "loss 0.1")
        with shown.phase("preview", total=6) as inner:
            inner.advance(2)
            wait_for(lines, 1)
        assert lines[-1].startswith("preview: 2/6")
        lines.clear()
        wait_for(lines, 1)
    assert lines[0] == "training: 50/100  loss 0.1"


def test_what_is_done_in_between():
    lines: list[str] = []
    shown = Progress(lines.append)
    shown.doing("starting")
    wait_for(lines, 1)
    shown.doing("loading the model")
    wait_for(lines, 2)
    assert [line.partition(":")[0] for line in lines[:2]] == ["starting", "loading the model"]
    lines.clear()
    shown.say("found 3 pictures")
    time.sleep(0.3)
    assert lines == ["found 3 pictures"]


def test_a_line_of_the_work_itself_ends_the_silence():
    lines: list[str] = []
    shown = Progress(lines.append)
    with shown.phase("training"):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            shown.say("step")
            time.sleep(0.01)
    assert set(lines) == {"step"}


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]):
    shown = Progress(quiet=True)
    with shown.phase("training"):
        shown.say("hello")
        time.sleep(0.3)
    assert capsys.readouterr().out == ""


def test_any_line_can_be_said_on_any_stream(monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    Progress().say("a photo of 日本")
    stream.seek(0)
    assert stream.read() == "a photo of \\u65e5\\u672c\n"


@pytest.mark.parametrize(
    ("seconds", "size", "words"),
    [
        (0.5, 4, "8 samples/s"),
        (5.917, 1, "5.92 s/step"),
        (23.5, 4, "23.5 s/step"),
        (0.0001, 1, "1e+04 samples/s"),
    ],
)
def test_pace(seconds: float, size: int, words: str):
    assert pace(seconds, size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, ""),
        (-1, ""),
        (0.0004, "under 1 s left"),
        (2.4, "2 s left"),
        (59.6, "1 min 0 s left"),
        (200, "3 min 20 s left"),
    ],
)
def test_time_left(seconds: float, words: str):
    assert left(seconds) == words


def test_counts_are_read_easily():
    phase = Phase("reading", 12_000, start=0)
    phase.update(1500, "fast")
    assert str(phase) == "reading: 1,500/12,000  fast"


def test_there_is_one_console():
    assert console() is console()


SCRIPT = """
import time
from tunekit import progress
progress.SOON, progress.SILENCE, progress._TICK = 0.1, 0.2, 0.01
with progress.console().phase("training", total=100) as phase:
    progress.console().say("a line of its own")
    for step in range(1, 3):
        time.sleep(0.35)
        phase.update(step, "loss 0.5")
    time.sleep(0.35)
"""


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_on_terminals(term: str):
    pty = pytest.importorskip("pty")
    own, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(own, 4096)
        except OSError:  # Linux, where the other side is closed
            break
        if not more:
            break
        shown += more
    assert process.wait() == 0
    os.close(own)
    text = shown.decode()
    assert "a line of its own" in text
    assert "1/100" in text and "2/100" in text and "loss 0.5" in text
    assert ("\x1b[" in text) == (term == "xterm")


@pytest.mark.parametrize("logs", [True, False])
def test_phases_stand_beside_what_a_command_gives(capsys: pytest.CaptureFixture[str], logs: bool):
    shown = Progress()
    shown.logs = logs
    with shown.phase("reading"):
        time.sleep(0.3)
        shown.say('{"version": 1}')
    out, err = capsys.readouterr()
    assert ("reading" in out, "reading" in err) == (logs, not logs)
    assert out.endswith('{"version": 1}\n')
