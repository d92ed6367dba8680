"""What the user sees: our own messages, in the letters that the stream has, and nothing of others."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable

from tunekit.errors import Interrupted, TunekitError

DEBUG = "TUNEKIT_DEBUG"
"""Environment variable; set to anything, tracebacks are shown."""


def no_telemetry() -> None:
    """Keeps ONNX Runtime and OpenVINO from noting a device id in the home folder, and from sending it.

    Before they are imported: ONNX Runtime reads the variable then, and OpenVINO looks for the package that
    tells, in place of which it has a stub of its own.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keeps advice, progress bars and warnings of other libraries out of our output."""
    no_telemetry()
    for name, value in {
        "BITSANDBYTES_NOWELCOME": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"tunekit|__main__")
    for name in ("bitsandbytes", "torch.distributed", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def steady_streams() -> None:
    """Lets stdout and stderr write what they have no letters for as an escape, instead of raising.

    A pipe on Windows takes cp1252, a terminal without a locale ASCII, and a path may hold bytes that are no
    text at all; none of them shall end hours of training with a line of log.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_error(error: TunekitError) -> None:
    """One message on stderr, no traceback."""
    label = "" if isinstance(error, Interrupted) else "error: "
    print(f"{label}{error}", file=sys.stderr, flush=True)


def report_warnings(warnings: Iterable[str]) -> None:
    """One line on stderr for each."""
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr, flush=True)
