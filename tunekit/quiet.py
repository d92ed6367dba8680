"""What the user sees on stderr: our own messages, and nothing of other libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from tunekit.errors import Interrupted, TunekitError

DEBUG = "TUNEKIT_DEBUG"
"""Environment variable; set to anything, tracebacks are shown."""


def quiet_libraries() -> None:
    """Keeps advice, progress bars and warnings of other libraries out of our output."""
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


def report_error(error: TunekitError) -> None:
    """One message on stderr, no traceback."""
    label = "" if isinstance(error, Interrupted) else "error: "
    print(f"{label}{error}", file=sys.stderr, flush=True)
