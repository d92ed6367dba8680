"""What passes that train share: how the loop is set, where it goes on, what their students are without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunekit.config import TrainConfig

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.memory.decided import Levers
    from tunekit.passes.base import Context
    from tunekit.training.checkpoint import Checkpoints

LINES = 20
"""Lines about the loss in a whole training."""


def settings_of(step: Any) -> TrainConfig:
    """How the loop is set: it warms up over a twentieth of the steps, and falls to zero as a cosine.

    Args:
        step: a pass with the keys max_steps, lr, batch_size, optimizer and checkpoint_every.
    """
    return TrainConfig(
        max_steps=step.max_steps,
        lr=step.lr,
        batch_size=step.batch_size,
        optimizer=step.optimizer,
        schedule="cosine",
        warmup_steps=step.max_steps // 20,
        weight_decay=0.0,
        log_every=max(1, step.max_steps // LINES),
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
