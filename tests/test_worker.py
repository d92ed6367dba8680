"""A worker with real processes, which do what their override says instead of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunekit import worker as workers
from tunekit.errors import Interrupted
from tunekit.jobs import Job, Queue
from tunekit.worker import UNKNOWN, Worker

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[1]
SLEEP = "trap 'exit 143' TERM; while true; do sleep 0.02; done"


def command(job: Job) -> list[str]:
    return ["bash", "-c", job.overrides[0]]


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue.of(tmp_path)


@pytest.fixture
def worker(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(workers, "TICK", 0.01)
    lines: list[str] = []
    made = Worker(queue, ["cpu"], say=lines.append, command=command)
    made.lines = lines  # type: ignore[attr-defined]
    yield made
    made.leave()


def add(queue: Queue, name: str, what: str, **fields: Any) -> Job:
    return queue.add("a.yaml", [what], run=queue.folder.parent / name, **fields)


def until(worker: Worker, reached: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end
        worker.tick()
        time.sleep(0.01)


def states(queue: Queue) -> dict[str, str]:
    return {job.name: job.state for job in queue.jobs()}


def test_jobs_run_one_after_another_and_what_they_said_is_kept(queue: Queue, worker: Worker) -> None:
    add(queue, "good", 'echo "hello $OMP_NUM_THREADS"')
    add(queue, "bad", 'echo "error: photos: no pictures" >&2; echo more; exit 2')
    worker.work()
    good, bad = queue.find("good"), queue.find("bad")
    assert (good.state, good.code) == ("done", 0)
    assert (bad.state, bad.code, bad.note) == ("failed", 2, "photos: no pictures")
    assert "hello 1" in queue.log(good.id).read_text()
    assert [line.partition(":")[0] for line in worker.lines] == [  # type: ignore[attr-defined]
        "job 1 begins on cpu",
        "job 1 (good)",
        "job 2 begins on cpu",
        "job 2 (bad)",
    ]
    assert worker.ended == {1: "done", 2: "failed"}


def test_a_job_is_stopped_and_started_again(queue: Queue, worker: Worker) -> None:
    job = add(queue, "long", SLEEP)
    until(worker, lambda: worker.running)
    time.sleep(0.1)  # bash has set its trap
    queue.stop(job.id)
    until(worker, lambda: not worker.running)
    found = queue.find("long")
    assert (found.state, found.code, found.note) == ("stopped", 143, "stopped by hand")
    assert not worker.tick()
    queue.start(job.id)
    until(worker, lambda: worker.running)
    with pytest.raises(Interrupted) as told, worker.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        worker.tick()
    assert told.value.exit_code == 143
    found = queue.find("long")
    assert (found.state, found.note) == ("waiting", "waits, for its worker was stopped")


WORK = """
import sys
from tunekit.jobs import Queue
from tunekit.worker import Worker
Worker(Queue.of(sys.argv[1]), ["cpu"], command=lambda job: ["bash", "-c", job.overrides[0]]).work()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_killed_workers_job_is_taken_up_again(queue: Queue, worker: Worker, tmp_path: Path) -> None:
    add(queue, "a", f"echo life >> {tmp_path}/lives; test -e {tmp_path}/go || {{ {SLEEP}; }}")
    doomed = subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not (tmp_path / "lives").exists():
        time.sleep(0.01)
        assert doomed.poll() is None
    assert states(queue) == {"a": "running"}
    worker.tick()
    assert not worker.running  # it is another's
    (tmp_path / "go").touch()
    doomed.kill()
    doomed.wait()
    until(worker, lambda: states(queue) == {"a": "done"})
    assert (tmp_path / "lives").read_text() == "life\nlife\n"
    assert queue.find("a").lost == 1


def test_two_workers_share_a_folder(queue: Queue, worker: Worker, tmp_path: Path) -> None:
    for index in range(6):
        add(queue, str(index), f"echo {index} >> {tmp_path}/done; sleep 0.01")
    other = Worker(queue, ["cpu"], 2, say=lambda line: None, command=command)
    thread = threading.Thread(target=other.work)
    thread.start()
    worker.work()
    thread.join(20)
    assert sorted((tmp_path / "done").read_text().split()) == list("012345")
    assert set(states(queue).values()) == {"done"}
    assert worker.ended.keys() | other.ended.keys() == set(range(1, 7))
    assert not worker.ended.keys() & other.ended.keys()


def placed(worker: Worker, job: dict[str, Any], *running: dict[str, Any]) -> str | None:
    def made(index: int, fields: dict[str, Any]) -> Job:
        return Job(id=index, config="", cwd="", run=f"/{index}", **fields)

    return worker._place(made(0, job), [made(index, one) for index, one in enumerate(running, start=1)])


def test_where_there_is_room(queue: Queue) -> None:
    one = Worker(queue, ["cuda:0", "cuda:1"])
    assert placed(one, {}) == "cuda:0"
    assert placed(one, {}, {"on": "cuda:0"}) == "cuda:1"
    assert placed(one, {}, {"on": "cuda:0"}, {"on": "cuda:1"}) is None
    assert placed(one, {"device": "cuda:1"}, {"on": "cuda:1"}) is None
    assert placed(one, {"processes": 2}) == "cuda:0,cuda:1"
    assert placed(one, {"processes": 2}, {"on": "cuda:1"}) is None
    assert placed(one, {}, {"on": "cuda:0,cuda:1"}) is None
    assert not one.serves(Job(id=1, config="", cwd="", run="/1", device="cpu"))

    gib = 2**30
    many = Worker(queue, ["cuda:0"], None, _rooms={"cuda:0": 24 * gib, "cpu": 32 * gib})
    small, large = {"device_bytes": 10 * gib, "ram_bytes": 5 * gib}, {"device_bytes": 15 * gib}
    assert placed(many, {}) == "cuda:0"
    assert placed(many, small, {**small, "on": "cuda:0"}) == "cuda:0"
    assert placed(many, large, {**small, "on": "cuda:0"}) is None
    assert placed(many, {}, {**small, "on": "cuda:0"}) is None  # nobody knows yet what it needs
    assert placed(many, small, {"device_bytes": UNKNOWN, "on": "cuda:0"}) is None
    assert placed(many, {**small, "ram_bytes": 30 * gib}, {**small, "on": "cuda:0"}) is None


def test_a_card_alone_is_seen_by_its_job(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Worker(queue, ["cuda:0", "cuda:1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    job = Job(id=1, config="", cwd="", run="/1", on="cuda:1")
    assert one._environment(job) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert one._environment(job) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert one._environment(job.model_copy(update={"on": "cuda:0,cuda:1"})) == {"CUDA_VISIBLE_DEVICES": "4,6"}
    assert one._environment(job.model_copy(update={"device": "cuda:1"})) == {}  # it says so itself


def test_plans_decide_how_many_run_beside_each_other(
    queue: Queue, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command `tunekit plan` is asked for what a job needs; here a script answers for it."""
    (tmp_path / "tunekit.py").write_text(
        'import json, sys\nsize = 2**20 if "small" in sys.argv[2] else 2**40\n'
        'phases = {"step": {"host_bytes": 7}}\n'
        'print(json.dumps({"fits": True, "device_bytes": size, "phases": phases}))\n'
    )
    for name in ("small-a", "small-b", "large"):
        queue.add(tmp_path / name, [f"while test ! -e {tmp_path}/go; do sleep 0.01; done"],
                  run=tmp_path / name, cwd=str(tmp_path))  # fmt: skip
    worker.at_once = None
    worker._rooms["cpu"] = 10 * 2**30
    monkeypatch.delenv("PYTHONPATH", raising=False)
    until(worker, lambda: len(worker.running) == 2)
    until(worker, lambda: queue.find("large").device_bytes == 2**40)
    assert states(queue) == {"small-a": "running", "small-b": "running", "large": "waiting"}
    (tmp_path / "go").touch()
    until(worker, lambda: set(states(queue).values()) == {"done"})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Callable[..., str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delitem(sys.modules, "tunekit_recipe_mine", raising=False)
    (tmp_path / "mine.yaml").write_text("recipe: mine.py\n")
    (tmp_path / "mine.py").write_text(
        "from tunekit.config import RunConfig\nfrom tunekit.launch import run_recipe\n\n\n"
        'class Config(RunConfig):\n    lr: float = 1.0\n    """What."""\n\n\n'
        'def main(config, loaded):\n    print("lr", config.lr)\n\n\n'
        'if __name__ == "__main__":\n    run_recipe(main, Config)\n'
    )

    assert "job 1: runs/mine (in" in shell("queue", "add", "mine.yaml", "lr=2")
    assert 'unknown key; did you mean "lr"?' in shell("queue", "add", "mine.yaml", "lrr=2", code=2)
    assert "job 1 for this run folder is waiting already" in shell("queue", "add", "mine.yaml", code=2)
    assert "waiting" in shell("queue", "list")
    assert "say where" in shell("queue", "move", "mine", code=2)
    assert "say which jobs" in shell("queue", "stop", code=2)
    assert "job 1 (mine): stopped" in shell("queue", "stop", "mine")
    assert "nothing waits" in shell("queue", "start", "--devices", "cpu")
    assert "neither a number" in shell("queue", "start", "--at-once", "x", code=2)
    assert "job 1 (mine): done in" in shell("queue", "start", "1", "--devices", "cpu")
    assert "lr 2.0" in shell("queue", "log", "mine")
    assert json.loads(shell("queue", "list", "--json"))["jobs"][0]["state"] == "done"
    assert "removed: 1" in shell("queue", "remove", "--done")
