"""How long one call of a denoiser takes beside another, and the change that makes it short enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from tunekit.families.family import Family, Pipeline
from tunekit.passes.prunable import call_on

ROUNDS = 5
"""Calls of either network at least; `SECONDS` allow for more."""
SECONDS = 0.5
TRIES = 7
"""Changes that are measured until the one that is enough is known closely."""


@dataclass
class Pace:
    """Times calls in turns with those of a network that stays as it is.

    Attributes:
        family: calls both.
        pipeline: with the network that the others are compared with.
        seen: what each measured change gave: (how far, share of the time).
    """

    family: Family
    pipeline: Pipeline
    seen: list[tuple[float, float]] = field(default_factory=list)

    def share(self, denoiser: nn.Module) -> float:
        """The median over rounds of its time over that of the network it is compared with.

        Two rows of a picture's size each, as guidance asks; both where the network to compare with lies.
        """
        whole = self.family.denoiser(self.pipeline)
        asked = call_on(self.family, self.pipeline, rows=2)
        ratios: list[float] = []
        began = time.perf_counter()
        for module in (whole, denoiser):
            _timed(asked, module)
        while len(ratios) < ROUNDS or time.perf_counter() - began < SECONDS:
            first, last = (whole, denoiser) if len(ratios) % 2 else (denoiser, whole)
            times = {id(module): _timed(asked, module) for module in (first, last)}
            ratios.append(times[id(denoiser)] / times[id(whole)])
        return median(ratios)

    def least(self, make: Callable[[float], nn.Module], wanted: float) -> float | None:
        """The smallest change in (0, 1) whose share of the time is at most `wanted`, by bisection.

        Args:
            make: a network that is changed so far.

        Returns:
            None if no change is enough.
        """
        low, high = 0.0, 1.0
        found = None
        for number in range(TRIES):
            far = 0.95 if number == 0 else (low + high) / 2  # first: whether there is one at all
            share = self.share(make(far))
            self.seen.append((far, share))
            if share <= wanted:
                found = high = far
            elif number == 0:
                return None
            else:
                low = far
        return found

    def fewest(self, make: Callable[[int], nn.Module], count: int, wanted: float) -> int | None:
        """The smallest number from 1 to `count` whose share of the time is at most `wanted`, by bisection."""
        low, high, found = 1, count, None
        while low <= high:
            middle = (low + high) // 2
            share = self.share(make(middle))
            self.seen.append((middle, share))
            if share <= wanted:
                found, high = middle, middle - 1
            else:
                low = middle + 1
        return found


def _timed(asked: Callable[[nn.Module], Any], module: nn.Module) -> float:
    device = next(module.parameters()).device
    _wait(device)
    began = time.perf_counter()
    asked(module)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
