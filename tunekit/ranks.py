"""The processes of one run, on one machine or on several: they meet, agree, and hear when one is lost.

Whoever starts them (`tunekit run`, torchrun, `accelerate launch`, srun) tells each its RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. They meet here before torch's process group exists, so that what is wrong on one
machine is said once and ends all of them, and not half an hour later as a lost connection.

Each keeps a connection to the first one, over which the first tells all others how the run has ended. The
kernel closes it with the process, and its keep-alive notices a machine that is gone: one that is only busy is
never taken for dead. Who waits for a lost one, which in NCCL may last for ever, is ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from tunekit.errors import DeviceError, TunekitError

T = TypeVar("T")

NODE = "TUNEKIT_NODE"
"""Environment variable: what this machine is called in messages; its host name where it is not set."""
DRIVEN = "TUNEKIT_PLACE"
"""Environment variable: somebody collects what all machines say, so that one of them says it."""
MEET_SECONDS = 300.0
"""In which all processes have to come."""
AGREE_SECONDS = 24 * 3600.0
"""In which all have looked at their pictures; who dies meanwhile is noticed before."""
GRACE = 5.0
"""Seconds that a process has to end by itself once another has ended the run."""
SAVING = 600.0
"""Seconds that it has if it is saving something."""
_TOGETHER = 0.5
"""Processes that are lost within so many seconds are told of at once."""
_LINGER = 3.0
_SEND = 5.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}


class Elsewhere(TunekitError):
    """Another process has ended the run.

    Attributes:
        speaks: nobody has said it yet where this process can be heard.
    """

    speaks = True


@dataclass(frozen=True)
class Member:
    """A process of the run.

    Attributes:
        rank: of all.
        node: whose launcher started it: equal for those that one has started on one machine.
        name: of the machine, for people.
    """

    rank: int
    node: str
    name: str

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        known = [socket.gethostname(), str(os.getppid())]
        with suppress(OSError):  # containers may have one host name, and the same process ids
            known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
            known.append(str(Path("/proc/self/ns/pid").readlink()))
        node = hashlib.blake2b("\n".join(known).encode(), digest_size=8).hexdigest()
        return cls(rank, node, os.environ.get(NODE) or socket.gethostname())


@dataclass(frozen=True)
class End:
    """How the run has ended for all.

    Attributes:
        ranks: that have ended it.
        message, hint: why, for people; "" where they were lost.
        code: exit code.
        spoken: the one that knows has said it.
    """

    ranks: tuple[int, ...]
    message: str = ""
    hint: str = ""
    code: int = 1
    spoken: bool = False


class Company:
    """This process's place among those of a run; `meet` makes it.

    Attributes:
        rank: of this one.
        count: of all.
        members: of all, by rank, once they have met.
        spokesman: rank that says what ends the run, from where they have agreed; the others tell it.
        kept: the last checkpoint of the run.
        end: how it has ended, once it has.
    """

    def __init__(self, rank: int, count: int, store: Any, prefix: str) -> None:
        self.rank, self.count = rank, count
        self.members: list[Member] = []
        self.spokesman: int | None = None
        self.kept = ""
        self.end: End | None = None
        self._store, self._prefix = store, prefix
        self._shared = 0
        self._ended = threading.Event()
        self._since = 0.0
        self._saving = 0
        self._leaving = self._parted = False
        self._sending = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._door: socket.socket | None = None
        self._token = ""
        self._heard: dict[socket.socket, bytes] = {}
        self._peers: dict[int, socket.socket] = {}
        self._parting: set[int] = set()
        self._lost: dict[int, float] = {}
        self._came = 0

    # Meeting ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Connect the others with the first one, and begin to listen."""
        address = os.environ["MASTER_ADDR"]
        if self.rank == 0:
            self._token = secrets.token_hex(16)
            self._door = _door(address)
            self._selector.register(self._door, selectors.EVENT_READ)
            hosts = list(dict.fromkeys([address, socket.gethostname()]))
            told = {"hosts": hosts, "port": self._door.getsockname()[1], "token": self._token}
            self._store.set(f"{self._prefix}/door", json.dumps(told))
        else:
            told = json.loads(self._store.get(f"{self._prefix}/door"))
            connection = _connect(told["hosts"], told["port"])
            self._send(connection, {"kind": "hello", "rank": self.rank, "token": told["token"]})
            self._peers[0] = connection
            self._heard[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def share(self, value: T, *, seconds: float = AGREE_SECONDS) -> list[T]:
        """The values of all, by rank; each has to be of JSON."""
        self._shared += 1
        key, store, wait = f"{self._prefix}/{self._shared}", self._store, timedelta(seconds=seconds)

        def exchange() -> list[T]:
            store.set(f"{key}/{self.rank}", json.dumps(value))
            if self.rank == 0:
                keys = [f"{key}/{rank}" for rank in range(self.count)]
                store.wait(keys, wait)
                store.set(f"{key}/all", json.dumps([json.loads(one) for one in store.multi_get(keys)]))
            store.wait([f"{key}/all"], wait)
            return list(json.loads(store.get(f"{key}/all")))

        return _aside(exchange)

    def agree(self, error: TunekitError | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """What is wrong on one of them is raised on all; else the facts of all, by rank.

        Args:
            error: what is wrong here.
            facts: of JSON; what the caller compares.
        """
        own: dict[str, Any] = {"facts": facts}
        if error is not None:
            own["error"] = _told(error)
        answers = self.share(own)
        wrong = [rank for rank, answer in enumerate(answers) if "error" in answer]
        if not wrong:
            self.spokesman = 0
            return [answer["facts"] for answer in answers]
        self.spokesman = wrong[0]
        self.end = End((wrong[0],), spoken=True, **answers[wrong[0]]["error"])  # known to all
        if error is not None and self.rank == wrong[0]:
            raise error
        raise self.elsewhere(self.end)

    # While it runs ------------------------------------------------------------------------------------------

    def ended(self, seconds: float = 0.0) -> Elsewhere | None:
        """How another has ended the run, if one has, or does so in as many seconds."""
        self._ended.wait(seconds)
        return self.elsewhere(self.end) if self.end is not None else None

    def tell(self, error: TunekitError, *, spoken: bool) -> None:
        """Ends the run on all of them for an error of this process, unless it has ended already."""
        self._leaving = True
        if self._parted or self.end is not None:
            return
        told = _told(error)
        if self.rank == 0:
            self._settle(End((0,), spoken=spoken, **told))
        else:
            self._send(self._peers[0], {"kind": "end", "spoken": spoken, **told})
        if self.rank == 0:  # whoever comes late has to hear it
            until = time.monotonic() + _LINGER
            while self._came < self.count - 1 and time.monotonic() < until:
                time.sleep(0.05)

    def remember(self, checkpoint: str) -> None:
        """Tells all which checkpoint is the last one."""
        self.kept = checkpoint
        if self.rank == 0 and not self._parted:
            self._broadcast({"kind": "kept", "path": checkpoint})

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, this process is left the time that it needs."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1
            self._since = time.monotonic()  # what was held up by it has its time yet

    def part(self) -> None:
        """From here on each goes its own way."""
        self._parted = True
        if self.rank:
            self._send(self._peers[0], {"kind": "part"})

    def elsewhere(self, end: End) -> Elsewhere:
        """The error that the others end with."""
        rank = end.ranks[0]
        far = len({member.node for member in self.members}) > 1
        where = f" on {self.members[rank].name}" if far else ""
        if end.message:
            error = Elsewhere(f"rank {rank}{where}: {end.message}", hint=end.hint or None)
        else:
            who = f"rank {rank}" if len(end.ranks) == 1 else f"ranks {_listed(end.ranks)}"
            has = "has" if len(end.ranks) == 1 else "have"
            machine = ", or the machine is lost" if far else ", perhaps because memory ran out"
            kept = f"the last checkpoint is {self.kept}" if self.kept else "there was no checkpoint yet"
            again = "give the same command again to continue, in as many processes as there are now"
            error = Elsewhere(f"{who}{where} {has} gone: killed{machine}", hint=f"{kept}; {again}")
        error.exit_code = end.code
        here, speaker = self.members[self.rank].node, self.members[rank].node
        error.speaks = not (end.spoken and here == speaker)
        if os.environ.get(DRIVEN) and 0 not in end.ranks:
            error.speaks = error.speaks and here == self.members[0].node
        return error

    # The connections ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._parted:
            for key, _ in self._selector.select(0.25):
                if key.fileobj is self._door:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)
            self._judge()
            self._enforce()
        time.sleep(_LINGER)  # those that part a moment later read what there is to read
        for connection in self._heard:
            connection.close()
        if self._door is not None:
            self._door.close()

    def _accept(self) -> None:
        assert self._door is not None
        with suppress(OSError):
            connection, _ = self._door.accept()
            _steady(connection)
            self._heard[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            for rank, peer in self._peers.items():
                if peer is connection and rank not in self._parting:
                    self._lost.setdefault(rank, time.monotonic())
            return
        *lines, rest = (self._heard[connection] + data).split(b"\n")
        self._heard[connection] = rest[-65536:]
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._hear(connection, json.loads(line))

    def _hear(self, connection: socket.socket, told: dict[str, Any]) -> None:
        kind = told.pop("kind")
        rank = next((rank for rank, peer in self._peers.items() if peer is connection), None)
        if kind == "hello":
            if self.rank == 0 and secrets.compare_digest(str(told["token"]), self._token):
                self._peers[int(told["rank"])] = connection
                self._came += 1
                if self.end is not None:
                    self._send(connection, {"kind": "ended", **asdict(self.end)})
        elif rank is None:
            return
        elif kind == "part":
            self._parting.add(rank)
        elif kind == "end" and self.end is None:
            self._settle(End((rank,), **told))
        elif kind == "ended" and self.end is None:
            self._settle(End(**{**told, "ranks": tuple(told["ranks"])}))
        elif kind == "kept":
            self.kept = str(told["path"])

    def _judge(self) -> None:
        """Whether somebody is lost; those that are lost together are told of together."""
        if not self._lost or self.end is not None or self._parted:
            return
        if time.monotonic() - min(self._lost.values()) < _TOGETHER:
            return
        first = min(self._lost, key=lambda rank: self._lost[rank])
        nodes = {member.rank: member.node for member in self.members}
        together = [rank for rank in self._lost if nodes.get(rank) == nodes.get(first)]
        self._settle(End(tuple(sorted(together))))

    def _settle(self, end: End) -> None:
        self.end, self._since = end, time.monotonic()
        if self.rank == 0:
            self._broadcast({"kind": "ended", **asdict(end)})
        self._ended.set()

    def _enforce(self) -> None:
        """Ends this process if it hangs on for a run that has ended."""
        if self.end is None or self._leaving or at_end is None or not self.members:
            return
        if time.monotonic() - self._since > (SAVING if self._saving else GRACE):
            self._leaving = True
            at_end(self.elsewhere(self.end))

    def _broadcast(self, told: dict[str, Any]) -> None:
        for connection in list(self._peers.values()):
            self._send(connection, told)

    def _send(self, connection: socket.socket, told: dict[str, Any]) -> None:
        with self._sending, suppress(OSError):
            connection.sendall(json.dumps(told).encode() + b"\n")


at_end: Callable[[TunekitError], None] | None = None
"""Ends this process where its main thread hangs; whoever started the recipe sets it."""
_company: Company | None = None


def meet(seconds: float = MEET_SECONDS) -> Company | None:
    """Finds the other processes of the run; None if this is the only one.

    Raises:
        DeviceError: they did not come.
    """
    global _company  # noqa: PLW0603 - as the process group itself, there is one for each process
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _company is not None:
        return _company
    rank = int(os.environ.get("RANK", "0"))
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        store = _aside(lambda: _store(seconds))
        company = Company(rank, count, store, f"tunekit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
        _aside(company._open)
        here = Member.here(rank)
        found = company.share(asdict(here), seconds=seconds)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
        why = str(error).strip().partition("\n")[0]
        raise DeviceError(
            f"rank {rank} of {count} does not find the others at {address}:{port} ({why})",
            hint=f"start all {count} within {seconds:.0f} seconds; MASTER_ADDR is the machine of rank 0 as"
            " all others reach it, MASTER_PORT is free there",
        ) from error
    company.members = [Member(**member) for member in found]
    _company = company
    return company


def tell(error: TunekitError, *, spoken: bool) -> None:
    """Ends the run on all processes for an error of this one; none if it is alone.

    One that fails before it has met the others meets them for it, where nobody else would tell them.
    """
    company = _company
    if company is None and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
            return  # whoever started them sees it
        with suppress(TunekitError):
            company = meet(30.0)
    if company is not None:
        company.tell(error, spoken=spoken)


def ended(seconds: float = 0.0) -> Elsewhere | None:
    """How another process has ended the run, if one has, or does so in as many seconds."""
    return _company.ended(seconds) if _company is not None else None


def spokesman() -> int | None:
    """The rank that says what ends the run; None where they have not agreed on one."""
    return _company.spokesman if _company is not None else None


def remember(checkpoint: Path) -> None:
    """Tells all which checkpoint is the last one."""
    if _company is not None:
        _company.remember(str(checkpoint))


@contextmanager
def saving() -> Iterator[None]:
    """Within, this process is left the time that it needs, also where another has ended the run."""
    if _company is None:
        yield
        return
    with _company.saving():
        yield


def part() -> None:
    """From here on each process goes its own way."""
    if _company is not None:
        _company.part()


def adopt(environment: MutableMapping[str, str] | None = None) -> bool:
    """Takes from Slurm what torch's launchers say in their variables, where there are none of these.

    Only of a step of several tasks, as srun starts them: in the script of a job and in the shell of an
    allocation there is one process, whatever the number of tasks is. The variables: `man srun`, OUTPUT
    ENVIRONMENT VARIABLES.

    Returns:
        Whether this process is one of several that srun has started.
    """
    told = os.environ if environment is None else environment
    count = int(told.get("SLURM_STEP_NUM_TASKS") or 1)
    if count < 2 or "SLURM_PROCID" not in told or {"RANK", "WORLD_SIZE"} & told.keys():
        return False
    here = _per_node(told.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(told.get("SLURM_NODEID", "0"))
    number = int(told.get("SLURM_JOB_ID") or 0) * 7 + int(told.get("SLURM_STEP_ID") or 0)
    told["RANK"], told["WORLD_SIZE"] = told["SLURM_PROCID"], str(count)
    told["LOCAL_RANK"] = told.get("SLURM_LOCALID", "0")
    told["LOCAL_WORLD_SIZE"] = str(here[node]) if node < len(here) else "1"
    told.setdefault("MASTER_ADDR", _first_host(told.get("SLURM_STEP_NODELIST", "")))
    told.setdefault("MASTER_PORT", str(20000 + number % 12000))  # below what the system gives away itself
    return True


def _first_host(listed: str) -> str:
    """`gpu[07-09,12]-ib,login` begins with gpu07-ib."""
    match = re.match(r"([^,\[\]]*)(?:\[([^,\]-]+)[^\]]*\]([^,\[\]]*))?", listed)
    return "".join(part or "" for part in match.groups()) if match and match[0] else "127.0.0.1"


def _per_node(listed: str) -> list[int]:
    """`4(x2),3` is 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _told(error: TunekitError) -> dict[str, Any]:
    text = f"{error.where}: {error.message}" if error.where else error.message
    return {"message": text, "hint": error.hint or "", "code": error.exit_code}


def _listed(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _aside(make: Callable[[], T]) -> T:
    """What `make` gives, in another thread, so that signals reach this one while it waits in torch."""
    found: list[T] = []
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            found.append(make())
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=work, name="meeting", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if wrong:
        raise wrong[0]
    return found[0]


def _store(seconds: float) -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://", timeout=timedelta(seconds=seconds))))[0]


def _door(address: str) -> socket.socket:
    """Where the first one is found: at the address that all know, if it is one of this machine."""
    with suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        own = str(place[0])
        # A machine may know its own name as an address that only it can reach.
        if not own.startswith("127.") or address in (own, "localhost"):
            return socket.create_server((own, 0), family=family, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _connect(hosts: Sequence[str], port: int) -> socket.socket:
    wrong: OSError | None = None
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=10)
        except OSError as error:
            wrong = wrong or error
            continue
        _steady(connection)
        return connection
    raise wrong or OSError("it gives no address")


def _steady(connection: socket.socket) -> None:
    """Lets the kernel notice a machine that is gone."""
    connection.settimeout(_SEND)
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
