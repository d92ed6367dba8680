"""metrics.jsonl after a kill, and lines on the console."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunekit.errors import OutputError
from tunekit.training.tracking import Progress, Tracker, read_metrics


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = Tracker(path)
    tracker.write([{"step": 0, "val_loss": 1.0}, *({"step": step, "loss": 0.5} for step in range(1, 8))])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # cut off by a kill
    tracker.rewind(5)
    tracker.write([{"step": 6, "loss": 0.25}])
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    tracker.rewind(0)
    assert read_metrics(path) == []


def test_unwritable_metrics(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: could not write"):
        Tracker(tmp_path / "run" / "metrics.jsonl").write([{"step": 1}])


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 40, log_every=10) as progress:
        for step in range(1, 41):
            progress.update(step, loss=0.5, samples_per_second=12.3, seconds_left=200.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "training: step 10/40  loss 0.5000  12.3 samples/s  3 min 20 s left"


def test_other_processes_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 1, quiet=True) as progress:
        progress.say("hello")
        progress.update(1, loss=0.5, samples_per_second=1, seconds_left=0)
    assert capsys.readouterr().out == ""


def test_terminal_shows_one_moving_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("training", 3, log_every=1) as progress:
        progress.say("a line of its own")
        for step in range(1, 4):
            progress.update(step, loss=0.5, samples_per_second=12.3, seconds_left=3.0)
    output = capsys.readouterr().out
    assert "a line of its own" in output
    assert "step 3/3  loss 0.5000" in output
