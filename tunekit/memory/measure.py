"""What a run really takes, phase by phase, to stand beside what was planned.

On a GPU torch counts: `max_memory_allocated` and `max_memory_reserved`. On the CPU the record of the tensors'
allocator is read through the profiler, for the first time that a phase comes up only, because that record
costs time; the size of the process would count libraries and fragments too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tunekit.artifacts import write_json
from tunekit.errors import ArtifactError
from tunekit.records import PlanRecord, read_plain

Measured = dict[str, int | None]
"""`{"peak_allocated_bytes", "peak_reserved_bytes"}`; the latter is None on the CPU."""


def nothing() -> Iterable[Tensor]:
    """No tensors."""
    return ()


@dataclass
class Meter:
    """Measures the peak memory of phases; they may stand in one another.

    Attributes:
        device: of the run.
        there: the tensors that are in memory when a phase begins; needed on the CPU only, whose allocator's
            record begins with the phase.
        active: a meter that is not measures nothing.
        measured: phase -> peaks so far.
    """

    device: torch.device
    there: Callable[[], Iterable[Tensor]] = nothing
    active: bool = True
    measured: dict[str, Measured] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, *, again: bool = False) -> Iterator[None]:
        """Measures the block as part of a phase.

        Args:
            again: on the CPU, measure it though it was measured before; the larger figure counts.
        """
        if not self.active or self.device.type not in ("cuda", "cpu"):
            yield
        elif self.device.type == "cuda":
            self._fold()
            self._open.append(name)
            try:
                yield
            finally:
                self._fold()
                self._open.pop()
        elif self._open or (name in self.measured and not again):
            yield
        else:
            self._open.append(name)
            try:
                before = held(self.there())
                profiler = torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
                )
                with _silent():
                    profiler.start()
                try:
                    with _in_one_thread():
                        yield
                finally:
                    with _silent():
                        profiler.stop()
                self._note(name, before + _peak(profiler), None)
            finally:
                self._open.pop()

    def _fold(self) -> None:
        """Counts what was taken so far for the innermost phase that is open."""
        if self._open:
            self._note(
                self._open[-1],
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device),
            )
        torch.cuda.reset_peak_memory_stats(self.device)

    def _note(self, name: str, allocated: int, reserved: int | None) -> None:
        known = self.measured.setdefault(name, {"peak_allocated_bytes": 0, "peak_reserved_bytes": None})
        known["peak_allocated_bytes"] = max(known["peak_allocated_bytes"] or 0, allocated)
        if reserved is not None:
            known["peak_reserved_bytes"] = max(known["peak_reserved_bytes"] or 0, reserved)

    def write(self, file: Path) -> None:
        """Puts what was measured beside what was predicted in a plan.json, if that is there and whole."""
        with suppress(FileNotFoundError, ArtifactError):
            write_json(file, beside(read_plain(file, PlanRecord), self.measured))


def beside(plan: Mapping[str, Any], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """A plan's JSON with `measured` and `error` (predicted / measured - 1) in phases that were measured."""
    phases = {}
    for name, phase in plan["phases"].items():
        phases[name] = dict(phase)
        found = measured.get(name)
        if found:
            errors = {
                key.removeprefix("peak_").removesuffix("_bytes"): round(phase[key] / size - 1, 5)
                for key, size in found.items()
                if size
            }
            phases[name] |= {"measured": dict(found), "error": errors}
    return {**plan, "phases": phases}


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Lets transformers read weights in this thread: what others allocate is not in the record."""
    with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what native code writes to stderr to itself: the profiler announces its start and end there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak(profiler: Any) -> int:
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
