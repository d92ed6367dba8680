"""Teaching one denoiser to be another: the loss, and how far they still are from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.data.cache import Batch
from tunekit.data.examples import Examples
from tunekit.families.family import Family

HELD_OUT = 32
"""Examples that differ from those learned from in noise and timestep, for `output_error`."""


class Distillation:
    """Loss of a student against its teacher: of the output, and of what each large block gives on.

    Both kinds as in BK-SDM (Kim et al. 2023, arXiv:2305.15798). Each block's squared error is divided by the
    square of the teacher's value, so that blocks whose activations are large do not drown the others.

    Args:
        family: calls both.
        student: is trained; not wrapped.
        teacher: frozen; has the same blocks.
        examples: give the noise schedule.
        feature_weight: of the mean over blocks; the output counts 1.
    """

    def __init__(
        self,
        family: Family,
        student: nn.Module,
        teacher: nn.Module,
        examples: Examples,
        feature_weight: float,
    ) -> None:
        self.family = family
        self.teacher = teacher.eval().requires_grad_(False)
        self.objective = examples.objective
        self.feature_weight = feature_weight
        self._student = _Blocks(family, student)
        self._teacher = _Blocks(family, teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses [B] of one batch; `model` is the student, wrapped by the loop."""
        noisy, _, _ = self.objective.sample(batch.latents, batch.noise, batch.timesteps)
        with torch.no_grad(), self._teacher.watched() as wanted:
            target = self.family.denoise(self.teacher, noisy, batch.timesteps, batch.conditioning)
        with self._student.watched() as made:
            output = self.family.denoise(model, noisy, batch.timesteps, batch.conditioning)
        loss = _relative(output, target)
        if self.feature_weight and wanted:
            features = torch.stack([_relative(a, b) for a, b in zip(made, wanted, strict=True)])
            loss = loss + self.feature_weight * features.mean(0)
        return loss


class _Blocks:
    """Collects the hidden state that each large block of a denoiser gives on."""

    def __init__(self, family: Family, denoiser: nn.Module) -> None:
        self.modules = [module for _, module in family.blocks(denoiser)]

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        outputs: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            # A down block also gives what it hands across; the hidden state comes first.
            outputs.append(output[0] if isinstance(output, tuple) else output)

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
def output_error(family: Family, denoiser: nn.Module, reference: nn.Module, examples: Examples) -> float:
    """||denoiser - reference|| / ||reference|| of the output, over held-out noise and all timesteps."""
    device = next(denoiser.parameters()).device
    error = size = 0.0
    for batch in examples.batches(HELD_OUT, 4, purpose="held out"):
        moved = batch.to(device)
        noisy, _, _ = examples.objective.sample(moved.latents, moved.noise, moved.timesteps)
        outputs = [
            family.denoise(model, noisy, moved.timesteps, moved.conditioning).double()
            for model in (denoiser, reference)
        ]
        error += float((outputs[0] - outputs[1]).square().sum())
        size += float(outputs[1].square().sum())
    return float((error / max(size, 1e-30)) ** 0.5)
