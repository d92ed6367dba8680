"""Works on a queue with the machines of a Ray cluster: the worker's rules, with processes that run elsewhere.

    with cluster("auto", "runs") as nodes:
        ClusterWorker.on(nodes, Queue.of("runs")).work()

A device is named with its node, "1a2b3c4d/cuda:0". Ray starts processes, tells of nodes that are gone, and
nothing else: which job comes next, where there is room for it and when it ends is said by the same code as on
one machine, so a sweep comes to the same. Run folders, the queue, the configs and the pictures are on a disk
that all nodes see under one path; a node that does not see one of them, or has other versions, is refused
before anything begins.

A job whose node is gone waits again, and goes on from its checkpoint elsewhere. One that finds its node's
disk full has failed, and the node gets no other for a while; the others go on.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunekit import hardware
from tunekit.config import load
from tunekit.errors import FULL, DataError, DeviceError, OutputError, TunekitError, output_errors, require
from tunekit.jobs import Held, Queue, State
from tunekit.leases import Gone, LocalPeer
from tunekit.worker import CONTEXT_BYTES, GONE, Process, Worker

SHORT = 8
"""Letters of a node's id that name it."""
AWAY = 30.0
"""Seconds in which a node that has lost a job, or has no room on its disk, gets no other."""
SAME = ("tunekit", "python", "ray", "torch", "diffusers")
"""Of which all nodes have one version, so that it does not matter where a job runs."""
SETTLES = 5.0
"""Seconds after which all that ran on a node that is gone has noticed it."""
_ANSWER = 60.0
"""Seconds that a node has to answer."""


@dataclass
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        host: its name.
        rooms: bytes that jobs may have of each of its devices, "cpu" or "cuda:0".
        processors: of its CPU.
        address: where the others reach it.
    """

    id: str
    host: str
    rooms: dict[str, int]
    processors: int
    address: str = ""

    @property
    def name(self) -> str:
        """As devices name it."""
        return self.id[:SHORT]


@dataclass
class Nodes:
    """The machines of a cluster."""

    ray: Any
    found: dict[str, Node] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        """All cards, and all processors: these for jobs that ask for one, or where there is no card."""
        return [f"{node.name}/{device}" for node in self.found.values() for device in node.rooms]

    def on(self, node: Node) -> Any:
        """Ray's options for a task that belongs to a node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Who has room is decided by plans, so that Ray itself need not count.
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}


@contextmanager
def cluster(
    address: str,
    runs: Path | str,
    reads: Mapping[Path, str] | None = None,
    setting: str = "runs=/shared/runs",
    *,
    shared: bool = True,
) -> Iterator[Nodes]:
    """Connects to a Ray cluster, and asks each of its nodes what it is.

    Args:
        address: "auto" for the one that runs here, else one that is started on this machine for as long as
            this lasts; or host:port.
        runs: a folder that all nodes must see.
        reads: what jobs read, and the key that names it; see `inputs`.
        setting: what puts the folder elsewhere.
        shared: whether they must see `runs`.

    Raises:
        MissingPackageError: Ray is not installed.
        DeviceError: there is no such cluster; a node has other versions, or does not answer.
        OutputError: a node does not see the folder, or cannot write to it.
        DataError: a node does not see what jobs read.
    """
    ray = require("ray", extra="cluster", why="--cluster needs")
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # what sees which card, jobs are told
        _connect(ray, address)
    try:
        nodes = Nodes(ray)
        _look(nodes, Path(runs).expanduser().absolute(), reads or {}, setting, shared=shared)
        yield nodes
    finally:
        if own:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    # Its dashboard is a job interface that asks nobody who they are.
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if address != "auto" or not isinstance(error, ConnectionError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            if "version mismatch" in str(error).lower():
                raise DeviceError(
                    f"the Ray cluster at {address} has other versions: {' '.join(lines)[:300]}",
                    where="--cluster",
                    hint="install the same versions on all nodes",
                ) from error
            text = lines[0] if lines else type(error).__name__
            raise DeviceError(f"there is no Ray cluster at {address}: {text}", where="--cluster") from error
        ray.init(include_dashboard=False, **quiet)


def inputs(queue: Queue) -> dict[Path, str]:
    """What the jobs that wait in a queue read on this machine; what is wrong with one, it says itself."""
    from tunekit.preconditions import reads

    found: dict[Path, str] = {}
    for job in queue.jobs():
        if job.state == "waiting":
            with suppress(TunekitError, OSError):
                named = reads(load(job.config, job.overrides), Path(job.cwd))
                found |= {path: f"{key} of job {job.id}" for key, path in named.items()}
    return found


def _versions() -> dict[str, str]:
    """Of what decides how a job goes."""
    import tunekit

    found = {"tunekit": tunekit.__version__, "python": sys.version.split()[0]}
    for name in SAME[2:]:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _describe(folder: str, token: str, cards: int, reads: list[str]) -> dict[str, Any]:
    """What a node says of itself; runs there.

    Args:
        folder: of the runs.
        token: a file in it.
        cards: how many Ray has found.
        reads: files and folders.
    """
    rooms = {"cpu": hardware.machine_memory()[1]}
    if cards:
        import torch

        for index in range(cards):
            total = torch.cuda.get_device_properties(index).total_memory
            rooms[f"cuda:{index}"] = int(total) - CONTEXT_BYTES
    return {
        "host": socket.gethostname(),
        **_versions(),
        "lacks": [path for path in reads if not os.access(path, os.R_OK)],
        "sees": Path(folder, token).is_file() and os.access(folder, os.W_OK),
        "rooms": rooms,
        "processors": hardware.processors(),
    }


def _look(
    nodes: Nodes, runs: Path, reads: Mapping[Path, str], setting: str = "", *, shared: bool = True
) -> None:
    """Asks all nodes, and holds their answers against this machine."""
    ray, wanted = nodes.ray, _versions()
    paths = {str(path): key for path, key in reads.items()}
    token = f".cluster-{uuid.uuid4().hex}"
    with output_errors(runs / token):
        runs.mkdir(parents=True, exist_ok=True)
        (runs / token).touch()
    try:
        items = [item for item in ray.nodes() if item["Alive"]]
        alive = [Node(item["NodeID"], "", {}, 1, item.get("NodeManagerAddress", "")) for item in items]
        cards = [int(item.get("Resources", {}).get("GPU", 0)) for item in items]
        describe = ray.remote(_describe)
        asked = [
            describe.options(**nodes.on(node)).remote(str(runs), token, count, list(paths))
            for node, count in zip(alive, cards, strict=True)
        ]
        for node, answer in zip(alive, asked, strict=True):
            try:
                told = ray.get(answer, timeout=_ANSWER)
            except Exception as error:
                if type(error).__name__ == "TaskUnschedulableError":  # gone, and still in the list
                    continue
                text = str(error).strip().splitlines()[-1:]
                raise DeviceError(
                    f"the node {node.name} does not answer: {' '.join(text)}",
                    where="--cluster",
                    hint="install the same tunekit there: scripts/setup cluster",
                ) from error
            node.host, node.rooms, node.processors = told["host"], told["rooms"], told["processors"]
            for what, own in wanted.items():
                if told.get(what) != own:
                    other = told.get(what) or "not installed"
                    raise DeviceError(
                        f"the node {node.name} ({node.host}) has {what} {other}, and this one {own}",
                        where="--cluster",
                        hint="install the same versions on all nodes",
                    )
            if shared and not told["sees"]:
                raise OutputError(
                    f"the node {node.name} ({node.host}) does not see {runs}, or cannot write there",
                    where="--cluster",
                    hint=f"put it on a disk that all nodes share: {setting}",
                )
            if lacks := [f"{path} ({paths[path]})" for path in told["lacks"]]:
                more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
                raise DataError(
                    f"the node {node.name} ({node.host}) does not see {lacks[0]}{more}",
                    where="--cluster",
                    hint="put it on a disk that all nodes share, under one path",
                )
            nodes.found[node.name] = node
    finally:
        (runs / token).unlink(missing_ok=True)


class Agent:
    """Runs a job's process on its node. One at a time asks it, so that the thread that began it stays."""

    def begin(self, command: list[str], cwd: str, told: dict[str, str], log: str, errors: str = "") -> int:
        """Starts it; what it says goes into `log`, its errors into a file of their own if one is named."""
        import subprocess

        from tunekit.launch import die_with_parent

        output = Path(log).open("ab")  # noqa: SIM115 - as long as this actor
        apart = Path(errors).open("ab") if errors else subprocess.STDOUT  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable if word == "{python}" else word for word in command],
            cwd=cwd,
            env={**os.environ, **told},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=apart,
            start_new_session=True,
            # One thread alone is here.
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit code, once it has one."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Sends a signal to it."""
        if self.process.poll() is None:
            self.process.send_signal(number)


class RemoteProcess:
    """A process on a node, asked like one that is here."""

    def __init__(self, ray: Any, agent: Any, began: Any, log: Path) -> None:
        self._ray, self._agent, self._log = ray, agent, log
        self._answer: Any = began
        self._first = True
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, once it has one."""
        if self.returncode is not None:
            return self.returncode
        ready, _ = self._ray.wait([self._answer], timeout=0)
        if not ready:
            return None
        try:
            answer = self._ray.get(self._answer)
        except self._ray.exceptions.RayTaskError as error:  # what the agent itself met
            with suppress(OSError), self._log.open("a", encoding="utf-8") as log:
                log.write(f"error: it could not be started: {str(error).strip().splitlines()[-1]}\n")
            self.returncode = 1
            return self.returncode
        except self._ray.exceptions.RayError:  # the agent has died, perhaps with its node
            self.returncode = GONE
            return self.returncode
        if not self._first:
            self.returncode = answer
        self._first = False
        if self.returncode is None:
            self._answer = self._agent.poll.remote()
        else:
            self._ray.kill(self._agent)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to it."""
        self._agent.send.remote(int(number))


class _Relay:
    """A process that encodes, on its node; calls wait for one another."""

    def __init__(self, name: str, environment: Mapping[str, str], cwd: str) -> None:
        self.peer = LocalPeer(name, environment, cwd)

    def call(self, do: str, given: Sequence[Any]) -> dict[str, Any]:
        self.peer.ask(do, *given)
        try:
            return self.peer.wait()
        except Gone as gone:
            return {"gone": str(gone)}


class RemotePeer:
    """A process on a node that encodes, see `leases.Peer`."""

    def __init__(self, nodes: Nodes, node: Node, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._ray = nodes.ray
        told = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment}
        relay = nodes.ray.remote(_Relay).options(**nodes.on(node))
        self._relay = relay.remote(name, told, str(Path.cwd()))
        self._answers: deque[Any] = deque()

    def ask(self, do: str, *given: Any) -> None:
        """See `leases.Peer`."""
        self._answers.append(self._relay.call.remote(do, list(given)))

    def poll(self) -> dict[str, Any] | None:
        """See `leases.Peer`."""
        if not self._answers:
            return None
        ready, _ = self._ray.wait([self._answers[0]], timeout=0)
        if not ready:
            return None
        try:
            answer: dict[str, Any] = self._ray.get(self._answers.popleft())
        except self._ray.exceptions.RayTaskError as error:
            raise Gone(f"it could not be started: {str(error).strip().splitlines()[-1]}") from None
        except self._ray.exceptions.RayError:  # with its node, perhaps
            raise Gone("its machine is gone", after=SETTLES) from None
        if "gone" in answer:
            raise Gone(answer["gone"])
        return answer

    def end(self) -> None:
        """See `leases.Peer`."""
        with suppress(Exception):  # a node that is gone has ended it
            self._ray.kill(self._relay)


def _is(name: str, device: str) -> bool:
    """Whether a card is what a config asks for."""
    return device in (name, name.partition(":")[0])


def encoders(nodes: Nodes, device: str, processes: int = 1) -> list[RemotePeer]:
    """Processes that encode, on each card that a config asks for or, where a node has none, on its CPU.

    Args:
        device: of the config: "auto", "cpu", "cuda".
        processes: on each device.

    Raises:
        DeviceError: no node has such a device.
    """
    found = []
    kind = device.partition(":")[0]
    for node in nodes.found.values():
        cards = [name for name in node.rooms if name != "cpu" and (kind == "auto" or _is(name, device))]
        for name in cards or (["cpu"] if kind in ("auto", "cpu") else []):
            for number in range(processes):
                told = {} if ":" in device else hardware.seen_alone([name])
                if name == "cpu":
                    told |= {"OMP_NUM_THREADS": str(max(1, node.processors // processes))}
                mark = f"/{number + 1}" if processes > 1 else ""
                found.append(RemotePeer(nodes, node, f"{node.name}/{name}{mark}", told))
    if not found:
        raise DeviceError(f"no node of the cluster has the device {device}", where="memory.device")
    return found


@dataclass
class ClusterWorker(Worker):
    """A worker whose devices are those of a cluster's nodes; see `on`."""

    nodes: Nodes | None = None
    _away: dict[str, float] = field(default_factory=dict)
    """Nodes that have lost a job, and when."""

    @classmethod
    def on(
        cls, nodes: Nodes, queue: Queue, at_once: int | None = None, group: str | None = None
    ) -> ClusterWorker:
        """A worker on all nodes."""
        worker = cls(queue, nodes.devices, at_once, group, nodes=nodes)
        for node in nodes.found.values():
            worker._rooms |= {f"{node.name}/{device}": room for device, room in node.rooms.items()}
        return worker

    def _start(self, held: Held, command: list[str], log: Path) -> Process:
        assert self.nodes is not None
        job, node = held.job, self._node(held.job.on)
        agent = self.nodes.ray.remote(Agent).options(**self.nodes.on(node)).remote()
        words = ["{python}" if word == sys.executable else word for word in command]
        told = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **self._environment(job)}
        return RemoteProcess(self.nodes.ray, agent, agent.begin.remote(words, job.cwd, told, str(log)), log)

    def tick(self) -> bool:
        """See `Worker.tick`.

        Raises:
            DeviceError: no node is left.
        """
        self._return()
        return super().tick() or (bool(self._away) and self._is_needed())

    def _is_needed(self) -> bool:
        """Whether something waits for nodes that get nothing for a while."""
        jobs = self.queue.jobs()
        return any(job.state == "waiting" and self.group in (None, job.group) for job in jobs)

    def _lose(self, held: Held) -> None:
        """Gives no more to the node for a while: that it is gone is not known at once."""
        super()._lose(held)
        self._leave_alone(held.job.on)

    def _end(self, held: Held, state: State, code: int | None, note: str) -> None:
        """See `Worker._end`; a node without room on its disk would fail all others in no time."""
        super()._end(held, state, code, note)
        if state == "failed" and any(words in note for words in FULL):
            self._leave_alone(held.job.on)

    def _leave_alone(self, device: str) -> None:
        self._away[device.partition("/")[0]] = time.monotonic()
        self._serve()

    def _return(self) -> None:
        """Takes nodes back that live, after a while."""
        late = [name for name, since in self._away.items() if time.monotonic() - since > AWAY]
        if not late or self.nodes is None:
            return
        alive = {item["NodeID"] for item in self.nodes.ray.nodes() if item["Alive"]}
        for name in late:
            del self._away[name]
            if name in self.nodes.found and self.nodes.found[name].id not in alive:
                del self.nodes.found[name]
        self._serve()
        if not self.nodes.found:
            raise DeviceError("all nodes of the cluster are gone; the same command goes on with others")

    def _serve(self) -> None:
        assert self.nodes is not None
        names = [device for device in self.nodes.devices if device.partition("/")[0] not in self._away]
        self.devices = names
        self._stamp = -1  # so that it looks what is for them

    def _node(self, device: str) -> Node:
        assert self.nodes is not None
        return self.nodes.found[device.partition("/")[0]]

    def _processors(self, device: str) -> int:
        return self._node(device).processors

    def _plan_options(self, device: str) -> list[str]:
        """Of a card that is elsewhere, its memory is what counts."""
        if device.endswith("/cpu"):
            return ["--device", "cpu"]
        return ["--budget", f"{self._room(device) // 2**20} MiB"]
