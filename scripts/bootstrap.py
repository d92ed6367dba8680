#!/usr/bin/env python3
"""Makes .venv, installs tunekit, runs a task in it; needs nothing but Python, on Linux, macOS and Windows.

    python scripts/bootstrap.py setup onnx,quant     .venv with these extras (onnx if none is named)
    python scripts/bootstrap.py quickstart [--again] [a.b=c ...]
    python scripts/bootstrap.py test [--slow] [pytest arguments]
    python scripts/bootstrap.py check                style and types

The files setup, quickstart, test and check beside it are these four for a Unix shell. Versions come
from constraints.txt. PYTHON=python3.12 picks another interpreter for .venv.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BIN = HOME / ".venv" / ("Scripts" if os.name == "nt" else "bin")
ENDING = ".exe" if os.name == "nt" else ""
ALL = "onnx,quant,openvino,tensorrt,trackers,metrics,sweep,cluster,dev"
OLDEST = (3, 11)
SIGNALS = ("tests/training", "tests/test_worker.py", "tests/test_launch.py")
"""Tests that send signals to their own process. Where it held the threads of OpenVINO and TensorRT from the
tests before, it died of that more than once, so they have processes of their own."""


def run(*command: object) -> int:
    """Runs a program to its end, in the checkout; it gets Ctrl-C by itself, and SIGTERM from here."""
    child = subprocess.Popen([str(word) for word in command], cwd=HOME)
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        while True:
            try:
                code = child.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:
                continue  # it was asked to stop, and is left the time for it
    finally:
        signal.signal(signal.SIGTERM, before)


def must(*command: object) -> None:
    """Runs a program that has to succeed."""
    code = run(*command)
    if code:
        sys.exit(code)


def setup(extras: str = "onnx") -> None:
    """Makes .venv once, and installs what is missing."""
    python = BIN / f"python{ENDING}"
    if not python.is_file():
        chosen = os.environ.get("PYTHON") or sys.executable
        asked = [chosen, "-c", "import sys; print(*sys.version_info[:2])"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"PYTHON={chosen} does not run ({error}); set PYTHON to a Python 3.11 or newer")
        version = tuple(int(part) for part in said.split())
        if version < OLDEST:
            found = ".".join(map(str, version))
            print(
                f"tunekit needs Python 3.11 or newer; {chosen} is {found}. Set PYTHON to another one.",
                file=sys.stderr,
            )
            sys.exit(2)
        print("== making .venv", flush=True)
        must(chosen, "-m", "venv", HOME / ".venv")
    # One stamp for each set of extras; a changed pyproject.toml or constraints.txt installs again.
    stamp = HOME / ".venv" / f".tunekit-{extras.replace(',', '-')}"
    parts = [(HOME / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"".join(parts)).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"== installing tunekit[{extras}] (a few minutes the first time)", flush=True)
        options = ["--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
        must(python, "-m", "pip", "install", *options, "-e", f".[{extras}]")
        stamp.write_text(wanted)


def quickstart(*arguments: str) -> int:
    """From 24 captioned pictures to a fine-tuned, pruned, quantized and proven model, on the CPU."""
    setup("onnx")
    if arguments[:1] == ("--again",):
        arguments = arguments[1:]
        shutil.rmtree(HOME / "runs" / "quickstart", ignore_errors=True)
    started = time.monotonic()
    code = run(BIN / f"tunekit{ENDING}", "run", "configs/quickstart.yaml", *arguments)
    if code == 0:
        seconds = round(time.monotonic() - started)
        print(f"\nDone in {seconds} s. The report:  {HOME / 'runs' / 'quickstart' / 'report.html'}")
    return code


def test(*arguments: str) -> int:
    """The tests but for the slow ones; all of them; or those that pytest is told."""
    setup(ALL)
    pytest = (BIN / f"python{ENDING}", "-m", "pytest")
    chosen: tuple[str, ...] = () if "--slow" in arguments else ("-m", "not slow")
    if rest := [argument for argument in arguments if argument != "--slow"]:
        return run(*pytest, *rest)
    # Long files first, which the tests' conftest.py knows, so that no process is left with one at the end.
    spread = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
    apart = [f"--ignore={path}" for path in SIGNALS]
    first = run(*pytest, *chosen, *spread, "--durations=25", "tests", *apart)
    return run(*pytest, *chosen, "-n", "auto", "--maxprocesses", "4", *SIGNALS) or first


def check() -> int:
    """Style and types: ruff (lint, format) and mypy."""
    setup(ALL)
    ruff = BIN / f"ruff{ENDING}"
    return run(ruff, "check", ".") or run(ruff, "format", "--check", ".") or run(BIN / f"mypy{ENDING}")


def main() -> int:
    """Runs the task that is named."""
    tasks = {"setup": setup, "quickstart": quickstart, "test": test, "check": check}
    task, *arguments = sys.argv[1:] or ["--help"]
    if task not in tasks or (arguments[:1] in (["-h"], ["--help"]) and task != "test"):
        print(__doc__)
        return 0 if {task, *arguments} & {"-h", "--help"} else 2
    return tasks[task](*arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
