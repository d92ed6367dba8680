"""The queue's files: their rules, with real processes that add, take and are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunekit.errors import ArtifactError, OutputError
from tunekit.files import write_json
from tunekit.jobs import MOST_LOST, Job, Queue

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[1]


def anywhere(job: Job, running: object) -> str:
    return "cpu"


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue.of(tmp_path)


def add(queue: Queue, name: str, **fields: object) -> Job:
    return queue.add("a.yaml", run=queue.folder.parent / name, **fields)  # type: ignore[arg-type]


def names(queue: Queue) -> list[str]:
    return [job.name for job in queue.jobs() if job.state == "waiting"]


# What one program sees --------------------------------------------------------------------------------------


def test_jobs_come_by_priority_and_then_as_they_were_added(queue: Queue) -> None:
    assert queue.jobs() == []
    assert queue.take(anywhere) is None
    assert not queue.folder.exists()  # looking makes nothing
    for name, fields in {"a": {}, "b": {}, "c": {"priority": 5}, "d": {"first": True}}.items():
        add(queue, name, **fields)
    assert names(queue) == ["c", "d", "a", "b"]
    queue.move(queue.find("b").id, before=queue.find("c").id)
    assert names(queue) == ["b", "c", "d", "a"]
    queue.move(queue.find("b").id, last=True)
    assert names(queue) == ["c", "d", "a", "b"]
    queue.move(queue.find("a").id, first=True)
    assert names(queue) == ["a", "c", "d", "b"]
    queue.move(queue.find("a").id, priority=-1)
    assert names(queue) == ["c", "d", "b", "a"]


def test_a_job_goes_from_state_to_state(queue: Queue) -> None:
    add(queue, "a")
    held = queue.take(anywhere)
    assert held is not None
    assert queue.take(anywhere) is None
    (job,) = queue.jobs()
    assert (job.state, job.worker, job.on) == ("running", os.getpid(), "cpu")
    with pytest.raises(ArtifactError, match="job 1 runs"):
        queue.remove(1)
    with pytest.raises(ArtifactError, match="job 1 for this run folder is running already"):
        add(queue, "a")
    assert queue.stop(1).stopping == 1
    with pytest.raises(ArtifactError, match="is being stopped"):
        queue.start(1)
    queue.give(held, "stopped", code=143)
    (job,) = queue.jobs()
    assert (job.state, job.note, job.stopping, job.worker) == ("stopped", "stopped by hand", 0, None)
    assert queue.take(anywhere) is None
    queue.start(1)
    held = queue.take(anywhere)
    assert held is not None
    queue.give(held, "done", code=0, note="done in 1 s")
    assert queue.jobs()[0].state == "done"
    add(queue, "a")  # once more
    assert queue.find("a").id == 2
    queue.remove(1)
    queue.remove(2)
    assert queue.jobs() == []
    assert list((queue.folder / "jobs").iterdir()) == []


def test_nothing_overtakes_a_job_without_room(queue: Queue) -> None:
    add(queue, "large", device_bytes=10)
    add(queue, "small", device_bytes=1)
    room = {"large": None, "small": "cpu"}
    assert queue.take(lambda job, running: room[job.name]) is None
    held = queue.take(anywhere, wanted=lambda job: job.name == "small")
    assert held is not None and held.job.name == "small"
    os.close(held.lock)


def test_what_is_not_there_is_said_with_the_nearest_name(queue: Queue) -> None:
    with pytest.raises(ArtifactError, match='there is no job "7"\nthe queue is empty'):
        queue.find("7")
    add(queue, "foxes")
    with pytest.raises(ArtifactError, match='did you mean "foxes"'):
        queue.find("foxs")
    for change in (queue.remove, queue.stop, queue.start):
        with pytest.raises(ArtifactError, match="there is no job 3"):
            change(3)


def test_a_half_written_job_is_named_and_stops_no_other(queue: Queue) -> None:
    add(queue, "a")
    add(queue, "b")
    file = queue.file(1)
    file.write_bytes(file.read_bytes()[:40])
    write_json(queue.file(3), {"version": 9, "id": 3})
    (queue.folder / "jobs" / f".000002.json.tmp-{2**22 + 1}").write_text("{")  # of a process that is gone
    cut, newer = (error.message for error in queue.damaged())
    assert "newer tunekit (version 9" in newer
    assert "damaged" in cut and "\n" not in cut
    held = queue.take(anywhere)
    assert held is not None and held.job.name == "b"
    queue.give(held, "done")
    assert not list((queue.folder / "jobs").glob(".*"))
    queue.remove(1)
    assert len(queue.damaged()) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_by_permission(queue: Queue) -> None:
    add(queue, "a")
    (queue.folder / "jobs").chmod(0o500)
    try:
        assert [job.name for job in queue.jobs()] == ["a"]
        with pytest.raises(OutputError, match="no permission"):
            add(queue, "b")
    finally:
        (queue.folder / "jobs").chmod(0o700)


def test_a_folder_that_cannot_be_written(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs as root writes everywhere; so the system's answer is played."""
    add(queue, "a")
    real = os.open

    def refuse(path: object, flags: int, *rest: object, **named: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(queue.folder) in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    opened = Path.open

    def path_open(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if set(mode) & set("wa") and path.is_relative_to(queue.folder):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, mode, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", path_open)
    assert [job.name for job in queue.jobs()] == ["a"]  # looking needs no writing
    for change in (lambda: add(queue, "b"), lambda: queue.stop(1), lambda: queue.take(anywhere)):
        with pytest.raises(OutputError, match="the file system is read-only"):
            change()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_on_a_full_disk_no_job_is_lost(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        add(queue, name)
    held = queue.take(anywhere)
    assert held is not None
    sync = os.fsync

    def full(descriptor: int) -> None:
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"1")  # the kernel's own answer

    monkeypatch.setattr(os, "fsync", full)
    changes = (lambda: add(queue, "c"), lambda: queue.take(anywhere), lambda: queue.give(held, "done"))
    for change in changes:
        with pytest.raises(OutputError, match="no space left on the disk"):
            change()
    monkeypatch.setattr(os, "fsync", sync)
    # What became of the first was not written down, and nobody has it any more.
    assert [(job.name, job.state) for job in queue.jobs()] == [("a", "waiting"), ("b", "waiting")]
    again = queue.take(anywhere)
    assert again is not None and again.job.name == "a" and again.job.lost == 1
    queue.give(again, "done")
    assert not list((queue.folder / "jobs").glob(".*"))


def test_a_lock_that_is_held_for_too_long(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit import jobs

    add(queue, "a")
    monkeypatch.setattr(jobs, "_PATIENCE", 0.05)
    with jobs.locked(queue.folder / "lock"), pytest.raises(ArtifactError, match="another process holds it"):
        queue.stop(1)


# Several programs, and the end of some ----------------------------------------------------------------------

TAKE = """
import os, sys, time
from tunekit.jobs import Queue
queue, folder, pause = Queue.of(sys.argv[1]), sys.argv[2], float(sys.argv[3])
idle = 0
while idle < 100:
    held = queue.take(lambda job, running: "cpu")
    if held is None:
        idle += 1
        time.sleep(0.01)
        continue
    mark = f"{folder}/{held.job.id}-{held.job.lost}"
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails if another has this life of the job
    print(held.job.id, flush=True)
    time.sleep(pause)
    queue.give(held, "done", code=0)
    idle = 0
"""
ADD = """
import sys
from tunekit.jobs import Queue
for index in range(int(sys.argv[3])):
    Queue.of(sys.argv[1]).add("a.yaml", run=f"{sys.argv[1]}/{sys.argv[2]}-{index}")
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_job_is_lost_or_taken_twice_while_workers_are_killed(queue: Queue, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    adders = [python(ADD, tmp_path, name, 8) for name in "ab"]
    doomed = [python(TAKE, tmp_path, marks, 60) for _ in range(2)]  # hold what they take until they die
    workers = [python(TAKE, tmp_path, marks, 0.002) for _ in range(2)]
    try:
        for process in doomed:
            assert process.stdout is not None
            assert process.stdout.readline()  # it has a job
            time.sleep(random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        for process in adders:
            assert process.wait(30) == 0, process.communicate()[1]
        said = [process.communicate(timeout=30) for process in workers]
    finally:
        for process in (*adders, *doomed, *workers):
            process.kill()
            process.communicate()
    assert [error for _, error in said] == ["", ""]
    jobs = queue.jobs()
    assert sorted(job.name for job in jobs) == sorted(
        f"{name}-{index}" for name in "ab" for index in range(8)
    )
    assert {job.state for job in jobs} == {"done"}
    taken = [int(number) for out, _ in said for number in out.split()]
    assert sorted(taken) == sorted(job.id for job in jobs)  # those of the killed were taken up again
    assert sum(job.lost for job in jobs) == 2


def test_a_job_that_kills_its_workers_fails(queue: Queue, tmp_path: Path) -> None:
    add(queue, "a")
    for _ in range(MOST_LOST - 1):
        content = json.loads(queue.file(1).read_text())
        write_json(queue.file(1), {**content, "state": "running", "worker": 2**22 + 1})
        (job,) = queue.jobs()
        assert (job.state, job.note) == ("waiting", "taken up again, for its worker died")
        queue.note(1)  # writes nothing new
        held = queue.take(anywhere)
        assert held is not None
        os.close(held.lock)  # as when a process dies
    (job,) = queue.jobs()
    assert job.state == "failed" and f"died {MOST_LOST} times" in job.note
    assert queue.take(anywhere) is None
    assert queue.start(1).lost == 0
