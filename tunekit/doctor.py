"""What is installed, which devices and providers answer, and the line that installs what is missing."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tunekit
from tunekit import install
from tunekit.errors import DeviceError
from tunekit.resources import builtin_names

USES = {
    "onnx": "export to ONNX and run it on the CPU",
    "gpu": "run ONNX on NVIDIA cards",
    "tensorrt": "build TensorRT-RTX engines",
    "openvino": "export to OpenVINO and run it",
    "nncf": "quantize OpenVINO models",
    "quant": "8-bit optimizers, NF4",
    "gguf": "read GGUF files",
    "trackers": "TensorBoard",
}
"""What each extra is for; `optimum` and `dev` are for tests."""


def _name(requirement: str) -> str:
    """The name out of a requirement: `torch>=2.6; extra == 'x'` -> `torch`."""
    for end, character in enumerate(requirement):
        if not (character.isalnum() or character in "-_."):
            return requirement[:end]
    return requirement


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """Versions of what tunekit needs, and of what each extra brings."""
    core: dict[str, str | None] = {}
    extras: dict[str, dict[str, str | None]] = {name: {} for name in USES}
    own = install.distribution()
    for requirement in install.requirements():
        package = _name(requirement)
        _, _, condition = requirement.partition("extra ==")
        if not condition:
            core[package] = _version(package)
        elif own is None or package != own.metadata["Name"]:
            extra = condition.strip().strip("'\"")
            if extra in extras:
                extras[extra][package] = _version(package)
    return core, extras


def _answer(ask: Callable[[], Any]) -> tuple[Any, str | None]:
    """The answer, or the reason why there is none: a broken installation is what the doctor is for."""
    try:
        return ask(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _devices() -> list[dict[str, Any]]:
    from tunekit import hardware

    found = []
    for kind in ("cuda", "xpu", "mps", "cpu"):
        for index in range(64):
            try:
                device = hardware.probe(f"{kind}:{index}" if index else kind)
            except DeviceError:
                break
            found.append(
                {
                    "device": device.torch_device,
                    "title": device.title,
                    "total_bytes": device.total_bytes,
                    "free_bytes": device.free_bytes,
                    "bf16": device.supports_bf16,
                }
            )
    return found


def _torch() -> tuple[str, str | None]:
    """Version of torch, and what it is built for."""
    import torch

    made = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    return torch.__version__, next((f"{name} {number}" for name, number in made.items() if number), None)


def _providers() -> dict[str, list[str] | str]:
    """Who can run or build exported models, by package; a text is the reason why one does not answer."""
    asks: dict[str, Callable[[], list[str]]] = {
        "onnxruntime": lambda: list(importlib.import_module("onnxruntime").get_available_providers()),
        "openvino": lambda: list(importlib.import_module("openvino").Core().available_devices),
        "tensorrt_rtx": lambda: [f"builder {importlib.import_module('tensorrt_rtx').__version__}"],
    }
    answers: dict[str, list[str] | str] = {}
    for package, ask in asks.items():
        answer, reason = _answer(ask)
        if reason is None:
            answers[package] = answer
        elif not reason.startswith("ModuleNotFoundError"):
            answers[package] = reason
    return answers


def examine() -> dict[str, Any]:
    """Looks at this machine.

    Returns:
        `{"version", "python", "packages", "extras", "devices", "providers", "bundled", "disk_free_bytes",
        "missing"}`, JSON-able; `missing` is a list of `{"what", "install", "needed"}`, and has a torch that
        leaves a GPU idle too.
    """
    core, extras = _packages()
    devices, trouble = _answer(_devices)
    cards = install.cards()
    missing = [
        {"what": package, "install": install.again(), "needed": True}
        for package, installed in core.items()
        if installed is None
    ]
    if trouble:
        missing.append(
            {
                "what": f"torch does not work: {trouble}",
                "install": install.torch_for(cards)[1],
                "needed": True,
            }
        )
    elif cards and all(device["device"] == "cpu" for device in devices or []):
        what, line = install.torch_trouble(cards, *_torch())
        missing.append({"what": what, "install": line, "needed": False})
    onnx_elsewhere = _version("onnxruntime-gpu") is not None
    for extra, packages in extras.items():
        absent = [package for package, installed in packages.items() if installed is None]
        if onnx_elsewhere and "onnxruntime" in absent:  # the GPU build is the same module
            absent.remove("onnxruntime")
        if extra == "gpu" and not any(device["device"].startswith("cuda") for device in devices or []):
            continue
        if absent:
            what = f"{', '.join(absent)} ({USES[extra]})"
            missing.append({"what": what, "install": install.with_extra(extra), "needed": False})
    return {
        "version": tunekit.__version__,
        "python": f"{sys.version.split()[0]} on {platform.platform(terse=True)}",
        "packages": core,
        "extras": extras,
        "devices": devices or [],
        "providers": _providers(),
        "bundled": builtin_names(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "missing": missing,
    }
