"""How tunekit came onto this machine, and so the line that installs what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, entry_points
from pathlib import Path

COMMAND, ENTRY = "tunekit", "tunekit.cli:main"
"""The console script by which our distribution is known, whatever its name on an index."""
NAME = "tunekit-diffusion"
"""On an index, where "tunekit" is another project."""
HOME = Path(__file__).resolve().parents[1]
"""The checkout, where there is one."""
TORCH = "https://download.pytorch.org/whl/"
TORCH_GUIDE = "https://pytorch.org/get-started/locally/"


def distribution() -> Distribution | None:
    """What is installed here and brings the command; None where tunekit is only on the path."""
    scripts = entry_points(group="console_scripts", name=COMMAND)
    return next((script.dist for script in scripts if script.value == ENTRY and script.dist), None)


def checkout() -> Path | None:
    """The folder of the sources, if they are what runs."""
    return HOME if (HOME / "pyproject.toml").is_file() else None


def requirements() -> list[str]:
    """What our distribution needs, extras included, as its metadata has it."""
    known = distribution()
    return list(known.requires or []) if known else []


def pip(verb: str = "install") -> str:
    """The command that changes the environment that runs: `pip install` where that is the one it finds."""
    python = sys.executable
    if " " in python:
        python = f'& "{python}"' if sys.platform == "win32" else f'"{python}"'
    if importlib.util.find_spec("pip") is None:  # made by uv
        return f"uv pip {verb} --python {python.removeprefix('& ')}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return f"pip {verb}"
    return f"{python} -m pip {verb}"


def with_extra(name: str) -> str:
    """The line that adds an extra to the tunekit that runs."""
    return f"{pip()} {_ourselves(f'[{name}]')}"


def again() -> str:
    """The line that brings packages which tunekit cannot do without."""
    return f"{pip()} {_ourselves()}"


def newer() -> str:
    """The line that brings a newer tunekit."""
    folder = checkout()
    if folder is not None:
        return f'git -C "{folder}" pull'
    return f"{pip()} --upgrade {_ourselves()}"


def _ourselves(extras: str = "") -> str:
    """What pip is to be told for the tunekit that runs, with `[extras]`."""
    folder = checkout()
    if folder is not None:
        return f'-e "{folder}{extras}"'
    known = distribution()
    title = known.metadata["Name"] if known else NAME
    origin = _origin(known)
    return f'"{title}{extras} @ {origin}"' if origin else f'"{title}{extras}"'


def _origin(known: Distribution | None) -> str | None:
    """Where a distribution came from that is from no index (PEP 610): a folder, an archive, a repository."""
    try:
        said = json.loads((known.read_text("direct_url.json") if known else None) or "{}")
        url = said.get("url")
        if url and (vcs := said.get("vcs_info")):
            wanted = vcs.get("requested_revision")
            return f"{vcs['vcs']}+{url}" + (f"@{wanted}" if wanted else "")
        return str(url) if url else None
    except (OSError, ValueError, AttributeError, KeyError):
        return None


# torch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU as its driver names it, whether torch can use it or not.

    Attributes:
        maker: "nvidia" or "amd".
        title: for people.
        driver: major version of NVIDIA's driver.
        capability: NVIDIA's compute capability, (8, 6).
    """

    maker: str
    title: str
    driver: int | None = None
    capability: tuple[int, int] | None = None


def cards() -> list[Card]:
    """The GPUs that a driver shows, found without torch."""
    return _nvidia() or _amd()


def _nvidia() -> list[Card]:
    program = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if program is None:
        known = Path("/proc/driver/nvidia/gpus")
        return [Card("nvidia", "an NVIDIA card")] if known.is_dir() and any(known.iterdir()) else []
    command = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver behind it
        return []
    return read_nvidia(done.stdout)


def read_nvidia(text: str) -> list[Card]:
    """The cards of lines such as "NVIDIA GeForce RTX 3060, 550.54.15, 8.6"."""
    found = []
    for line in text.splitlines():
        name, _, rest = line.partition(",")
        driver, _, capability = (part.strip() for part in rest.partition(","))
        major, _, minor = capability.partition(".")
        if not rest:
            continue
        found.append(
            Card(
                "nvidia",
                name.strip(),
                int(driver.partition(".")[0]) if driver.partition(".")[0].isdigit() else None,
                (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None,
            )
        )
    return found


def _amd() -> list[Card]:
    """By the compute driver of the kernel: a processor without graphics has no gfx version there."""
    found = []
    for node in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*")):
        try:
            facts = dict(line.split() for line in (node / "properties").read_text().splitlines())
            if int(facts.get("gfx_target_version", "0")):
                found.append(Card("amd", (node / "name").read_text().strip() or "an AMD card"))
        except (OSError, ValueError):
            continue
    return found


def torch_for(found: list[Card], installed: str | None = None, system: str = sys.platform) -> tuple[str, str]:
    """Which torch uses the cards of a machine: its name for people, and the line that installs it.

    torch 2.13 comes for CUDA 12.6 (compute capability 5.0 to 9.0, driver 525 or newer), 13.0 and 13.2 (from
    7.5 on, driver 580 or newer): RELEASE.md of pytorch/pytorch, and
    https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.

    Args:
        found: see `cards`.
        installed: version of the torch that is there, which is kept.
        system: `sys.platform`.
    """

    def line(build: str) -> str:
        numbers = (installed or "").partition("+")[0].split(".")
        if installed is None:
            return f"{pip()} torch --index-url {TORCH}{build}"
        if [int(part) for part in numbers[:2] if part.isdigit()] < [2, 9]:  # older ones had other builds
            return f"{pip()} --upgrade torch --index-url {TORCH}{build}"
        return f'{pip()} "torch=={".".join(numbers)}+{build}" --index-url {TORCH}{build}'

    if system == "darwin" or not found:
        return "the usual build", f"{pip()} torch"
    first = found[0]
    if first.maker == "amd":
        return (
            ("AMD's own build", TORCH_GUIDE) if system == "win32" else ("the build for ROCm", line("rocm7.2"))
        )
    capability = first.capability or (7, 5)
    behind = first.driver is not None and first.driver < 580
    if capability < (7, 5) or (behind and capability < (10, 0)):
        return "the build for CUDA 12.6", line("cu126")
    return "the build for CUDA 13.0" + (" with driver 580 or newer" if behind else ""), line("cu130")


def torch_trouble(found: list[Card], installed: str, built_for: str | None) -> tuple[str, str]:
    """Why torch has no GPU to offer although a driver shows cards, and the line that helps.

    Args:
        found: see `cards`; not empty.
        installed: version of torch.
        built_for: "CUDA 13.0", "ROCm 7.2"; None for the processor alone.
    """
    fits, line = torch_for(found, installed)
    title = found[0].title
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if built_for and found[0].maker == "nvidia" and hidden in ("", "-1"):
        return f'CUDA_VISIBLE_DEVICES="{hidden}" hides {title}', "unset CUDA_VISIBLE_DEVICES"
    made = f"is built for {built_for} and does not reach" if built_for else "is built without GPUs, beside"
    return f"torch {installed} {made} {title}; what runs there is {fits}", line
