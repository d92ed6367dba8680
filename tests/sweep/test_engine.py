"""A sweep over a recipe that takes no time, through the queue, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import cli
from tunekit.errors import ArtifactError, TunekitError
from tunekit.jobs import Job, Queue
from tunekit.sweep import engine
from tunekit.sweep.engine import Sweep
from tunekit.worker import Worker

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[2]
Swept = Callable[..., Path]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(engine, "TICK", 0.01)


def command(job: Job) -> list[str]:
    """What the recipe does; `tunekit run` would import torch for its checks."""
    return [sys.executable, "-S", "-E", "steps.py", *job.overrides]


def run(path: Path, *overrides: str, at_once: int = 1) -> Sweep:
    sweep = Sweep.open(path, overrides, say=lambda line: None)
    sweep.run(Worker(sweep.queue, ["cpu"], at_once, sweep.name, say=lambda line: None, command=command))
    return sweep


def outcome(sweep: Sweep) -> dict[str, tuple[str, float | None, int | None]]:
    return {trial.run: (trial.state, trial.value, trial.stopped) for trial in sweep.trials}


def made(run: str) -> list[int]:
    return [int(step) for step in Path("runs", run, "made").read_text().split()]


RANKS = "rank: [3, 4, 2, 5]"
ASHA = "stop: {asha: {grace: 2, factor: 2}}"
EXPECTED = {
    "s-r3": ("done", 3 / 8, None),
    "s-r4": ("stopped", 4 / 2, 2),
    "s-r2": ("done", 2 / 8, None),
    "s-r5": ("stopped", 5 / 2, 2),
}


def test_one_after_another_and_all_at_once_come_to_the_same(swept: Swept, here: Path) -> None:
    path = swept(RANKS, ASHA)
    sweep = run(path, "pause=0.03")
    assert outcome(sweep) == EXPECTED
    assert [trial.run for trial in sweep.ranked()] == ["s-r2", "s-r3", "s-r4", "s-r5"]
    result = json.loads(Path("runs/s/sweep.json").read_text())
    assert result["best"] == "s-r2"
    assert [(t["run"], t["state"], t["value"]) for t in result["trials"]] == [
        (name, state, value) for name, (state, value, _) in EXPECTED.items()
    ]
    assert made("s-r3") == list(range(1, 9))
    assert len(made("s-r4")) < 8  # it did save something
    assert sweep.queue.jobs() == []  # nothing is left behind

    steps = made("s-r4")
    again = run(path, "pause=0.03")  # nothing is begun again
    assert outcome(again) == EXPECTED and made("s-r4") == steps

    together = swept(RANKS, ASHA, "name: t")
    assert [one[1:] for one in outcome(run(together, "pause=0.03", at_once=4)).values()] == [
        one[1:] for one in EXPECTED.values()
    ]

    on = run(swept(RANKS))  # without the rule, what was stopped is continued
    assert {trial.state for trial in on.trials} == {"done"}
    assert made("s-r4") == list(range(1, 9))


DRIVE = """
import sys
from tunekit.jobs import Job
from tunekit.sweep.engine import Sweep
from tunekit.worker import Worker
command = lambda job: [sys.executable, "-S", "-E", "steps.py", *job.overrides]
sweep = Sweep.open("s.yaml", ["pause=0.05"])
sweep.run(Worker(sweep.queue, ["cpu"], 2, sweep.name, command=command))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_killed_it_goes_on_and_trains_nothing_twice(swept: Swept) -> None:
    path = swept(RANKS, ASHA)
    doomed = subprocess.Popen([sys.executable, "-c", DRIVE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not Path("runs/s-r4/made").exists():
        time.sleep(0.01)
        assert doomed.poll() is None, doomed.communicate()
    time.sleep(0.1)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate(timeout=30)
    before = Path("runs/s-r3/made").read_text()
    assert outcome(run(path, "pause=0.05", at_once=2)) == EXPECTED
    for name in ("s-r3", "s-r2", "s-r4", "s-r5"):
        steps = made(name)
        assert steps == list(range(1, len(steps) + 1))
    assert Path("runs/s-r3/made").read_text().startswith(before)


def test_a_trial_that_fails_is_told_and_tried_again(swept: Swept, here: Path) -> None:
    path = swept("rank: [1, 2, 3]", "name: f")
    (here / "broken").touch()
    sweep = run(path, "fails=2")
    assert [trial.state for trial in sweep.trials] == ["done", "failed", "done"]
    assert sweep.trials[1].note == "the loss became NaN"
    assert [job.name for job in sweep.queue.jobs()] == ["f-r2"]  # its log is there to be read
    (here / "broken").unlink()
    steps = made("f-r1")
    sweep = run(path, "fails=2")
    assert {trial.state for trial in sweep.trials} == {"done"} and made("f-r1") == steps


def test_when_all_fail_or_none_reports_the_metric(swept: Swept, here: Path) -> None:
    (here / "broken").touch()
    path = swept("train.lr: [1.0, 2.0]")
    with pytest.raises(TunekitError, match="all 2 trials have failed; the first: the loss became NaN"):
        run(path, "fails=4")
    (here / "broken").unlink()
    with pytest.raises(TunekitError, match=r"s\.yaml:2: metric: no trial has reported val_loss"):
        run(path, "figure=other")
    assert json.loads(Path("runs/s/sweep.json").read_text())["best"] is None


def test_the_more_a_clip_score_is_the_better(swept: Swept) -> None:
    sweep = run(swept("rank: [3, 5, 4]", metric="clip"), "figure=clip")
    assert [trial.run for trial in sweep.ranked()] == ["s-r5", "s-r4", "s-r3"]
    assert json.loads(Path("runs/s/sweep.json").read_text())["goal"] == "max"


def test_time_is_up_and_a_job_is_stopped_by_hand(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = run(swept("rank: [1, 2]", "minutes: 0.005"), "pause=0.5")
    assert [(trial.state, trial.note) for trial in sweep.trials] == [("halted", "time is up")] * 2
    assert sweep.trials[0].reading.step < 8
    sweep = Sweep.open(swept("rank: [1, 2]"), ["pause=0.05"], say=lambda line: None)
    worker = Worker(sweep.queue, ["cpu"], 1, "s", say=lambda line: None, command=command)

    def say(line: str) -> None:
        if "begins" in line and "s-r1" in line:
            sweep.queue.stop(sweep.queue.find("s-r1").id)

    worker.say = say
    sweep.run(worker)
    assert [(trial.state, trial.note) for trial in sweep.trials] == [
        ("halted", "stopped by hand"),
        ("done", ""),
    ]
    assert {trial.state for trial in run(swept("rank: [1, 2]"), "pause=0.05").trials} == {"done"}


def test_two_sweeps_of_one_name(swept: Swept) -> None:
    from tunekit.jobs import locked

    sweep = Sweep.open(swept("rank: [1, 2]"))
    busy = pytest.raises(ArtifactError, match="another process works on the sweep s")
    with locked(sweep.folder / ".lock"), busy:
        sweep.run(Worker(sweep.queue, ["cpu"], 1, "s"))


def test_a_device_that_is_not_there(swept: Swept) -> None:
    sweep = Sweep.open(swept("rank: [1, 2]"))
    with pytest.raises(TunekitError, match=r"s\.yaml:1: trials ask for cpu, and there is cuda:0"):
        sweep.run(Worker(sweep.queue, ["cuda:0"], 1, "s"))


def test_only_its_own_jobs_are_run(swept: Swept) -> None:
    other = Queue.of("runs").add("curve.yaml", run="runs/other")
    run(swept("rank: [1, 2]"))
    assert [(job.id, job.state) for job in Queue.of("runs").jobs()] == [(other.id, "waiting")]


def test_optuna_proposes_and_remembers(swept: Swept) -> None:
    pytest.importorskip("optuna")
    over = "rank: {uniform: [1, 9]}\n  train.lr: {loguniform: [0.1, 10.0]}"
    lines = ("proposer: optuna",)
    first = run(swept(over, "trials: 2", *lines))
    more = run(swept(over, "trials: 4", *lines))
    assert len({trial.run for trial in more.trials}) == 4
    assert [trial.run for trial in more.trials[:2]] == [trial.run for trial in first.trials]
    assert {trial.state for trial in more.trials} == {"done"}
    assert made(first.trials[0].run) == list(range(1, 9))
    assert all(isinstance(trial.values["rank"], int) for trial in more.trials)


def test_the_command(swept: Swept, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With `tunekit run` for each trial, in its own process."""
    swept("rank: [2, 1]")
    (here / "wrong.yaml").write_text("config: curve.yaml\nover: {rnk: [1, 2]}\n")
    monkeypatch.setenv("COLUMNS", "80")

    def tunekit(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["tunekit", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        assert (left.value.code or 0) == code, said
        return said.out, said.err

    assert 'rnk: unknown key; did you mean "rank"?' in tunekit("sweep", "wrong.yaml", code=2)[1]
    assert "2 trials; runs/s/sweep.json will say" in tunekit("sweep", "s.yaml", "--dry-run")[0]
    assert not Path("runs").exists()
    out, err = tunekit("sweep", "s.yaml", "--at-once", "2", "--devices", "cpu")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:4] for line in lines if line.startswith(" s-r")] == [
        ["s-r1", "1", "0.12500", "8"],
        ["s-r2", "2", "0.25000", "8"],
    ]
    assert "best    runs/s-r1: rank=1" in out
    assert "s-r1: done, val_loss 0.125, 8 steps" in err
    assert os.listdir("runs/.queue/logs") == []
