"""Imports peft without the compiler of torch.

peft imports bitsandbytes where it is installed, which hands functions to `torch.compile` as it is imported,
and that loads inductor: a fifth of the time that a command takes to start, for what most runs never call. So
they are handed over when they are first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from unittest import mock

import torch

_compile = torch.compile


def _later(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled = cache(lambda: _compile(function, **options))

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


with mock.patch.object(torch, "compile", _later):
    import peft  # noqa: F401
