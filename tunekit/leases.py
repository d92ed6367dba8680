"""Shares out what is to be encoded among processes, here or on other machines, a few pictures at a time.

    peers = [LocalPeer("cuda:0", seen_alone(["cuda:0"])), ...]
    filled = fill(peers, "mine.yaml", overrides, say=print, shown=console())

Pictures and captions have numbers; a process is lent some numbers that follow one another, looks which of
those the cache has not, encodes these into a shard of its own, and says so. What a process was lent that is
gone is lent again, also what it had said to be done, for the disk may have lost that with its machine: what
it has really put is found by its key, and not encoded twice.
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from tunekit import errors
from tunekit.errors import DeviceError, Interrupted, TunekitError
from tunekit.jobs import locked
from tunekit.progress import Progress
from tunekit.units import format_bytes, format_count

LEASE = 32
"""Pictures, or captions, that are lent at a time."""
AHEAD = 2
"""Leases that a process has, so that it need not wait for the next."""
MOST_LOST = 3
"""Processes that a lease may take with it."""
LOCK = "encode.lock"
_TICK = 0.01
_QUIET = 2000


class Gone(Exception):
    """A process has ended; says how.

    Args:
        how: for people.
        after: seconds until it writes no more, where that is not known.
    """

    def __init__(self, how: str, *, after: float = 0.0) -> None:
        super().__init__(how)
        self.after = after


class Peer(Protocol):
    """A process that encodes, see `encoding.Encoding`; answers come in the order of the calls."""

    name: str
    """Where it is: "cuda:0", "1a2b3c4d/cpu"."""

    def ask(self, do: str, *given: Any) -> None:
        """Call it."""
        ...

    def poll(self) -> dict[str, Any] | None:
        """An answer, if there is one.

        Raises:
            Gone: it has ended.
        """
        ...

    def end(self) -> None:
        """End it."""
        ...


class LocalPeer:
    """A process of this machine.

    Args:
        name: of its device.
        environment: what it finds in its environment, beside this process's.
        cwd: where it works.
    """

    def __init__(
        self, name: str, environment: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> None:
        self.name = name
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunekit.encoding"],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            start_new_session=True,  # the terminal's Ctrl-C comes to this process alone
        )
        self._answers: deque[bytes] = deque()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, do: str, *given: Any) -> None:
        """See `Peer`."""
        assert self.process.stdin is not None
        with suppress(OSError):  # `poll` says that it is gone
            self.process.stdin.write(json.dumps({"do": do, "with": given}).encode() + b"\n")
            self.process.stdin.flush()

    def poll(self) -> dict[str, Any] | None:
        """See `Peer`."""
        if self._answers:
            answer: dict[str, Any] = json.loads(self._answers.popleft())
            return answer
        if self._reader.is_alive():
            return None
        if self._answers:  # the last one came meanwhile
            return self.poll()
        raise Gone(self._how())

    def wait(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            Gone: it has ended.
        """
        while (answer := self.poll()) is None:
            time.sleep(_TICK)
        return answer

    def end(self) -> None:
        """See `Peer`."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(1)
        for stream in (self.process.stdin, self.process.stdout, self._noise):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self._answers.append(line)

    def _how(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "it was killed, perhaps because memory ran out"
        self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, self._noise.tell() - _QUIET))
        said = self._noise.read().decode("utf-8", "replace").strip().splitlines()
        return f"it ended with code {code}" + (f": {said[-1]}" if said else "")


@dataclass
class Lease:
    """Some units of a work.

    Attributes:
        work: its number.
        start: the first unit.
        stop: behind the last.
        lost: processes that had it and are gone.
        counted: whether what it came to is in the figures.
    """

    work: int
    start: int
    stop: int
    lost: int = 0
    counted: bool = False


@dataclass
class Done:
    """What became of one kind of thing.

    Attributes:
        what: "picture" or "caption".
        count: so many there are.
        encoded: parts (cuts of a picture) that were encoded now.
        found: parts that were there.
    """

    what: str
    count: int = 0
    encoded: int = 0
    found: int = 0


@dataclass
class Filled:
    """What `fill` came to.

    Attributes:
        folder: the cache.
        works: by what is encoded.
        written: bytes that were put.
        seconds: of encoding.
        peers: name of each process -> what it encoded.
        lost: name of each process that went -> how.
    """

    folder: Path
    works: dict[str, Done] = field(default_factory=dict)
    written: int = 0
    seconds: float = 0.0
    peers: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def encoded(self) -> int:
        """All that was."""
        return sum(done.encoded for done in self.works.values())

    def __str__(self) -> str:
        """A line for people."""
        parts = []
        for done in self.works.values():
            plural = "s" if done.count != 1 else ""
            text = f"{format_count(done.count)} {done.what}{plural}: {format_count(done.encoded)} encoded"
            parts.append(f"{text}, {format_count(done.found)} were there" if done.found else text)
        return f"{'; '.join(parts)}; {format_bytes(self.written)} written to {self.folder}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "version": 1,
            "cache": str(self.folder),
            **{
                f"{name}s": {"count": done.count, "encoded": done.encoded, "found": done.found}
                for name, done in self.works.items()
            },
            "written_bytes": self.written,
            "seconds": round(self.seconds, 3),
            "processes": [
                {"name": name, "encoded": count, "lost": self.lost.get(name)}
                for name, count in self.peers.items()
            ],
        }


def fill(
    peers: Sequence[Peer],
    config: str,
    overrides: Sequence[str],
    folder: Path,
    *,
    sharers: int = 1,
    say: Callable[[str], None] = print,
    shown: Progress | None = None,
) -> Filled:
    """Encode all pictures and captions of a config that the cache has not.

    Args:
        peers: processes that do it; they are ended.
        config: that each of them reads.
        overrides: `a.b=c`.
        folder: of the cache.
        sharers: processes on one device.
        say: takes lines.
        shown: shows how far it is.

    Raises:
        ArtifactError: another one fills the cache.
        TunekitError: what a process says of the config, the pictures, the base or the disk; it names the
            process where there are several.
        DeviceError: no process is left.
        Interrupted: it was told to end.
    """
    team = _Team(list(peers), shown or Progress(quiet=True), Filled(folder))
    try:
        with _told_to_end(), locked(folder / LOCK, busy="another tunekit encode fills this cache"):
            try:
                _mend(folder, say)
                team.work(config, list(overrides), sharers, say)
            finally:
                for peer in peers:
                    peer.end()
                _mend(folder, say)
    except _End as end:
        stopped = Interrupted(
            "stopped; what was encoded stays in the cache", hint="give the same command again to continue"
        )
        stopped.exit_code = 128 + end.number
        raise stopped from None
    finally:
        for peer in peers:
            peer.end()
    return team.filled


def _mend(folder: Path, say: Callable[[str], None]) -> None:
    """End the shards of processes that were killed."""
    if not any(folder.glob("*/*.part")):
        return
    from tunekit.data.store import Store

    for kind in ("latents", "conditioning"):
        Store(folder / kind, say=say).tidy()


class _Team:
    """The processes, and what each was lent."""

    def __init__(self, peers: list[Peer], shown: Progress, filled: Filled) -> None:
        self.peers = peers
        self.shown = shown
        self.filled = filled
        self.kinds: list[str] = []
        self.later: list[tuple[float, list[Lease]]] = []
        self.looks = 0
        """Times that others had to look at what a process left."""
        self.lent: dict[str, deque[Lease]] = {peer.name: deque() for peer in peers}
        self.done: dict[str, list[Lease]] = {peer.name: [] for peer in peers}
        filled.peers = dict.fromkeys(self.lent, 0)

    def work(self, config: str, overrides: list[str], sharers: int, say: Callable[[str], None]) -> None:
        """All of it."""
        with self.shown.phase("looking at the pictures and opening the base"):
            wishes = self._all("settle", config, overrides, sharers)
            lowered = [name for name, wish in wishes.items() if wish["precision"] != "fp32"]
            precision = wishes[lowered[0]]["precision"] if lowered else "fp32"
            opened = self._all("open", precision)
        first, *others = opened
        for name in others:
            if opened[name]["sees"] != opened[first]["sees"]:
                raise DeviceError(
                    f"{name} sees other pictures, another base or another config than {first}",
                    hint="all of them must be the same files, under one path, on all machines",
                )
        for line in opened[first]["lines"]:
            say(line)
        began = time.monotonic()
        for number, (what, count) in enumerate(opened[first]["works"]):
            self.kinds.append(what)
            self.filled.works.setdefault(what, Done(what)).count += count
            todo = deque(Lease(number, start, min(start + LEASE, count)) for start in range(0, count, LEASE))
            with self.shown.phase(f"encoding {what}s", count) as phase:
                self._through(todo, phase.advance, say)
        while (again := self._closed(say)) or self.later:
            self._through(again, lambda count: None, say)
        self.filled.seconds = time.monotonic() - began

    def _all(self, do: str, *given: Any) -> dict[str, Any]:
        """Call all of them, and wait for all answers."""
        for peer in self.peers:
            peer.ask(do, *given)
        answers: dict[str, Any] = {}
        while len(answers) < len(self.peers):
            for peer in self.peers:
                if peer.name in answers:
                    continue
                try:
                    answer = peer.poll()
                except Gone as gone:
                    raise DeviceError(f"the process on {peer.name} is gone: {gone}") from None
                if answer is not None:
                    answers[peer.name] = self._value(peer, answer)
            time.sleep(_TICK)
        return answers

    def _through(
        self, todo: deque[Lease], advance: Callable[[int], None], say: Callable[[str], None]
    ) -> None:
        """Lend until everything is done."""
        while todo or any(self.lent.values()) or self.later:
            idle = True
            self._release(todo)
            for peer in list(self.peers):
                lent = self.lent[peer.name]
                while todo and len(lent) < AHEAD:
                    lease = todo.popleft()
                    lent.append(lease)
                    peer.ask("encode", lease.work, lease.start, lease.stop, self.looks)
                try:
                    answer = peer.poll() if lent else None
                except Gone as gone:
                    self._lose(peer, gone, say)
                    continue
                if answer is None:
                    continue
                idle = False
                value, lease = self._value(peer, answer), lent.popleft()
                self.done[peer.name].append(lease)
                done = self.filled.works[self.kinds[lease.work]]
                self.filled.peers[peer.name] += value["made"]
                self.filled.written += value["bytes"]
                done.encoded += value["made"]
                if not lease.counted:
                    lease.counted = True
                    done.found += value["there"]
                    advance(lease.stop - lease.start)
            if idle:
                time.sleep(_TICK)

    def _closed(self, say: Callable[[str], None]) -> deque[Lease]:
        """Has all of them end their shards; what is to be looked at again where one is gone."""
        waiting = list(self.peers)
        for peer in waiting:
            peer.ask("close")
        while waiting:
            for peer in list(waiting):
                try:
                    answer = peer.poll()
                except Gone as gone:
                    waiting.remove(peer)
                    self._lose(peer, gone, say)
                    continue
                if answer is not None:
                    self._value(peer, answer)
                    waiting.remove(peer)
            time.sleep(_TICK)
        again: deque[Lease] = deque()
        self._release(again)
        return again

    def _release(self, todo: deque[Lease]) -> None:
        """Lends again what was lent to processes that write no more, before all else."""
        now = time.monotonic()
        for due, leases in list(self.later):
            if due <= now:
                self.later.remove((due, leases))
                todo.extendleft(reversed(leases))
                self.looks += 1

    def _lose(self, peer: Peer, gone: Gone, say: Callable[[str], None]) -> None:
        """Notes that what a process was lent that is gone is to be lent again."""
        how = str(gone)
        lent, done = self.lent[peer.name], self.done[peer.name]
        if lent:
            lent[0].lost += 1
        self.peers.remove(peer)
        self.filled.lost[peer.name] = how
        again = [*lent, *done]
        if lent and lent[0].lost >= MOST_LOST:
            first = lent[0]
            raise DeviceError(
                f"{MOST_LOST} processes have ended over {names_of(first)}; the last: {how}",
                hint="look at these pictures; what was encoded stays",
            )
        lent.clear()
        done.clear()
        if not self.peers:
            raise DeviceError(
                f"the process on {peer.name} is gone: {how}; none is left",
                hint="what was encoded stays; give the same command again to continue",
            )
        self.later.append((time.monotonic() + gone.after, again))
        say(f"{peer.name} is gone ({how}); others go on with its part")

    def _value(self, peer: Peer, answer: dict[str, Any]) -> Any:
        if "value" in answer:
            return answer["value"]
        told = answer["error"]
        kind = getattr(errors, told.pop("kind"), TunekitError)
        if len(self.filled.peers) > 1 and not told["where"]:
            told["where"] = peer.name
        raise kind(told.pop("message"), **told)


def names_of(lease: Lease) -> str:
    """What a lease is about, for people."""
    return f"numbers {lease.start:,} to {lease.stop - 1:,}"


class _End(BaseException):
    """A signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Raises where SIGINT or SIGTERM comes."""

    def note(number: int, frame: FrameType | None) -> None:
        raise _End(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
