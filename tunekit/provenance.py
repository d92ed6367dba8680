"""Who made something, with what and when; and what of it may be shown to others."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import tunekit
from tunekit import install

PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnxruntime", "openvino")
FOLDERS = ("path", "validation", "class_path", "cache", "runs", "init")
"""Keys of settings that name folders which nobody opens again: only their last part is recorded."""
_HOMES = re.compile(r"(?<![\w.~])(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/\s\"':,;]+")


def made() -> dict[str, str]:
    """The circumstances: date, versions, kind of machine, and the commit of a checkout; nobody's name."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **_versions(), "machine": _machine()}


@cache
def _versions() -> dict[str, str]:
    found = {"tunekit": tunekit.__version__}
    if commit := _commit():
        found["git"] = commit
    found["python"] = platform.python_version()
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _commit() -> str | None:
    """The commit of tunekit's checkout, "-dirty" if there are changes; None where it is installed."""
    root = install.checkout()
    if root is None or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip() or None
    return None


def _machine() -> str:
    parts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPUs"]
    torch = sys.modules.get("torch")  # whoever has used a card has it
    with suppress(Exception):  # a driver may answer anything; this is a line in a report
        if torch is not None and torch.cuda.is_initialized():
            parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


# For others -------------------------------------------------------------------------------------------------


def _home() -> str:
    with suppress(RuntimeError):
        home = str(Path.home())
        return home if len(home) > 1 else ""
    return ""


def at_home(text: str) -> str:
    """A text with `~` for the own home folder, which paths that are opened again may be written with."""
    home = _home()
    if not home or home not in text:
        return text
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?=$|[/\\\s\"':,;)\]])", "~", text)


def public(value: Any, key: str = "") -> Any:
    """Settings, details and the like without home folders, and without the folders of data (`FOLDERS`)."""
    if isinstance(value, dict):
        return {name: public(item, str(name).rpartition(".")[2]) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in FOLDERS and (Path(value).is_absolute() or value.startswith(("~", "..")) or value[1:3] == ":\\"):
        return f".../{Path(value.replace(chr(92), '/')).name}"
    return at_home(value)


def shown(text: str) -> str:
    """A text for a page or a card: no home folder at all, and of a path alone no more than its last part."""
    text = at_home(text)
    if (Path(text).is_absolute() or text.startswith("~/") or text[1:3] == ":\\") and "\n" not in text:
        return f".../{Path(text.replace(chr(92), '/')).name}"
    return _HOMES.sub("~", text)


def shown_yaml(text: str) -> str:
    """A config as YAML for a page."""
    names = "|".join((*FOLDERS, "source"))

    def short(match: re.Match[str]) -> str:
        value = match[2].strip("'\"")
        return match[1] + (value if value == shown(value) else shown(value))

    return _HOMES.sub("~", at_home(re.sub(rf"(?m)^(\s*(?:{names}):[ ]+)(\S.*)$", short, text)))
