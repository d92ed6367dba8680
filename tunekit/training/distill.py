"""Teaching one denoiser to be another: the loss, and how far they still are from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.data.calibration import CalibrationSet
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import Objective
from tunekit.families.family import Planned
from tunekit.memory.levers import Fitted
from tunekit.tasks import Losses

HELD_OUT = 32
"""Examples that differ from those learned from in noise and timestep, for `output_error`."""


class Distillation:
    """A student that learns to be its teacher: the output, and what each large block gives on.

    Both kinds as in BK-SDM (Kim et al. 2023, arXiv:2305.15798). Each block's squared error is divided by the
    square of the teacher's value, so that blocks whose activations are large do not drown the others. A task:
    see `tunekit.tasks.Task`.

    Args:
        fitted: the student as it is trained.
        family: calls both.
        teacher: frozen; has the student's blocks.
        objective: adds noise.
        feature_weight: of the mean over blocks; the output counts 1.
    """

    def __init__(
        self,
        fitted: Fitted,
        family: Planned,
        teacher: nn.Module,
        objective: Objective,
        feature_weight: float,
    ) -> None:
        self.fitted = fitted
        self.family = family
        self.teacher = teacher.eval().requires_grad_(False)
        self.objective = objective
        self.feature_weight = feature_weight
        self._student = _Blocks(family, fitted.module)
        self._teacher = _Blocks(family, teacher)

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses [B] of one batch, and their parts; `model` is the student, wrapped by the loop."""
        noised = self.objective.sample(batch.latents, batch.noise, batch.timesteps)
        told = self.family.conditioning(batch.conditioning, batch.frame)
        with torch.no_grad(), self._teacher.watched() as wanted:
            target = self.family.denoise(self.teacher, noised.noisy, noised.timesteps, told)
        with self._student.watched() as made:
            output = self.family.denoise(model, noised.noisy, noised.timesteps, told)
        own = _relative(output, target)
        if not self.feature_weight or not wanted:
            return {"loss": own}
        features = torch.stack([_relative(a, b) for a, b in zip(made, wanted, strict=True)]).mean(0)
        return {"loss": own + self.feature_weight * features, "output": own, "features": features}

    def updated(self, step: int) -> None:
        """Nothing follows the weights."""

    def state(self) -> dict[str, Tensor]:
        """Nothing beside the weights."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing beside the weights."""


class _Blocks:
    """Collects the picture's hidden state that each large block of a denoiser gives on."""

    def __init__(self, family: Planned, denoiser: nn.Module) -> None:
        self.family = family
        self.modules = [module for _, module in family.blocks(denoiser)]

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        outputs: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            state = self.family.picture_state(output)
            if state is not None:
                outputs.append(state)

        hooks = [module.register_forward_hook(note) for module in self.modules]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


def _relative(value: Tensor, target: Tensor) -> Tensor:
    """Squared error over squared size, [B]."""
    error = (value.float() - target.float()).square().flatten(1).mean(1)
    return error / target.float().square().flatten(1).mean(1).clamp(min=1e-12)


@torch.no_grad()
def output_error(
    family: Planned, denoiser: nn.Module, reference: nn.Module, examples: CalibrationSet
) -> float:
    """||denoiser - reference|| / ||reference|| of the output, over held-out noise and all timesteps."""
    device = next(denoiser.parameters()).device
    error = size = 0.0
    for batch in examples.batches(HELD_OUT, 4, purpose="held out"):
        moved = batch.to(device)
        noised = examples.objective.sample(moved.latents, moved.noise, moved.timesteps)
        told = family.conditioning(moved.conditioning, moved.frame)
        outputs = [
            family.denoise(model, noised.noisy, noised.timesteps, told).double()
            for model in (denoiser, reference)
        ]
        error += float((outputs[0] - outputs[1]).square().sum())
        size += float(outputs[1].square().sum())
    return float((error / max(size, 1e-30)) ** 0.5)
