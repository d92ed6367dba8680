"""metrics.jsonl after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunekit.errors import OutputError
from tunekit.training.tracking import UNREADABLE, Tracker, read_metrics


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


ROWS = [b'{"step": 0, "val_loss": 1.0}', *(b'{"step": %d, "loss": 0.5}' % step for step in range(1, 5))]


@pytest.mark.parametrize(
    "broken",
    [b'{"step": 2, "lo', b"\xff\xfe", b"[1, 2]", b"7", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": true}'],
)
def test_a_broken_line_costs_no_other_and_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*ROWS[:2], broken, *ROWS[3:]]) + b"\n")
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 3, 4]
    Tracker(path).rewind(4)
    assert path.read_bytes().splitlines() == [*ROWS[:2], *ROWS[3:]]
    assert (tmp_path / UNREADABLE).read_bytes() == broken + b"\n"
    assert "a line could not be read and went into metrics.unreadable" in capsys.readouterr().out
    Tracker(path).rewind(4)
    assert (tmp_path / UNREADABLE).read_bytes() == broken + b"\n"


def test_no_step_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*ROWS, b'{"step": 2, "loss": 0.25}']))
    Tracker(path).rewind(3)
    assert [(row["step"], row.get("loss")) for row in read_metrics(path)] == [
        *((0, None), (1, 0.5), (2, 0.25), (3, 0.5))
    ]


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Tracker(path).write([{"step": 1, "loss": math.nan, "lr": 0.5}])
    assert path.read_text() == '{"step": 1, "loss": null, "lr": 0.5}\n'
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n')  # as it once was written
    assert [row["loss"] for row in read_metrics(path)] == [None, None]


def test_a_look_at_what_was_written_costs_little_and_stops_nothing(tmp_path: Path) -> None:
    looks = []

    def look() -> None:
        looks.append(len(read_metrics(tmp_path / "metrics.jsonl")))
        raise RuntimeError("a page that cannot be made")

    tracker = Tracker(tmp_path / "metrics.jsonl", look=look)
    tracker.rewind(0)
    tracker.write([{"step": 1, "loss": 0.5}])
    assert looks == [0]  # not so soon again
    tracker._due = 0.0
    tracker.write([{"step": 2, "loss": 0.5}])
    assert looks == [0, 2]


def test_unwritable_metrics(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: could not write"):
        Tracker(tmp_path / "run" / "metrics.jsonl").write([{"step": 1}])
