"""The running mean of what is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tunekit.memory.levers import Fitted


class Average:
    """A running mean of what is trained (EMA); of weights that are split, each process has its part.

    Args:
        fitted: what is trained.
        decay: share of itself that it keeps at each step; 0 follows at once, and holds nothing.
        names: of the parameters; None is all.
    """

    def __init__(self, fitted: Fitted, decay: float, names: Collection[str] | None = None) -> None:
        self.fitted = fitted
        self.decay = decay
        self.values: dict[str, Tensor] = {}
        for name in (fitted.parameters if names is None else names) if decay else ():
            self.values[name] = fitted.parameters[name].detach().clone()

    @torch.no_grad()
    def follow(self) -> None:
        """After an update."""
        for name, value in self.values.items():
            value.lerp_(self.fitted.parameters[name].detach(), 1 - self.decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the module computes with the mean; no gradient may be under way."""
        if self.fitted.learns_parts:
            with self._copied():
                yield
            return
        own = dict(self.fitted.module.named_parameters())
        kept = {name: own[name].data for name in self.values}
        for name, value in self.values.items():
            own[name].data = value.to(own[name].dtype)
        try:
            yield
        finally:
            for name, data in kept.items():
                own[name].data = data

    @contextmanager
    def _copied(self) -> Iterator[None]:
        """`used`, where others hold the memory of the parameters too."""
        own = self.fitted.parameters
        kept = {name: own[name].detach().clone() for name in self.values}
        self._take(self.values)
        try:
            yield
        finally:
            self._take(kept)

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.fitted.parameters[name].copy_(value)

    def settle(self) -> None:
        """After training: the module holds the mean."""
        if self.fitted.learns_parts:
            self._take(self.values)
            return
        own = dict(self.fitted.module.named_parameters())
        for name, value in self.values.items():
            own[name].data = value.to(own[name].dtype)

    def restore(self, values: dict[str, Tensor]) -> None:
        """Takes back `values`."""
        for name, value in self.values.items():
            value.copy_(values[name])
