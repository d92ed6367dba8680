"""Works on the queue of a folder: each job is `tunekit run` in a process of its own, on a device with room.

    Worker(Queue.of("runs"), ["cuda:0", "cuda:1"]).work()

Several workers may serve one folder: whoever takes a job counts all that run, whoever works on them. A worker
that is told to end lets its jobs checkpoint and puts them back; one that is killed takes them with it, and
the next finds them waiting (see `jobs`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from tunekit import hardware
from tunekit.config import Loaded, load
from tunekit.errors import Interrupted, output_errors
from tunekit.jobs import MOST_LOST, Held, Job, Queue, State, last_error
from tunekit.launch import die_with_parent
from tunekit.units import format_seconds

TICK = 0.2
"""Seconds between looks at what runs."""
_LOOK = 1.0
"""Seconds after which a worker that has nothing to do looks at the jobs, though none has changed."""
PROCESS_BYTES = 700 * 2**20
"""Of the host, for a process with torch, diffusers and transformers, beside what a plan counts on the CPU."""
CONTEXT_BYTES = 2**29
"""Of a card, for what else is on it."""
UNKNOWN = 2**50
"""What a job needs that cannot be planned: a device of its own."""
GONE = -1000
"""Exit code of a process whose machine is gone."""
_ENDED_BY = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def submit(
    queue: Queue,
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    priority: int = 0,
    first: bool = False,
    group: str = "",
) -> tuple[Job, Loaded]:
    """Adds a run to a queue, once its config is known to be one.

    The file is read again when the job begins.

    Raises:
        ConfigError: the config is wrong, or misses something.
        ArtifactError, OutputError: see `Queue.add`.
    """
    loaded = load(config, overrides)
    memory = getattr(loaded.config, "memory", None)
    job = queue.add(
        loaded.path,
        overrides,
        run=loaded.config.run_dir,
        device=memory.device if memory else "auto",
        processes=processes,
        priority=priority,
        first=first,
        group=group,
    )
    return job, loaded


def devices(asked: Sequence[str] = (), *, wanted: Collection[str] = ()) -> list[str]:
    """The devices to work on: those that are asked for, else every card there is, else the processor.

    Args:
        asked: "cpu", "cuda", "cuda:1".
        wanted: what jobs ask for; where nothing else is asked for and some want the processor, it is one too.

    Raises:
        DeviceError: one is not there.
    """
    if not asked and "cpu" in wanted:
        asked = ["auto", "cpu"] if set(wanted) - {"cpu"} else ["cpu"]
    if asked and all(name == "cpu" for name in asked):
        return ["cpu"]  # known without torch
    import torch

    found = []
    for name in asked or ["auto"]:
        kind, _, number = hardware.probe(name).torch_device.partition(":")
        every = not number or name in ("auto", kind)
        count = getattr(torch, kind).device_count() if kind in ("cuda", "xpu") and every else 0
        found += [f"{kind}:{index}" for index in range(count)] or [f"{kind}:{number}" if number else kind]
    return list(dict.fromkeys(found))


def _command(job: Job) -> list[str]:
    processes = ["--processes", str(job.processes)] if job.processes > 1 else []
    return [sys.executable, "-m", "tunekit", "run", job.config, *job.overrides, *processes]


class Process(Protocol):
    """What is started for a job, here or elsewhere."""

    returncode: int | None
    """Its exit code, or minus the signal that ended it; `GONE` where its machine is; None while it runs."""

    def poll(self) -> int | None:
        """Asks for `returncode`."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Sends it a signal."""
        ...


@dataclass
class _Running:
    held: Held
    process: Process
    began: float
    told: int = 0
    """Signals sent."""


def _host(device: str) -> str:
    """The machine in a device's name, "1a2b3c4d/"; empty for this one."""
    return device[: device.rfind("/") + 1].rpartition(",")[2]


def _own(device: str) -> str:
    """A device's name on its machine."""
    return device.rpartition("/")[2]


def _kind(device: str) -> str:
    return _own(device).partition(":")[0]


@dataclass
class Worker:
    """Takes jobs and runs them.

    Attributes:
        queue: whose jobs.
        devices: where, "cpu", "cuda:0"; see `devices`.
        at_once: jobs on one device; None is as many as their plans allow, beside each other.
        group: takes the jobs of this group alone; None takes all.
        say: takes a line about each job that begins or ends.
        command: what is run for a job.
    """

    queue: Queue
    devices: Sequence[str]
    at_once: int | None = 1
    group: str | None = None
    say: Callable[[str], None] = print
    command: Callable[[Job], list[str]] = _command
    ended: dict[int, State] = field(default_factory=dict)
    """What became of the jobs that this worker had, by number."""
    running: dict[int, _Running] = field(default_factory=dict)
    signals: int = 0
    """Times that this process was told to end."""
    _stamp: int = -1
    _looked: float = 0.0
    _planning: tuple[int, subprocess.Popen[bytes], IO[bytes]] | None = None
    _rooms: dict[str, int] = field(default_factory=dict)
    _others: list[Job] = field(default_factory=list)
    """Jobs that wait for this worker."""
    _signal: int = int(signal.SIGTERM)

    # The loop -----------------------------------------------------------------------------------------------

    def work(self, *, keep: bool = False) -> None:
        """Works until nothing waits any more.

        Args:
            keep: wait for more then.

        Raises:
            Interrupted: it was told to end; jobs that ran have a checkpoint, and wait again.
        """
        with self.listening():
            while self.tick() or keep:
                time.sleep(TICK)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the jobs, and `tick` raises then; leaving it otherwise ends them too."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            try:
                self.leave()
            finally:
                for known, handler in before.items():
                    signal.signal(known, handler)

    def tick(self) -> bool:
        """One look: ends what was asked to end, notes what has ended, begins what there is room for.

        Returns:
            Whether there is something to wait for.

        Raises:
            Interrupted: this process was told to end.
        """
        if self.signals:
            self.leave()
            error = Interrupted("the worker was stopped; its jobs wait in the queue", hint="start it again")
            error.exit_code = 128 + self._signal
            raise error
        changed = self._reap()
        self._pass_on()
        self._planned()
        now, stamp = time.monotonic(), self.queue.stamp()
        if changed or stamp != self._stamp or now - self._looked > _LOOK:
            self._looked = now
            self._others = self._waiting()
            while held := self.queue.take(self._place, wanted=self.serves):
                self._begin(held)
            self._stamp = self.queue.stamp()
            self._others = self._waiting()
            self._plan_next()
        return bool(self.running or self._others)

    def leave(self) -> None:
        """Ends what runs, with a checkpoint, and puts the jobs back; told again, ends it at once."""
        if self._planning:
            self._planning[1].kill()
            self._planning[1].wait()
            self._planning[2].close()
            self._planning = None
        asked = 0
        while self.running:
            wish = 2 if self.signals > 1 else 1
            for one in self.running.values():
                if wish > asked:
                    self._tell(one, wish)
            asked = wish
            self._reap(leaving=True)
            time.sleep(0.02)

    def _note(self, number: int, frame: object) -> None:
        self.signals, self._signal = self.signals + 1, number

    # Which jobs, where --------------------------------------------------------------------------------------

    def serves(self, job: Job) -> bool:
        """Whether a job may be this worker's: of its group, and for a device that it has."""
        return (self.group is None or job.group == self.group) and bool(self._served(job.device))

    def has(self, device: str) -> bool:
        """Whether it has what a config asks for: "auto", "cpu", "cuda:1"."""
        return bool(self._served(device))

    def _waiting(self) -> list[Job]:
        return [job for job in self.queue.jobs() if job.state == "waiting" and self.serves(job)]

    def _served(self, device: str) -> list[str]:
        """The devices for a job that asks for one."""
        kind, _, number = device.partition(":")
        if kind == "auto":
            return [name for name in self.devices if _kind(name) != "cpu"] or list(self.devices)
        return [name for name in self.devices if _own(name) == device or (_kind(name) == kind and not number)]

    def _place(self, job: Job, running: Sequence[Job]) -> str | None:
        """The device, or devices, that have room for a job beside those that run; None if none has."""
        served = self._served(job.device)
        if job.processes > 1 and _kind(served[0]) != "cpu":
            free = [name for name in served if not any(name in other.on.split(",") for other in running)]
            for first in free:
                together = [name for name in free if _host(name) == _host(first)]
                if len(together) >= job.processes:
                    return ",".join(together[: job.processes])
            return None
        for name in served:
            there = [other for other in running if name in other.on.split(",")]
            if self.at_once is None and not self._host_has_room(name, job, running):
                continue
            if self.at_once is not None:
                if len(there) < self.at_once:
                    return name
            elif self._has_room(name, job, there):
                return name
        return None

    def _has_room(self, device: str, job: Job, there: Sequence[Job]) -> bool:
        """Whether a job fits on a device beside others, as their plans say."""
        on_cpu = _kind(device) == "cpu"
        if job.device_bytes is None and (len(self._others) > 1 if on_cpu else self._differ()):
            return False  # how many threads it gets, or which card, depends on what it needs
        if not there:
            largest = max(self._room(name) for name in self._served(job.device))
            room = self._room(device)
            return not self._differ() or self._needs(job, device) <= room or room == largest
        if on_cpu and len(there) >= self._processors(device):
            return False
        needs = [self._needs(other, device) for other in (job, *there)]
        return sum(needs) <= self._room(device)

    def _host_has_room(self, device: str, job: Job, running: Sequence[Job]) -> bool:
        """Whether what jobs on cards need of their host fits there."""
        host = _host(device)
        cards = [other for other in running if _kind(other.on) != "cpu" and _host(other.on) == host]
        if not cards or _kind(device) == "cpu":
            return True
        return sum(other.ram_bytes or 0 for other in (job, *cards)) <= self._room(f"{host}cpu")

    def _needs(self, job: Job, device: str) -> int:
        size = UNKNOWN if job.device_bytes is None else job.device_bytes
        return size + (PROCESS_BYTES if _kind(device) == "cpu" else 0)

    def _processors(self, device: str) -> int:
        """Of a device's machine."""
        return hardware.processors()

    def _room(self, device: str) -> int:
        """Bytes that jobs may have of a device, together."""
        if device not in self._rooms:
            kind, _, index = device.partition(":")
            if kind in ("cuda", "xpu"):
                import torch

                total = getattr(torch, kind).get_device_properties(int(index)).total_memory
                self._rooms[device] = int(total) - CONTEXT_BYTES
            else:
                self._rooms[device] = hardware.machine_memory()[1]
        return self._rooms[device]

    def _differ(self) -> bool:
        """Whether some devices have more room than others."""
        return len({self._room(name) for name in self.devices}) > 1

    def _plan_options(self, device: str) -> list[str]:
        """What a plan is made for."""
        return ["--device", _own(device)]

    def _plan_next(self) -> None:
        """Asks for the plan of the first job whose needs are not known, where that decides something."""
        if self.at_once is not None or self._planning is not None:
            return
        if len(self._others) + len(self.running) < 2 and not self._differ():
            return
        ours = [self.queue.job(number) for number in self.running]
        for job in [*(job for job in ours if job), *self._others]:
            if job.device_bytes is None:
                device = job.on.split(",")[0] or self._served(job.device)[0]
                command = [sys.executable, "-m", "tunekit", "plan", job.config, *job.overrides]
                answer = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
                process = subprocess.Popen(
                    [*command, *self._plan_options(device), "--json"],
                    cwd=job.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=answer,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._planning = (job.id, process, answer)
                return

    def _planned(self) -> None:
        """Notes what a plan says; of what cannot be planned, that it wants to be alone."""
        if self._planning is None or self._planning[1].poll() is None:
            return
        number, _, answer = self._planning
        self._planning = None
        needs = {"device_bytes": UNKNOWN, "ram_bytes": 0}
        with answer, suppress(ValueError, LookupError, TypeError, AttributeError):
            answer.seek(0)
            plan = json.load(answer)
            if plan["fits"]:
                host = max(int(phase["host_bytes"]) for phase in plan["phases"].values())
                needs = {"device_bytes": int(plan["device_bytes"]), "ram_bytes": host}
        self.queue.note(number, **needs)

    # Processes ----------------------------------------------------------------------------------------------

    def _begin(self, held: Held) -> None:
        job = held.job
        file = self.queue.log(job.id)
        try:
            with output_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("ab") as log:
                    now = time.strftime("%Y-%m-%d %H:%M:%S")
                    log.write(f"--- {now}, on {job.on}: {job.run}\n".encode())
            process = self._start(held, self.command(job), file)
        except OSError as error:
            self._end(held, "failed", None, f"it could not be started: {error.strerror}")
            return
        except BaseException:
            self.queue.give(held, "waiting")
            raise
        self.running[job.id] = _Running(held, process, time.monotonic())
        self.say(f"job {job.id} begins on {job.on}: {job.name}")

    def _start(self, held: Held, command: list[str], log: Path) -> Process:
        """Starts a process, which holds the job's lock too."""
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=held.job.cwd,
                env={**os.environ, **self._environment(held.job)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(held.lock,),
                start_new_session=True,  # the terminal's Ctrl-C comes to the worker alone
                # No threads have been started here.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )

    def _environment(self, job: Job) -> Mapping[str, str]:
        """What a job's process finds in its environment: its card alone, its share of the processor."""
        kind = _kind(job.on)
        if kind == "cpu":
            told = {} if job.device == "cpu" else {"CUDA_VISIBLE_DEVICES": ""}
            threads = max(1, self._processors(job.on) // self._neighbours(job))
            return {**told, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        return {} if ":" in job.device else hardware.seen_alone([_own(name) for name in job.on.split(",")])

    def _neighbours(self, job: Job) -> int:
        """Jobs that share the processor with this one, itself included, when all places are taken."""
        if self.at_once is not None:
            return self.at_once
        fit = self._room(job.on) // self._needs(job, job.on)
        return max(1, min(fit, self._processors(job.on), len(self._others) or 1))

    def _pass_on(self) -> None:
        """Tells processes what somebody wishes of their jobs."""
        for number, one in self.running.items():
            job = self.queue.job(number)
            wish = 2 if job is None else job.stopping  # whose file is gone is not wanted any more
            if wish > one.told:
                self._tell(one, wish)

    def _tell(self, one: _Running, wish: int) -> None:
        """Sends a signal; what `tunekit run` is told twice it ends at once."""
        for _ in range(wish - one.told):
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)
            time.sleep(0.05 if wish > 1 else 0)
        one.told = max(one.told, wish)

    def _reap(self, *, leaving: bool = False) -> bool:
        """Notes what has ended; whether anything has."""
        over = [one for one in self.running.values() if one.process.poll() is not None]
        for one in over:
            job, code = one.held.job, one.process.returncode
            del self.running[job.id]
            took = format_seconds(time.monotonic() - one.began)
            present = self.queue.job(job.id)
            if code == 0:
                self._end(one.held, "done", code, f"done in {took}")
            elif code == GONE:
                self._lose(one.held)
            elif one.told or code in _ENDED_BY:
                wished = present is None or present.stopping > 0 or not leaving
                note = present.note if present and present.stopping else "stopped by a signal"
                back = "waits, for its worker was stopped"
                self._end(one.held, "stopped" if wished else "waiting", code, note if wished else back)
            else:
                why = last_error(self.queue.log(job.id)) or f"ended with exit code {code}"
                self._end(one.held, "failed", code, why)
        return bool(over)

    def _lose(self, held: Held) -> None:
        """The machine of a job is gone: it waits again, unless it has lost too many."""
        lost = held.job.lost + 1
        state: State = "failed" if lost >= MOST_LOST else "waiting"
        self.queue.note(held.job.id, lost=lost)
        self._end(held, state, None, f"the machine that it ran on is gone ({held.job.on})")

    def _end(self, held: Held, state: State, code: int | None, note: str) -> None:
        self.queue.give(held, state, code=code, note=note)
        self.ended[held.job.id] = state
        told = note if state != "failed" else f"failed: {note} (log: {self.queue.log(held.job.id)})"
        self.say(f"job {held.job.id} ({held.job.name}): {told}")


def unserved(queue: Queue, served: Sequence[str]) -> list[str]:
    """Lines about jobs that wait for a device which is not among those that are served."""
    worker = Worker(queue, served)
    waiting = [job for job in queue.jobs() if job.state == "waiting" and not worker.serves(job)]
    return [f"job {job.id} ({job.name}) waits for {job.device}, which is not served here" for job in waiting]
