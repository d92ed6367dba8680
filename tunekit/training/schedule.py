"""The learning rate of a step."""

from __future__ import annotations

import math

from tunekit.config import TrainConfig


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
