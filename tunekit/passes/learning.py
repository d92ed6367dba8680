"""What passes that train share: how the loop is set, for how long, where it goes on, what students lack."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from tunekit.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tunekit.artifacts import Artifact
    from tunekit.data.cache import Stream
    from tunekit.memory.decided import Levers
    from tunekit.passes.base import Context
    from tunekit.training.checkpoint import Checkpoints

LINES = 20
"""Lines about the loss in a whole training."""
PART = 6
"""Of the time of a search, a training in it takes a share of one in so many at most."""


def part_of(minutes: float) -> float:
    """Minutes that a search leaves to each training in it."""
    return round(minutes / PART, 3)


def affordable(step: Any, accelerator: Accelerator, task: Any, stream: Stream, context: Context) -> int:
    """Optimizer steps: `max_steps`, or fewer where `minutes` has no time for them at the pace measured here.

    It is measured once, and kept: a training that was stopped goes on towards the same end.

    Args:
        step: a pass with the keys max_steps and minutes.
        task: as `train` takes it; its weights stay what they are.
    """
    from tunekit.files import write_json

    most: int = step.max_steps
    if step.minutes is None:
        return most
    file = context.state / "pace.json"
    try:
        seconds = float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        seconds = _pace(accelerator, task, stream, context.seed)
        write_json(file, {"seconds": seconds})
    count = max(1, min(most, int(60 * step.minutes / seconds)))
    if count < most:
        context.say(f"{count} of {most} steps, for which minutes: {step.minutes:g} has time")
    return count


def _pace(accelerator: Accelerator, task: Any, stream: Stream, seed: int) -> float:
    """Seconds of a step: gradients are made and thrown away, three times, of which the first warms up."""
    fitted, device = task.fitted, accelerator.device
    for number in range(3):
        if number == 1:
            started = time.perf_counter()
        for batch in stream.step(number, 0, 1):
            fitted.masks.draw(seed, number + 1, batch.ids, device)
            loss = task.loss(fitted.module, batch.to(device))["loss"].float().mean()
            accelerator.backward(loss)
            float(loss.detach())  # waits for the device
        for weight in fitted.parameters.values():
            weight.grad = None
    return max(1e-6, (time.perf_counter() - started) / 2)


def settings_of(step: Any, max_steps: int | None = None) -> TrainConfig:
    """How the loop is set: it warms up over a twentieth of the steps, and falls to zero as a cosine.

    Args:
        step: a pass with the keys max_steps, lr, batch_size, optimizer and checkpoint_every.
        max_steps: fewer than the pass says.
    """
    steps: int = max_steps or step.max_steps
    return TrainConfig(
        max_steps=steps,
        lr=step.lr,
        batch_size=step.batch_size,
        optimizer=step.optimizer,
        schedule="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.0,
        log_every=max(1, steps // LINES),
        checkpoint_every=step.checkpoint_every,
    )


def levers_of(step: Any) -> Levers:
    """How the memory of a pass with precision, micro_batch and gradient_checkpointing is arranged."""
    from tunekit.memory.decided import Levers

    return Levers(
        step.precision,
        micro_batch=step.micro_batch or step.batch_size,
        gradient_checkpointing=step.gradient_checkpointing,
    )


def checkpointed(context: Context) -> Checkpoints:
    """Where a pass keeps what it goes on from."""
    from tunekit.training.checkpoint import Checkpoints

    return Checkpoints(context.state / "checkpoints", {"pass": context.state.name})


def gone(artifact: Artifact, origin: Artifact) -> tuple[str, ...]:
    """Paths of the origin's modules that a model is without, as the steps between them have written down."""
    made = artifact.lineage[len(origin.lineage) :]
    return tuple(path for step in made for path in step.details.get("gone", ()))
