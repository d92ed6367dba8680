"""One training on several machines of a Ray cluster.

    run_on("mine.yaml", [], 2, "auto", processes=4)

Ray places one `tunekit run` on each of the machines and tells when one is gone. Which rank is where it is
told in its environment (`launch.Place`); the ranks find each other as under any other launcher (`ranks`), and
nothing of the training goes through Ray. So the run folder need not be on a shared disk: that of rank 0 is
the one, and rank 0 is on the machine that gave the command, if that takes part.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tunekit import ranks
from tunekit.cluster import Agent, Node, Nodes, cluster
from tunekit.config import Loaded, load
from tunekit.errors import DeviceError, TunekitError
from tunekit.launch import Place
from tunekit.quiet import report_error
from tunekit.worker import GONE

PATIENCE = 60.0
"""Seconds that the other machines have to end by themselves when one has failed: the first one is saving."""
_POLL = 0.2
_STOP = (signal.SIGINT, signal.SIGTERM)


def run_on(
    config: str | Path, overrides: Sequence[str], count: int, address: str, *, processes: int = 1
) -> int:
    """Runs a recipe on `count` machines, and shows what the first one says.

    Args:
        config: a path, or the name of a ready-made config; its text goes to machines that do not have it.
        overrides: `a.b=c` each.
        count: of machines.
        address: of the cluster; see `cluster.cluster`.
        processes: on each machine.

    Returns:
        Its exit code, that of the recipe.

    Raises:
        TunekitError: it did not start, for the reason that it says.
    """
    loaded = load(config, overrides)
    with cluster(address, Path(loaded.config.runs), shared=False) as found:
        memory = getattr(loaded.config, "memory", None)
        device = memory.device if memory else "cpu"
        here = found.ray.get_runtime_context().get_node_id()
        chosen = choose(list(found.found.values()), count, processes, device, here)
        return _Group(found, chosen, loaded, tuple(overrides), processes).run()


def choose(nodes: Sequence[Node], count: int, processes: int, device: str, here: str) -> list[Node]:
    """The machines that take part, the one that gave the command first if it does.

    Args:
        nodes: all of the cluster.
        count: how many are wanted.
        processes: on each.
        device: that the config asks for; "auto" is cards where there are any.
        here: id of the node that gave the command.

    Raises:
        DeviceError: there are not so many.
    """
    kind = device.partition(":")[0]
    cards = {node.id: sum(name.startswith("cuda:") for name in node.rooms) for node in nodes}
    on_cards = kind == "cuda" or (kind == "auto" and any(cards.values()))
    able = [node for node in nodes if not on_cards or cards[node.id] >= processes]
    if len(able) < count:
        what = f" with {processes} card{'s' if processes > 1 else ''} each" if on_cards else ""
        there = ", ".join(
            f"{node.name} ({node.host}{f', {cards[node.id]} cards' if on_cards else ''})" for node in nodes
        )
        raise DeviceError(
            f"--nodes {count}, and the cluster has {len(able)}{what}: {there}",
            hint="add nodes (ray start --address=...), or ask for fewer",
        )
    return sorted(able, key=lambda node: node.id != here)[:count]


class _Launcher(Agent):
    """Runs `tunekit run` on its machine; what it says is fetched from here."""

    def where(self) -> int:
        """A port that is free."""
        with socket.socket() as free:
            free.bind(("", 0))
            return int(free.getsockname()[1])

    def start(
        self, words: list[str], config: str, text: str, cwd: str, told: dict[str, str]
    ) -> tuple[int | None, bytes, bytes]:
        """Begins.

        Args:
            words: of the command; "{config}" is the config's file.
            config: where it is on the machine that gave the command.
            text: of it.
            cwd: where the command was given.
            told: environment.
        """
        if not Path(cwd).is_dir():
            raise FileNotFoundError(f"there is no folder {cwd}, in which the command was given")
        self.folder = tempfile.TemporaryDirectory(prefix="tunekit-node-")
        file = Path(config)
        try:
            same = file.read_text(encoding="utf-8") == text
        except OSError:
            same = False
        if not same:
            file = Path(self.folder.name, file.name)
            file.write_text(text, encoding="utf-8")
        command = [str(file) if word == "{config}" else word for word in words]
        self.streams = [Path(self.folder.name, name) for name in ("out", "errors")]
        self.read = [0, 0]
        out, errors = map(str, self.streams)
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides all cards from what asks for none
            del os.environ["CUDA_VISIBLE_DEVICES"]
        self.begin(command, cwd, told, out, errors)
        return self.look()

    def look(self) -> tuple[int | None, bytes, bytes]:
        """Its exit code, once it has one, and what it has said since the last look."""
        code = self.poll()
        said = []
        for index, stream in enumerate(self.streams):
            with stream.open("rb") as file:
                file.seek(self.read[index])
                said.append(file.read())
            self.read[index] += len(said[-1])
        if code is not None:
            self.folder.cleanup()
        return code, said[0], said[1]


@dataclass
class _There:
    """One machine's launcher, as it is seen from here."""

    node: Node
    agent: Any
    answer: Any = None
    code: int | None = None
    errors: bytes = b""

    @property
    def name(self) -> str:
        return f"{self.node.name} ({self.node.host})"


@dataclass
class _Group:
    """The launchers of one run."""

    nodes: Nodes
    chosen: Sequence[Node]
    loaded: Loaded
    overrides: tuple[str, ...]
    processes: int
    launchers: list[_There] = field(default_factory=list)
    received: int | None = None

    def run(self) -> int:
        """Starts all, shows what the first says, and ends all when one has failed."""
        ray = self.nodes.ray
        make = ray.remote(_Launcher)
        self.launchers = [_There(node, make.options(**self.nodes.on(node)).remote()) for node in self.chosen]
        before = {number: signal.getsignal(number) for number in _STOP}
        try:
            self._begin()
            for number in _STOP:
                signal.signal(number, self._pass_on)
            self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for launcher in self.launchers:
                ray.kill(launcher.agent)
        return self._result()

    def _begin(self) -> None:
        ray, first = self.nodes.ray, self.launchers[0]
        text = self.loaded.path.read_text(encoding="utf-8")
        words = ["{python}", "-m", "tunekit", "run", "{config}", *self.overrides]
        words += ["--processes", str(self.processes)]
        world, port = self.processes * len(self.launchers), ray.get(first.agent.where.remote())
        for index, launcher in enumerate(self.launchers):
            place = Place(index * self.processes, world, first.node.address or "127.0.0.1", port)
            told = {
                ranks.DRIVEN: str(place),
                ranks.NODE: launcher.name,
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            }
            config = str(self.loaded.path.absolute())
            launcher.answer = launcher.agent.start.remote(words, config, text, str(Path.cwd()), told)

    def _wait(self) -> None:
        failed: float | None = None
        while any(launcher.code is None for launcher in self.launchers):
            time.sleep(_POLL)
            for launcher in self.launchers:
                if launcher.code is None:
                    self._look(launcher)
            if failed is None and any(launcher.code for launcher in self.launchers):
                failed = time.monotonic()
            late = time.monotonic() - failed if failed is not None else 0
            if late > PATIENCE:
                self._send(signal.SIGTERM if late < 2 * PATIENCE else signal.SIGKILL)
                time.sleep(1)

    def _look(self, launcher: _There) -> None:
        ray = self.nodes.ray
        ready, _ = ray.wait([launcher.answer], timeout=0)
        if not ready:
            return
        try:
            code, out, errors = ray.get(launcher.answer)
        except ray.exceptions.RayTaskError as error:  # what the agent itself met
            last = str(error).strip().splitlines()[-1]
            launcher.errors += f"error: it could not be started: {last}\n".encode()
            launcher.code = 1
            return
        except ray.exceptions.RayError:  # the agent has died, perhaps with its machine
            launcher.code = GONE
            return
        launcher.errors += errors
        if launcher is self.launchers[0]:
            for stream, said in ((sys.stdout, out), (sys.stderr, errors)):
                if said:
                    stream.write(said.decode(errors="replace"))
                    stream.flush()
        launcher.code = code
        if code is None:
            launcher.answer = launcher.agent.look.remote()

    def _result(self) -> int:
        """The exit code of all, after what is not said yet of the machines other than the first."""
        first, *others = self.launchers
        if self.received is not None and first.code != 0:
            return first.code if first.code and first.code > 128 else 128 + self.received
        failed = [launcher for launcher in self.launchers if launcher.code]
        if not failed:
            return 0
        for launcher in others:
            for line in launcher.errors.decode(errors="replace").splitlines() if launcher.code else []:
                print(f"{launcher.name}: {line}", file=sys.stderr, flush=True)
        gone = [launcher for launcher in failed if launcher.code == GONE]
        if gone and b"error: " not in first.errors:
            who = ", ".join(launcher.name for launcher in gone)
            hint = (
                "what is in the run folder stays: give the same command again to continue, on the nodes left"
            )
            report_error(TunekitError(f"lost the node{'s' if len(gone) > 1 else ''} {who}", hint=hint))
        # What ended with its node may have told the others to stop.
        codes = [launcher.code for launcher in failed if launcher.code and 0 < launcher.code <= 128]
        return next(iter(codes), 1)

    def _send(self, number: int) -> None:
        for launcher in self.launchers:
            if launcher.code is None:
                launcher.agent.send.remote(int(number))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._send(number)
