"""The environment in which Optimum works: made beside `.venv`, used again until its versions change."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".venv-optimum"
CONSTRAINTS = HERE / "optimum-constraints.txt"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def in_optimum() -> Run:
    """`in_optimum("script.py", ...)` runs Python of that environment; if it fails, the test fails."""
    python = _environment()

    def run(*arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [python, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, arguments))}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        return done

    return run


def _environment() -> Path:
    """Installs `tunekit[optimum]` as optimum-constraints.txt says; a few minutes the first time."""
    import torch

    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # The build of torch that is here: another might bring gigabytes for a GPU.
    version = torch.__version__
    pin = version if version.endswith("+cpu") else version.partition("+")[0]
    wanted = hashlib.sha256(f"{pin}{CONSTRAINTS.read_text()}{(ROOT / 'pyproject.toml').read_text()}".encode())
    stamp = FOLDER / ".tunekit-complete"
    if stamp.is_file() and stamp.read_text() == wanted.hexdigest():
        return python
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CONSTRAINTS]
    install += [f"torch=={pin}", "-e", f"{ROOT}[optimum]", "pytest", "hypothesis", "--prefer-binary"]
    elsewhere = ["--extra-index-url", CPU_BUILDS] if pin.endswith("+cpu") else []
    for options in ([], elsewhere):
        done = subprocess.run([*install, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            stamp.write_text(wanted.hexdigest())
            return python
    raise RuntimeError(f"tunekit[optimum] could not be installed with {sys.version}:\n{done.stderr[-3000:]}")
