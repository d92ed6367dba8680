"""Teaching one denoiser to be another: the loss, and how far they still are from each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.data.calibration import CalibrationSet
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import Objective
from tunekit.families.depth import counterparts
from tunekit.families.family import Planned
from tunekit.memory.levers import Fitted
from tunekit.tasks import Losses
from tunekit.training.average import Average

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
        gone: the teacher's modules that the student is without.
        decay: of the mean of the weights (EMA); 0 takes the student itself.
        patterns: names of parameters -> where they are not zero; elsewhere they stay zero.
    """

    def __init__(
        self,
        fitted: Fitted,
        family: Planned,
        teacher: nn.Module,
        objective: Objective,
        feature_weight: float,
        *,
        gone: Collection[str] = (),
        decay: float = 0.0,
        patterns: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.fitted = fitted
        self.family = family
        self.teacher = teacher.eval().requires_grad_(False)
        self.objective = objective
        self.feature_weight = feature_weight
        self.patterns = dict(patterns or {})
        self.average = Average(fitted, decay)
        theirs = dict(family.blocks(teacher))
        pairs = counterparts(theirs, gone) if gone else {path: path for path in theirs}
        own = dict(family.blocks(fitted.module))
        self._student = _Blocks(family, [own[path] for path in pairs])
        self._teacher = _Blocks(family, [theirs[path] for path in pairs.values()])

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses [B] of one batch, and their parts; `model` is the student, wrapped by the loop."""
        noised = self.objective.sample(batch.latents, batch.noise, batch.timesteps)
        told = self.family.conditioning(batch.conditioning, batch.frame)
        with torch.no_grad(), self._teacher.watched() as wanted:
            target = self.family.denoise(self.teacher, noised.noisy, noised.timesteps, told)
        with self._student.watched() as made:
            output = self.family.denoise(model, noised.noisy, noised.timesteps, told)
        own = _relative(output, target)
        errors = [
            _relative(state, other)
            for state, other in zip(made, wanted, strict=True)
            # A lowest level that has become one gives its state on in another size.
            if state is not None and other is not None and state.shape == other.shape
        ]
        if not self.feature_weight or not errors:
            return {"loss": own}
        features = torch.stack(errors).mean(0)
        return {"loss": own + self.feature_weight * features, "output": own, "features": features}

    def updated(self, step: int) -> None:
        """What is to stay zero does, and the mean follows."""
        with torch.no_grad():
            for name, pattern in self.patterns.items():
                self.fitted.parameters[name].mul_(pattern)
        self.average.follow()

    def state(self) -> dict[str, Tensor]:
        """The mean."""
        return self.average.values

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back the mean."""
        self.average.restore(state)


class _Blocks:
    """Collects the picture's hidden state that each of some blocks gives on, in the order that they run."""

    def __init__(self, family: Planned, modules: Sequence[nn.Module]) -> None:
        self.family = family
        self.modules = modules

    @contextmanager
    def watched(self) -> Iterator[list[Tensor | None]]:
        outputs: list[Tensor | None] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(self.family.picture_state(output))

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


class HeldOut:
    """What a network answers on held-out noise and all timesteps, to compare others with.

    Args:
        family: calls all of them.
        reference: is asked once.
        examples: pictures.
        count: of examples.
    """

    @torch.no_grad()
    def __init__(
        self, family: Planned, reference: nn.Module, examples: CalibrationSet, count: int = HELD_OUT
    ) -> None:
        self.family = family
        self.objective = examples.objective
        self.rows = []
        for batch in examples.batches(count, 4, purpose="held out"):
            self.rows.append((batch, self._answer(reference, batch).cpu()))

    @torch.no_grad()
    def error(self, denoiser: nn.Module) -> float:
        """||denoiser - reference|| / ||reference|| of the output."""
        error = size = 0.0
        for batch, answer in self.rows:
            made = self._answer(denoiser, batch)
            wanted = answer.to(made.device)
            error += float((made - wanted).square().sum())
            size += float(wanted.square().sum())
        return float((error / max(size, 1e-30)) ** 0.5)

    def _answer(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        moved = batch.to(next(denoiser.parameters()).device)
        noised = self.objective.sample(moved.latents, moved.noise, moved.timesteps)
        told = self.family.conditioning(moved.conditioning, moved.frame)
        return self.family.denoise(denoiser, noised.noisy, noised.timesteps, told).double()


def output_error(
    family: Planned, denoiser: nn.Module, reference: nn.Module, examples: CalibrationSet
) -> float:
    """||denoiser - reference|| / ||reference|| of the output, over held-out noise and all timesteps."""
    return HeldOut(family, reference, examples).error(denoiser)
