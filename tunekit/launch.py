"""How a recipe starts: `tunekit run`, or `accelerate launch recipes/x.py --config CONFIG a.b=c`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

from tunekit import ranks
from tunekit.config import Loaded, RunConfig, load
from tunekit.errors import ConfigError, Interrupted, OutOfMemory, TunekitError, from_outside
from tunekit.progress import console
from tunekit.quiet import DEBUG, quiet_libraries, report_error, report_warnings, steady_streams

C = TypeVar("C", bound=RunConfig)

LAUNCH_DIR = "TUNEKIT_LAUNCH_DIR"
"""Names the folder in which each rank leaves its process id and exit code for `launch`."""
_STOP = (signal.SIGINT, signal.SIGTERM)
_VERDICT = 1.0
"""Seconds in which `launch` notices that a rank has gone."""
_PATIENCE = 30.0
"""Seconds that the other ranks have to end by themselves when one has failed."""
_NEWS = 3.0
"""Seconds in which it is heard why a connection to another rank was lost."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of one machine stand among those of several.

    Attributes:
        first: rank of the first of them.
        world: number of all ranks.
        address, port: where rank 0 is found.
    """

    first: int
    world: int
    address: str
    port: int

    @classmethod
    def given(cls) -> Place | None:
        """What the environment says, as `str` of a place; None where this machine is the only one."""
        text = os.environ.get(ranks.DRIVEN)
        if not text:
            return None
        shares, _, place = text.partition("@")
        first, _, world = shares.partition("/")
        address, _, port = place.rpartition(":")
        return cls(int(first), int(world), address, int(port))

    def __str__(self) -> str:
        return f"{self.first}/{self.world}@{self.address}:{self.port}"


# Inside the launched process --------------------------------------------------------------------------------


def run_recipe(main: Callable[[C, Loaded], None], schema: type[C]) -> None:
    """Entry point of a recipe file: reads `--config CONFIG a.b=c ...` and calls `main(config, loaded)`.

    A TunekitError becomes one message, not one per rank, and its exit code.
    """
    quiet_libraries()
    steady_streams()
    recipe = Path(sys.argv[0]).stem
    about = (sys.modules["__main__"].__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"recipes/{recipe}.py", description=about)
    parser.add_argument("--config", required=True, help="YAML file, or the name of a ready-made config")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the config's")
    arguments = parser.parse_intermixed_args()
    debug = arguments.debug or bool(os.environ.get(DEBUG))
    for number in _STOP:
        signal.signal(number, _stop)
    if LAUNCH_DIR not in os.environ:
        ranks.adopt()
    ranks.at_end = partial(_fail, debug=False)
    console().quiet = _rank() != 0
    console().logs = True
    console().doing("starting")
    if LAUNCH_DIR in os.environ or _under_accelerate():
        die_with_parent()
        _record("pid", os.getpid())
    try:
        loaded = _load(arguments.config, arguments.overrides, schema)
        named = Path(loaded.config.recipe).stem
        if named != recipe:
            message = f'this config is for the recipe "{named}", not "{recipe}"'
            raise ConfigError(message, where=loaded.where("recipe"))
        if _rank() == 0:
            report_warnings(loaded.warnings)
        while not _done(main, loaded):
            pass
    except _Stopped as stop:
        console().doing(None)
        _fail(stop.error, debug=debug)
    except KeyboardInterrupt:
        _leave(Interrupted.exit_code)
    except Exception as error:
        console().doing(None)
        _fail(error, debug=debug)
    console().doing(None)
    _record("code", 0)


def _load(config: str, overrides: Sequence[str], schema: type[C]) -> Loaded:
    """The config, with what `accelerate launch` was told beside it."""
    loaded = load(config, overrides, schema)
    asked = "memory" in schema.model_fields and take_sharding(os.environ)
    if not asked:
        return loaded
    memory = getattr(loaded.config, "memory")  # noqa: B009 - not every recipe has the section
    if memory.sharding == "none":
        raise ConfigError(
            "none contradicts the configuration of accelerate launch, which asks for FSDP",
            where=loaded.where("memory.sharding"),
            hint="leave it out, or start with another configuration of accelerate",
        )
    return loaded if memory.sharding else load(config, [*overrides, "memory.sharding=full"], schema)


def take_sharding(environment: MutableMapping[str, str]) -> bool:
    """Whether `accelerate launch` was told to split weights, as `memory.sharding=full` does.

    What it says of that is taken out of the environment: the recipe does it by itself, and accelerate's own
    way would wrap the model and the optimizer a second time.

    Raises:
        ConfigError: it was told what is not done here: FSDP 1, DeepSpeed, or an option of FSDP 2 that is a
            key of `memory:`.
    """
    if _on(environment.pop("ACCELERATE_USE_DEEPSPEED", "")):
        raise ConfigError(
            "accelerate launch was told to use DeepSpeed, whose engine has a training loop, an optimizer and"
            " checkpoints of its own",
            hint="configs/accelerate/fsdp2.yaml splits what its ZeRO-3 splits; or tunekit run --processes N"
            " memory.sharding=full",
        )
    if not _on(environment.pop("ACCELERATE_USE_FSDP", "")):
        return False
    told = {name: environment.pop(name) for name in [*environment] if name.startswith("FSDP_")}
    for name, wanted, why in (
        ("FSDP_VERSION", "2", "is FSDP 1; say fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "false", "keeps weights on the host, which does not go with FSDP 2 here"),
        ("FSDP_RESHARD_AFTER_FORWARD", "true", "keeps all weights gathered from forward to backward"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false", "is the key memory.gradient_checkpointing"),
    ):
        value = told.get(name, wanted).lower()
        if value != wanted:
            raise ConfigError(
                f"the configuration of accelerate launch says {name.lower()}: {value}, which {why}",
                hint="configs/accelerate/fsdp2.yaml is one that works",
            )
    return True


def _on(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def _fail(error: Exception, *, debug: bool) -> None:
    """Says what ended a recipe, unless another rank has, and leaves.

    Errors that are no messages yet are raised where nobody waits for the code.
    """
    told = error if isinstance(error, TunekitError) else from_outside(error)
    if told is not None and debug:
        ranks.tell(told, spoken=False)
        raise error
    if told is not error and LAUNCH_DIR in os.environ:
        # When one was killed or has given its reason, what the others then see (a lost connection) is noise.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(_VERDICT)
        reason = next((code for code in _codes(Path(os.environ[LAUNCH_DIR])) if code), None)
        if reason is not None:
            _leave(reason)
    if told is not error and (lost := ranks.ended(_NEWS)) is not None:
        told = lost
    if told is not None:
        speaks = _speaks_for_all(told)
        if speaks:
            report_error(told)
        ranks.tell(told, spoken=speaks)
        _leave(told.exit_code)
    bug = TunekitError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    bug.exit_code = 1
    if LAUNCH_DIR not in os.environ:
        ranks.tell(bug, spoken=True)
        raise error
    speaks = _speaks_for_all(error)
    if speaks:
        traceback.print_exception(error)
    ranks.tell(bug, spoken=speaks)
    _leave(1)


def _done(main: Callable[[C, Loaded], None], loaded: Loaded) -> bool:
    """Runs a recipe; False if memory ran out, and it wants to be started again with another plan."""
    try:
        main(loaded.config, loaded)
        return True
    except OutOfMemory as error:
        if not error.replan:
            raise
        console().say(f"{error.message}; plans again, for less memory")
    gc.collect()  # what the attempt held went with its frames
    return False


class _Stopped(KeyboardInterrupt):
    """A signal. No `Exception`: what a runtime or a file makes of those must not make a failure of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.error = Interrupted(
            "stopped; nothing was being trained", hint="give the same command again to continue"
        )
        self.error.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    """Signal handler outside of the training loop, which has its own."""
    raise _Stopped(number)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _record(kind: str, value: int) -> None:
    folder = os.environ.get(LAUNCH_DIR)
    if folder and Path(folder).is_dir():
        Path(folder, f"rank-{_rank()}.{kind}").write_text(str(value))


def _codes(folder: Path) -> list[int]:
    """Exit codes of the ranks that have ended, by rank."""
    files = sorted(folder.glob("rank-*.code"), key=lambda file: int(file.stem.partition("-")[2]))
    return [int(text) for file in files if (text := file.read_text())]


def _speaks_for_all(error: Exception) -> bool:
    """Whether this rank is the one to print `error`, which the others may have met too."""
    if isinstance(error, ranks.Elsewhere) and not error.speaks:
        return False
    folder = os.environ.get(LAUNCH_DIR)
    if not folder:  # plain `accelerate launch`: all ranks read the same config
        if isinstance(error, ranks.Elsewhere):
            return os.environ.get("LOCAL_RANK", "0") == "0"
        if ranks.spokesman() is not None:
            return ranks.spokesman() == _rank()
        return _rank() == 0 or not isinstance(error, ConfigError | Interrupted)
    try:
        Path(folder, "spoken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _leave(code: int) -> None:
    """Ends this process; under `launch` the code is in a file too, as soon as it is known."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOP:
            signal.signal(number, signal.SIG_IGN)
    _record("code", code)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Tearing down a process group that the other ranks have left may abort, or hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _under_accelerate() -> bool:
    """Whether the parent is `accelerate launch`, which SIGTERM ends without a word to its child."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = (
        b"/accelerate",
        b"/accelerate-launch",
        b"accelerate.commands.launch",
        b"/accelerate/commands/launch.py",
    )
    return any(word.endswith(names) for word in command)


def die_with_parent() -> None:
    """On Linux the kernel sends SIGTERM when the parent is gone, so that nothing trains on unseen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


# From outside -----------------------------------------------------------------------------------------------


def launch(
    recipe: Path,
    config: Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    cpu: bool = False,
    place: Place | None = None,
) -> int:
    """Runs a recipe, in several processes if asked, and returns its exit code.

    They find each other as those of `accelerate launch` do. Ctrl-C and SIGTERM are passed on to the recipe,
    which checkpoints and leaves; a second one ends it now.

    Args:
        recipe: recipe file.
        config: config file.
        overrides: `a.b=c` each.
        processes: one per device, or several on the CPU.
        cpu: stay on the CPU even if there is a GPU.
        place: of these processes, where others on other machines belong to the same run.
    """
    console().doing(None)  # from here on the recipe shows what it does
    with tempfile.TemporaryDirectory(prefix="tunekit-launch-") as name:
        folder = Path(name)
        command = [sys.executable, str(recipe), "--config", str(config), *overrides]
        first = place.first if place else 0
        with _Forward(folder, place) as signals:
            for rank in range(processes):
                signals.ranks.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **signals.environment(rank, processes, cpu=cpu)},
                        start_new_session=True,  # the terminal's Ctrl-C comes to us alone
                        # No threads have been started here.
                        preexec_fn=die_with_parent if os.name == "posix" else None,  # noqa: PLW1509
                    )
                )
            killed = _wait(signals.ranks, folder, first)
        codes = _codes(folder)
        spoken = (folder / "spoken").exists()
        if killed is not None and not spoken and signals.received is None:
            report_error(_killed(*killed, place.world if place else processes))
        failed = next((code for code in codes if code), None)
        if signals.received is not None and (failed is None or killed is not None):
            return 128 + signals.received
        if failed is not None:
            return failed
        crashed = next((rank.returncode for rank in signals.ranks if rank.returncode > 0), 1)
        return 0 if len(codes) == processes else crashed


def _killed(rank: int, number: int, processes: int) -> TunekitError:
    """What to say of a rank that a signal has ended."""
    who = "the recipe" if processes == 1 else f"rank {rank}"
    if number == signal.SIGKILL:
        hint = "give the same command again to continue; if it happens again, use less memory"
        return TunekitError(f"{who} was killed, perhaps because memory ran out", hint=hint)
    try:
        what = signal.Signals(number).name
    except ValueError:
        what = f"signal {number}"
    return TunekitError(
        f"{who} was ended by {what}, which comes from outside or from a fault in a library",
        hint="give the same command again to continue",
    )


def _wait(started: Sequence[subprocess.Popen[bytes]], folder: Path, first: int = 0) -> tuple[int, int] | None:
    """Waits for all ranks, counted from `first`; when one has failed and others hang on for it, ends them.

    Returns:
        Rank and signal of the first that a signal has ended, of which its folder learns too.
    """
    failed_at: float | None = None
    killed: tuple[int, int] | None = None
    while any(rank.poll() is None for rank in started):
        time.sleep(0.05)
        for index, rank in enumerate(started):
            if rank.poll() is None or failed_at is not None:
                continue
            if rank.returncode < 0:
                killed = (first + index, -rank.returncode)
                (folder / f"rank-{first + index}.code").write_text("1")
            if rank.returncode or any(_codes(folder)):
                failed_at = time.monotonic()
        late = time.monotonic() - failed_at if failed_at is not None else 0
        if late > _PATIENCE:
            for rank in started:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM if late < 2 * _PATIENCE else signal.SIGKILL)
            time.sleep(1)
    for index, rank in enumerate(started):
        if killed is None and failed_at is None and rank.returncode < 0:
            killed = (first + index, -rank.returncode)
    return killed


class _Forward:
    """Starts ranks with what they have to know, and passes SIGINT and SIGTERM on to them."""

    def __init__(self, folder: Path, place: Place | None = None) -> None:
        self.folder = folder
        self.place = place
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.received: int | None = None
        self._before = {number: signal.getsignal(number) for number in _STOP}
        self._port = 0

    def __enter__(self) -> _Forward:
        for number in _STOP:
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def environment(self, rank: int, processes: int, *, cpu: bool) -> dict[str, str]:
        """What one rank finds in its environment; of this machine's, the rank counts from 0."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
        own = {
            LAUNCH_DIR: str(self.folder),
            "ACCELERATE_USE_CPU": str(cpu).lower(),
            "ACCELERATE_MIXED_PRECISION": "no",  # the recipe's own
            "OMP_NUM_THREADS": threads,
        }
        if self.place is not None and self.place.world > 1:
            return own | {
                "RANK": str(self.place.first + rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.place.world),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": self.place.address,
                "MASTER_PORT": str(self.place.port),
            }
        if processes == 1:
            return own
        if not self._port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
        return own | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
        }

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        first = self.place.first if self.place else 0
        for index, rank in enumerate(self.ranks, start=first):
            if rank.poll() is None:
                # One that has not begun has no handler yet: SIGTERM ends it without a word.
                begun = (self.folder / f"rank-{index}.pid").exists()
                rank.send_signal(signal.SIGKILL if again else number if begun else signal.SIGTERM)
