"""What can run an ONNX model here, known before anything is opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

from tunekit import hardware
from tunekit.errors import DeviceError, missing

Provider = Literal[
    "cpu", "cuda", "tensorrt", "directml", "migraphx", "rocm", "coreml", "openvino", "openvino_bf16"
]
"""Of ONNX Runtime, or the package OpenVINO, in float32 or with products in bfloat16."""


def everywhere() -> Sequence[Provider | None]:
    """What users of this machine can run an ONNX model with: what `tunekit generate` takes, and OpenVINO."""
    return (None, "openvino") if importlib.util.find_spec("openvino") else (None,)


def cannot_run(providers: Sequence[Provider]) -> str | None:
    """What is missing for these, for a message about a pass; None if nothing is."""
    for provider in providers:
        if provider.startswith("openvino"):
            if problem := lacks("openvino", extra="openvino"):
                return f"{problem} (provider {provider})"
            continue
        if problem := lacks("onnxruntime", extra="onnx"):
            return problem
        from tunekit.runtime.onnx import ORT_PROVIDERS, ort_providers, package_with

        if ORT_PROVIDERS[provider] not in ort_providers():
            return (
                f"asks for provider {provider}, and ONNX Runtime has no {ORT_PROVIDERS[provider]} here;"
                f" it has {', '.join(ort_providers())}: {package_with(provider)}"
            )
    return None


def lacks(*packages: str, extra: str) -> str | None:
    """What to say of the first package that is not installed; None if all are."""
    for package in packages:
        if absent := missing(package, extra=extra, why="needs"):
            return absent.message
    return None


def gpu_answers() -> bool:
    """Whether engines could run here."""
    try:
        return hardware.probe("cuda").kind == "cuda"
    except DeviceError:
        return False


def no_fp8() -> str | None:
    """What to say where no card here multiplies floats of 8 bits; None where one does."""
    import torch

    try:
        found = hardware.probe("cuda")
    except DeviceError:
        return "there is none here"
    if hardware.multiplies_fp8(torch.device(found.torch_device)):
        return None
    return f"the {found.title} does not"
