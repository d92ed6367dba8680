"""What a training step computes: the same object is trained by the loop and traced by the memory planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import Objective
from tunekit.families.family import Planned

if TYPE_CHECKING:
    from tunekit.memory.levers import Fitted

Losses = dict[str, Tensor]
"""`loss`: what is minimized, a value per row, float32; other names are parts of it, for the metrics."""


class Task(Protocol):
    """A network that is trained, and what for."""

    fitted: Fitted
    """The network as it is trained, and the parameters that the optimizer updates."""

    def loss(self, model: nn.Module, batch: Any) -> Losses:
        """Values per row of one batch.

        Args:
            model: the network, as the loop has wrapped it.
            batch: what the task's batches are; nothing of the loop looks into it.
        """
        ...

    def updated(self, step: int) -> None:
        """Called after optimizer step `step` (counted from 1), for whatever follows the weights (EMA)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the task itself has to remember between the lives of a run."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        ...


@dataclass
class Denoising:
    """Learning to predict what the objective wants of noisy latents: LoRA, DreamBooth and all weights.

    Attributes:
        fitted: the denoiser as it is trained.
        family: calls it.
        objective: adds noise, and judges.
    """

    fitted: Fitted
    family: Planned
    objective: Objective

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """The objective's loss of each row, times the row's weight."""
        return {"loss": denoising_loss(self.family, self.objective, model, batch)}

    def updated(self, step: int) -> None:
        """Nothing follows the weights."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the weights."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing beside the weights."""


def denoising_loss(
    family: Planned, objective: Objective, model: nn.Module, batch: Batch, *, guidance: float | None = None
) -> Tensor:
    """[B] float32: noise on the latents, the prediction, and its weighted error.

    Args:
        guidance: that a network is told which is told a number; None is the family's own for training.
    """
    noised = objective.sample(batch.latents, batch.noise, batch.timesteps)
    told = family.conditioning(batch.conditioning, batch.frame, guidance)
    prediction = family.denoise(model, noised.noisy, noised.timesteps, told)
    return objective.loss(prediction, noised.target, noised.weight * batch.weight)
