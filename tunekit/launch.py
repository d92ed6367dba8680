"""How a recipe starts: `accelerate launch recipes/x.py --config CONFIG a.b=c`, or through `tunekit run`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from tunekit.config import Loaded, RunConfig, load
from tunekit.errors import ConfigError, Interrupted, OutOfMemory, TunekitError
from tunekit.quiet import DEBUG, quiet_libraries, report_error, report_warnings, steady_streams

C = TypeVar("C", bound=RunConfig)

LAUNCH_DIR = "TUNEKIT_LAUNCH_DIR"
"""Names the folder in which each rank leaves its process id and exit code for `launch`."""
_STOP = (signal.SIGINT, signal.SIGTERM)


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
    if LAUNCH_DIR in os.environ or _under_accelerate():
        _die_with_parent()
        _record("pid", os.getpid())
    try:
        loaded = load(arguments.config, arguments.overrides, schema)
        named = Path(loaded.config.recipe).stem
        if named != recipe:
            message = f'this config is for the recipe "{named}", not "{recipe}"'
            raise ConfigError(message, where=loaded.where("recipe"))
        if _rank() == 0:
            report_warnings(loaded.warnings)
        while not _done(main, loaded):
            pass
    except TunekitError as error:
        if debug:
            raise
        if _speaks_for_all(error):
            report_error(error)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        _leave(Interrupted.exit_code)
    except Exception as error:
        if LAUNCH_DIR not in os.environ:
            raise
        # When one rank has given its reason, what the others then see (a lost connection) is noise.
        reason = next((code for code in _codes(Path(os.environ[LAUNCH_DIR])) if code), None)
        if reason is None and _speaks_for_all(error):
            traceback.print_exc()
        _leave(reason or 1)
    _record("code", 0)


def _done(main: Callable[[C, Loaded], None], loaded: Loaded) -> bool:
    """Runs a recipe; False if memory ran out, and it wants to be started again with another plan."""
    try:
        main(loaded.config, loaded)
        return True
    except OutOfMemory as error:
        if not error.replan:
            raise
        print(f"{error.message}; plans again, for less memory", flush=True)
    gc.collect()  # what the attempt held went with its frames
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    """Signal handler outside of the training loop, which has its own."""
    error = Interrupted("stopped; nothing was being trained", hint="give the same command again to continue")
    error.exit_code = 128 + number
    raise error


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
    folder = os.environ.get(LAUNCH_DIR)
    if not folder:  # plain `accelerate launch`: all ranks read the same config
        return _rank() == 0 or not isinstance(error, ConfigError | Interrupted)
    try:
        Path(folder, "spoken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _leave(code: int) -> None:
    """Ends this process; under `launch` with the code in a file, for launchers add a traceback to it."""
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
    _record("code", code)
    code = 0 if os.environ.get(LAUNCH_DIR) else code
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


def _die_with_parent() -> None:
    """On Linux the kernel sends SIGTERM when the parent is gone, so that nothing trains on unseen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


# From outside -----------------------------------------------------------------------------------------------


def launch(
    recipe: Path, config: Path, overrides: Sequence[str] = (), *, processes: int = 1, cpu: bool = False
) -> int:
    """Runs a recipe under accelerate and returns its exit code.

    Ctrl-C and SIGTERM are passed on to the recipe, which checkpoints and leaves; a second one ends it now.

    Args:
        recipe: recipe file.
        config: config file.
        overrides: `a.b=c` each.
        processes: one per device, or several on the CPU.
        cpu: stay on the CPU even if there is a GPU.
    """
    with tempfile.TemporaryDirectory(prefix="tunekit-launch-") as name:
        folder = Path(name)
        # Everything is said here, so that accelerate's own config file, if the user has one, plays no part.
        settings = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU" if processes > 1 else "NO",
            "num_processes": processes,
            "num_machines": 1,
            "machine_rank": 0,
            "mixed_precision": "no",  # the recipe's own
            "use_cpu": cpu,
            "gpu_ids": "all",
            "debug": False,
        }
        (folder / "accelerate.json").write_text(json.dumps(settings))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(folder / "accelerate.json"), "--quiet", f"--num_cpu_threads_per_process={threads}"]
        if processes > 1:
            # torchrun starts the ranks; with ACCELERATE_USE_CPU they meet over gloo.
            command += ["--multi_gpu", f"--num_processes={processes}", "--main_process_port=0"]
        command += [str(recipe), "--config", str(config), *overrides]
        environment = {**os.environ, LAUNCH_DIR: str(folder), "ACCELERATE_USE_CPU": str(cpu).lower()}
        with _Forward(folder) as signals:
            process = subprocess.Popen(
                command,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C comes to us alone
                preexec_fn=_die_with_parent,  # noqa: PLW1509, no threads have been started here
            )
            signals.process = process
            status = _wait(process, folder)
        codes = _codes(folder)
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed
        if signals.received is not None:
            return 128 + signals.received
        if status == 0 and len(codes) == processes:
            return 0
        if not (folder / "spoken").exists():
            hint = "give the same command again to continue; if it happens again, use less memory"
            report_error(TunekitError("the recipe was killed, perhaps because memory ran out", hint=hint))
        return 1


def _wait(process: subprocess.Popen[bytes], folder: Path, *, patience: float = 30) -> int:
    """Waits for the launcher; when one rank has failed and others hang on for it, ends them."""
    failed_at: float | None = None
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if failed_at is None and any(_codes(folder)):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > patience:
                process.terminate()


class _Forward:
    """Passes SIGINT and SIGTERM on to the ranks while the launcher runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.received: int | None = None
        self._before = {number: signal.getsignal(number) for number in _STOP}

    def __enter__(self) -> _Forward:
        for number in _STOP:
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        ranks = [int(file.read_text() or 0) for file in self.folder.glob("rank-*.pid")]
        targets = [pid for pid in ranks if pid]
        again = self.received is not None
        self.received = number
        if again or not targets:  # in a hurry, or the recipe has not begun: the launcher takes all down
            targets += [self.process.pid] if self.process else []
            number = signal.SIGKILL if again else signal.SIGTERM
        for pid in targets:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
