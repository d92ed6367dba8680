"""Runs that wait for their turn: a folder of small files, which any number of programs may work on at once.

    runs/.queue/
      lock                held by whoever changes something, for as long as that takes
      jobs/000012.json    a job: all that is known of it, its state included
      jobs/000012.lock    held by whoever works on it, and by the process that it started for it
      logs/000012.log     what that process said

Both locks are the kernel's (`flock`): they go with the process that holds them, however it ends. The rules:

1. A job is one file, and its state a word in it. The file is written beside itself and renamed, so that a
   reader, or whoever comes after a crash, finds the old state or the new one: never both, never neither.
2. Files are changed only by who holds `lock` alone; readers share it. So no two programs take one job.
3. Who takes a job first gets hold of its own lock and then writes "running". The process started for it
   inherits that lock. A job that says "running" and whose lock is free has lost its worker, and whatever the
   worker had started has ended: it is waiting again, for the next that looks. Thrice lost, it has failed.
4. To stop a running job is to write the wish into its file; the worker that has it passes it on.

Nothing here starts a process or prints; `tunekit.worker` does the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ValidationError

from tunekit.errors import ArtifactError, DeviceError, TunekitError, did_you_mean, output_errors
from tunekit.files import clean_leftovers, write_json
from tunekit.records import Count, Record, Seconds, read, read_bytes

QUEUE = ".queue"
"""The folder, beside the runs."""
MOST_LOST = 3
"""Workers that a job may lose before it has failed: what kills them may be the job."""
MOST_PRIORITY = 1000
_PATIENCE = 20.0
"""Seconds to wait for the folder's lock, which nobody holds for long."""
State = Literal["waiting", "running", "done", "failed", "stopped"]
OPEN: tuple[State, ...] = ("waiting", "running")
"""States of jobs that something is still to be done for."""


class Job(Record):
    """A run in the queue.

    Attributes:
        id: counts up.
        config, overrides, processes: as `tunekit run` takes them, from the folder `cwd`.
        run: the run folder, absolute.
        device: what its config asks for: "auto", "cpu", "cuda:1".
        group: who added it and cares for it: the name of a sweep; empty for a person.
        priority: the highest comes first, from -1000 to 1000.
        place: among jobs of one priority the lowest comes first.
        state: where it is.
        stopping: 1 where a running job was asked to checkpoint and end, 2 to end now.
        worker: process that works on it.
        on: device that it runs on.
        device_bytes, ram_bytes: what its plan needs of the device and of the host; None while not known.
        added, began, ended: seconds since 1970; None for what has not happened.
        code: exit code of its last life.
        lost: workers that died over it.
        note: a line about how it came into its state.
    """

    version: Count = 1
    id: Count
    config: str
    overrides: list[str] = []
    cwd: str
    run: str
    device: str = "auto"
    processes: Count = 1
    group: str = ""
    priority: int = 0
    place: int = 0
    state: State = "waiting"
    stopping: Count = 0
    worker: int | None = None
    on: str = ""
    device_bytes: Count | None = None
    ram_bytes: Count | None = None
    added: Seconds = 0.0
    began: Seconds | None = None
    ended: Seconds | None = None
    code: int | None = None
    lost: Count = 0
    note: str = ""

    @classmethod
    def newest(cls) -> int:
        """See `Record.newest`."""
        return 1

    @property
    def name(self) -> str:
        """Of its run."""
        return Path(self.run).name

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in OPEN

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts jobs as they come."""
        return -self.priority, self.place, self.id


@dataclass(frozen=True)
class Held:
    """A job that this process works on, for as long as its lock stays open.

    Attributes:
        job: as it was taken.
        lock: the descriptor to hand to the process that is started for it (`pass_fds`).
    """

    job: Job
    lock: int


class Queue:
    """The jobs in a folder.

    Args:
        folder: `runs/.queue`; it is made when a job is added.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()
        self._jobs = self.folder / "jobs"

    @classmethod
    def of(cls, runs: Path | str) -> Queue:
        """The queue of a folder of runs."""
        return cls(Path(runs).expanduser() / QUEUE)

    # Looking ------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All jobs that can be read, in their order; those that lost their worker as waiting."""
        with self._held(alone=False):
            return [self._as_it_is(job) for job in self._read()[0]]

    def damaged(self) -> list[TunekitError]:
        """What is wrong with files that are no jobs; they are left alone, and no other job minds."""
        return self._read()[1]

    def job(self, number: int) -> Job | None:
        """One job as its file says; None where it has been removed, or cannot be read."""
        with suppress(FileNotFoundError, TunekitError):
            return read(self.file(number), Job)
        return None

    def find(self, name: str) -> Job:
        """A job by its number, or by the name of its run; of several with one name the latest.

        Raises:
            ArtifactError: there is none.
        """
        jobs = self.jobs()
        number = int(name) if name.isdigit() and len(name) < 10 else None
        found = [job for job in jobs if job.id == number] or [job for job in jobs if job.name == name]
        if found:
            return max(found, key=lambda job: job.id)
        near = did_you_mean(name, [job.name for job in jobs])
        raise ArtifactError(f'there is no job "{name}"', where=self._shown, hint=near or self._known(jobs))

    def _known(self, jobs: Sequence[Job]) -> str:
        return "tunekit queue list shows them" if jobs else "the queue is empty"

    def file(self, number: int) -> Path:
        """Where a job is written down."""
        return self._jobs / f"{number:06d}.json"

    def log(self, number: int) -> Path:
        """What the process of a job said; absent before its first life."""
        return self.folder / "logs" / f"{number:06d}.log"

    def stamp(self) -> int:
        """Is another as soon as any job is."""
        try:
            return self._jobs.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    # Changing -----------------------------------------------------------------------------------------------

    def add(
        self,
        config: Path | str,
        overrides: Sequence[str] = (),
        *,
        run: Path | str,
        priority: int = 0,
        first: bool = False,
        **fields: Any,
    ) -> Job:
        """Adds a job behind those of its priority, or before them.

        Args:
            config, overrides: as `tunekit run` takes them; nothing is checked here.
            run: its run folder.
            priority: the highest comes first.
            first: before all of its priority.
            fields: further ones of `Job`.

        Raises:
            ArtifactError: a job for this run folder waits or runs already; the queue cannot be had.
            OutputError: the folder cannot be written.
        """
        run = str(Path(run).expanduser().absolute())
        with self._held(alone=True):
            jobs = [self._as_it_is(job) for job in self._read()[0]]
            for job in jobs:
                if job.run == run and job.is_open:
                    raise ArtifactError(
                        f"job {job.id} for this run folder is {job.state} already",
                        where=run,
                        hint=f"remove it (tunekit queue remove {job.id}), or give the run another name",
                    )
            job = Job(
                id=self._next(),
                config=str(Path(config).absolute()),
                overrides=list(overrides),
                run=run,
                priority=max(-MOST_PRIORITY, min(MOST_PRIORITY, priority)),
                place=_beside(jobs, priority, first=first),
                added=time.time(),
                **{"cwd": str(Path.cwd()), **fields},
            )
            self._write(job)
        return job

    def move(
        self,
        number: int,
        *,
        before: int | None = None,
        first: bool = False,
        last: bool = False,
        priority: int | None = None,
    ) -> Job:
        """Gives a job another place: before another, whose priority it takes; first, last, or by priority."""
        with self._held(alone=True):
            jobs, job = self._read()[0], self._own(number)
            others = [other for other in jobs if other.id != number]
            if before is not None:
                target = self._own(before)
                row = [other for other in others if other.priority == target.priority]
                at = row.index(target) if target in row else 0
                row.insert(at, job)
                for place, other in enumerate(row):
                    if other.id != number and other.place != place:
                        self._write(other.model_copy(update={"place": place}))
                moved = job.model_copy(update={"priority": target.priority, "place": at})
            else:
                if priority is None:
                    # Before, or behind, all that wait, whatever their priority is.
                    known = [other.priority for other in others if other.state == "waiting"] or [job.priority]
                    priority = max(known) if first else min(known) if last else job.priority
                priority = max(-MOST_PRIORITY, min(MOST_PRIORITY, priority))
                place = _beside(others, priority, first=first)
                moved = job.model_copy(update={"priority": priority, "place": place})
            self._write(moved)
        return moved

    def stop(self, number: int, *, now: bool = False, note: str = "stopped by hand") -> Job:
        """A waiting job waits no more; a running one is asked to checkpoint and end, or to end now."""
        with self._held(alone=True):
            job = self._as_it_is(self._own(number))
            if job.state == "running":
                job = job.model_copy(update={"stopping": max(job.stopping, 2 if now else 1), "note": note})
                self._write(job)
            elif job.state == "waiting":
                job = job.model_copy(update={"state": "stopped", "note": note})
                self._write(job)
        return job

    def start(self, number: int) -> Job:
        """A job that was stopped, has failed or is done waits again; its run continues where it is."""
        with self._held(alone=True):
            job = self._as_it_is(self._own(number))
            if not job.is_open:
                update = {"state": "waiting", "lost": 0, "note": "", "code": None, "stopping": 0}
                job = job.model_copy(update=update)
                self._write(job)
            elif job.stopping:
                raise ArtifactError(f"job {job.id} is being stopped", hint="start it once it has stopped")
        return job

    def note(self, number: int, **fields: Any) -> None:
        """Writes down something about a job, if it is still there."""
        with self._held(alone=True):
            job = self.job(number)
            if job is not None:
                self._write(job.model_copy(update=fields))

    def remove(self, number: int) -> None:
        """Removes a job and its log; its run folder stays. Also a file that is damaged.

        Raises:
            ArtifactError: it runs.
        """
        with self._held(alone=True), output_errors(self.folder):
            job = self.job(number)
            if job is not None and self._as_it_is(job).state == "running":
                hint = f"tunekit queue stop {number} ends it, with a checkpoint"
                raise ArtifactError(f"job {number} runs", where=self._shown, hint=hint)
            if not self.file(number).exists():
                raise ArtifactError(f"there is no job {number}", where=self._shown)
            self.file(number).unlink()
            self._lock_file(number).unlink(missing_ok=True)
            self.log(number).unlink(missing_ok=True)

    # Working ------------------------------------------------------------------------------------------------

    def take(
        self,
        place: Callable[[Job, Sequence[Job]], str | None],
        *,
        wanted: Callable[[Job], bool] = lambda job: True,
    ) -> Held | None:
        """Takes the first job that waits, if there is room for it; no other overtakes it.

        Args:
            place: the device for a job, beside those that run, whoever works on them; None for no room.
            wanted: whether a job is this worker's; others are passed over.

        Returns:
            The job, and the lock that makes it this process's until `give` closes it.
        """
        if not self._jobs.is_dir():
            return None
        with self._held(alone=True):
            jobs = self._recovered()
            running = [job for job in jobs if job.state == "running"]
            for job in jobs:
                if job.state != "waiting" or not wanted(job):
                    continue
                device = place(job, running)
                if device is None:
                    return None
                with output_errors(self.folder):
                    lock = os.open(self._lock_file(job.id), os.O_RDWR | os.O_CREAT, 0o666)
                _flock(lock, alone=True)  # nobody else can have it: the folder is held
                update = {"state": "running", "worker": os.getpid(), "on": device, "stopping": 0, "note": ""}
                job = job.model_copy(update={**update, "began": time.time(), "ended": None, "code": None})
                try:
                    self._write(job)
                except BaseException:
                    os.close(lock)
                    raise
                return Held(job, lock)
        return None

    def give(self, held: Held, state: State, *, code: int | None = None, note: str = "") -> None:
        """What became of a job that was taken; its lock is closed. One that is gone is let be."""
        try:
            with self._held(alone=True):
                job = self.job(held.job.id)
                if job is not None:
                    update = {"state": state, "code": code, "note": note or job.note, "ended": time.time()}
                    self._write(job.model_copy(update={**update, "worker": None, "on": "", "stopping": 0}))
        finally:
            os.close(held.lock)

    # Inside -------------------------------------------------------------------------------------------------

    @property
    def _shown(self) -> str:
        return str(self.folder)

    def _lock_file(self, number: int) -> Path:
        return self._jobs / f"{number:06d}.lock"

    def _write(self, job: Job) -> None:
        write_json(self.file(job.id), job.model_dump(mode="json"))

    def _own(self, number: int) -> Job:
        try:
            return read(self.file(number), Job)
        except FileNotFoundError:
            raise ArtifactError(f"there is no job {number}", where=self._shown) from None

    def _next(self) -> int:
        names = [file.stem for file in (*self._jobs.glob("*.json"), *(self.folder / "logs").glob("*.log"))]
        return max((int(name) for name in names if name.isdigit()), default=0) + 1

    def _read(self) -> tuple[list[Job], list[TunekitError]]:
        found: list[Job] = []
        wrong: list[TunekitError] = []
        try:
            files = sorted(self._jobs.glob("[0-9]*.json"))
        except OSError as error:
            raise ArtifactError(f"cannot be read: {error.strerror}", where=self._shown) from error
        for file in files:
            try:
                job = read(file, Job, hint=f"tunekit queue remove {int(file.stem)} takes it away")
                if file != self.file(job.id):
                    raise ArtifactError("is the file of another job", where=str(file))
                found.append(job)
            except FileNotFoundError:
                continue  # removed meanwhile
            except (TunekitError, ValidationError, ValueError) as error:
                wrong.append(error if isinstance(error, TunekitError) else ArtifactError(str(error)))
        return sorted(found, key=lambda job: job.order), wrong

    def _is_worked_on(self, number: int) -> bool:
        """Whether somebody holds a job's lock; asked by who holds the folder's."""
        try:
            lock = os.open(self._lock_file(number), os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _flock(lock, alone=False)
        finally:
            os.close(lock)

    def _as_it_is(self, job: Job) -> Job:
        """A job that says it runs, and whose worker is gone, is waiting, or has failed."""
        if job.state != "running" or self._is_worked_on(job.id):
            return job
        lost, update = job.lost + 1, {"worker": None, "on": "", "stopping": 0}
        if job.stopping:
            return job.model_copy(update={**update, "state": "stopped", "note": job.note})
        if lost >= MOST_LOST:
            note = f"its worker died {lost} times; tunekit queue start {job.id} tries again"
            return job.model_copy(update={**update, "state": "failed", "lost": lost, "note": note})
        note = "taken up again, for its worker died"
        return job.model_copy(update={**update, "state": "waiting", "lost": lost, "note": note})

    def _recovered(self) -> list[Job]:
        """All jobs as they are, written down."""
        with suppress(OSError):
            clean_leftovers(self._jobs)
        jobs = []
        for job in self._read()[0]:
            real = self._as_it_is(job)
            if real is not job:
                self._write(real)
            jobs.append(real)
        return jobs

    @contextmanager
    def _held(self, *, alone: bool) -> Iterator[None]:
        """Holds the folder, alone to change something in it.

        Raises:
            ArtifactError: others held it for too long.
            OutputError: it cannot be written.
        """
        if not alone and not (self.folder / "lock").exists():
            yield
            return
        with locked(self.folder / "lock", alone=alone, seconds=_PATIENCE):
            yield


def _beside(jobs: Sequence[Job], priority: int, *, first: bool) -> int:
    """A place before or behind all jobs of a priority."""
    places = [job.place for job in jobs if job.priority == priority] or [0]
    return min(places) - 1 if first else max(places) + 1


def _flock(descriptor: int, *, alone: bool) -> bool:
    """Gets hold of a lock, if it is free.

    Raises:
        DeviceError: this system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise DeviceError("a queue needs the file locks of Linux and macOS; on Windows use WSL") from None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, *, alone: bool = True, seconds: float = 0.0, busy: str = "") -> Iterator[IO[bytes]]:
    """Holds a file's lock, which goes with this process however it ends.

    Args:
        path: it is made where it is not there.
        alone: else together with others that do not want it alone.
        seconds: to wait for it.
        busy: what to say where another has it.

    Raises:
        ArtifactError: another process has it.
        OutputError: the file cannot be made.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab" if alone else "rb")
    with file:
        until = time.monotonic() + seconds
        while not _flock(file.fileno(), alone=alone):
            if time.monotonic() > until:
                raise ArtifactError(
                    busy or "another process holds it, and for too long",
                    where=str(path.parent),
                    hint="wait for it, or stop it",
                )
            time.sleep(0.01)
        yield file


def last_error(log: Path) -> str:
    """The last error that a log tells, in one line; its last line where it tells none."""
    try:
        lines = read_bytes(log)[-20_000:].decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, TunekitError):
        return ""
    told = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
    return told[-1].removeprefix("error: ").strip()[:300] if told else ""
