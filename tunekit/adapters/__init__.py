"""Adapters over peft: add, save, load, merge, and the two file layouts that the world uses.

Both layouts are read into the same `Delta` per module and written from it, so what one file keeps (alpha,
DoRA magnitudes) the other keeps too. Every key is checked against the modules it is for, when read and when
written. Each file here imports only those before it: delta, layouts, files, attach.
"""

from __future__ import annotations

from tunekit.adapters.attach import (
    adapter_state,
    add_adapter,
    load_adapter,
    load_adapter_state,
    merge_adapter,
    start_from,
)
from tunekit.adapters.delta import Delta, Deltas, Dora, Lora
from tunekit.adapters.files import adapter_file, read_adapter, save_adapter
from tunekit.adapters.layouts import from_kohya, from_peft, to_kohya

__all__ = [
    "Delta",
    "Deltas",
    "Dora",
    "Lora",
    "adapter_file",
    "adapter_state",
    "add_adapter",
    "from_kohya",
    "from_peft",
    "load_adapter",
    "load_adapter_state",
    "merge_adapter",
    "read_adapter",
    "save_adapter",
    "start_from",
    "to_kohya",
]
