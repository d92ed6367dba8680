"""The learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from tunekit.config import TrainConfig

WIDTH = 32
"""Inputs of a layer up to which it learns at the full rate; see `scales`."""


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of an optimizer step, counted from 0: a pure function, so there is nothing to restore.

    The warm-up ends at the full rate; linear and cosine then fall to zero at `max_steps`.
    """
    warmup, total = settings.warmup_steps, settings.max_steps
    if step < warmup:
        return settings.lr * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / (total - warmup)
    share = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.lr * share


def scales(module: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Share of the learning rate for parameters by name: the wider a layer, the less.

    Adam moves each weight alike, so the output of a layer moves with the number of its inputs. In proportion
    to their reciprocal, layers of all widths move theirs alike, and one rate serves networks of any size
    (Yang et al. 2022, arXiv:2203.03466). A bias goes with its layer's weight.
    """
    made = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        parameter = module.get_parameter(name)
        weight = getattr(module.get_submodule(path), "weight", None) if leaf == "bias" else None
        weight = parameter if weight is None else weight
        inputs = weight.shape[1] if weight.ndim > 1 else weight.numel()
        made[name] = min(1.0, WIDTH / max(inputs, 1))
    return made
