"""Passes: what happens to a model after training. One file is one pass; the folder is the registry."""

from __future__ import annotations

from tunekit.quiet import no_telemetry
from tunekit.registry import PASSES

__all__ = ["PASSES"]

no_telemetry()
