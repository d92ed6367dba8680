"""Adapters over peft: add, save, load, merge, and the file layouts that the world uses.

All layouts are read into the same `Delta` per module, and two are written from it, so what one file keeps
(alpha, DoRA magnitudes) the other keeps too. Every key is checked against the modules it is for, when read
and when written. Each file here imports only those before it: delta, names, layouts, files, attach.
"""

from __future__ import annotations

from tunekit.adapters import _compiled_later  # noqa: F401 - before anything else imports peft
from tunekit.adapters.attach import (
    CRITIC,
    adapter_state,
    add_adapter,
    add_critic,
    at_strength,
    fold_adapter,
    load_adapter,
    load_adapter_state,
    merge_adapter,
    remove_adapter,
    start_from,
    using_adapter,
    without_adapter,
)
from tunekit.adapters.delta import Delta, Deltas, Dora, Full, Lora
from tunekit.adapters.files import adapter_file, read_adapter, save_adapter
from tunekit.adapters.layouts import to_kohya, to_peft

__all__ = [
    "CRITIC",
    "Delta",
    "Deltas",
    "Dora",
    "Full",
    "Lora",
    "adapter_file",
    "adapter_state",
    "add_adapter",
    "add_critic",
    "at_strength",
    "fold_adapter",
    "load_adapter",
    "load_adapter_state",
    "merge_adapter",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "start_from",
    "to_kohya",
    "to_peft",
    "using_adapter",
    "without_adapter",
]
