"""Teaching a denoiser to leap by the distribution of its pictures, and not by single ones.

Distribution matching (Yin et al. 2023, arXiv:2311.18828; backward simulation: Yin et al. 2024,
arXiv:2405.14867, without its discriminator): what the student draws gets noise, and goes the way that the
difference of two answers points: of the guided teacher, and of a critic that learns what the student draws.
Student and critic are two adapters on one network, which without them is the teacher (as in arXiv:2602.03139
and arXiv:2511.22677): there is one of it in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunekit.adapters import CRITIC, using_adapter
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.noise import sample_generator
from tunekit.diffusion.objectives import Objective, mixed
from tunekit.families.family import Planned
from tunekit.memory.levers import Fitted
from tunekit.tasks import Losses, denoising_loss
from tunekit.training.average import Average
from tunekit.training.consistency import Guidance, Teacher, Way, boundary, resting

LEAST, MOST = 0.02, 0.98
"""Shares of the schedule between which answers are compared: at its ends they say nothing."""
COUNT = "updates"
"""Of the state, beside the mean."""


class Matching:
    """A student whose pictures become as its teacher's are, and its critic. A task: see `tunekit.tasks.Task`.

    Of `critic_steps` + 1 updates the last is the student's. In both the student draws from noise, as it will
    be drawn with, to a point of its way that belongs to the sample, and answers there.

    Args:
        fitted: a network with two adapters, the student and `CRITIC`.
        family: calls it.
        teacher: who is learned from; the network without adapters.
        told: how student and critic are asked.
        objective: says what a prediction means.
        way: the student's own points in time, each an edge; batches have numbers of them for timesteps.
        seed: of what is drawn for each sample.
        critic_steps: updates of the critic for each of the student.
        decay: of the student's mean (EMA), which is kept in the end; 0 keeps the student itself.
    """

    def __init__(  # noqa: PLR0913 - each is a fact of its own
        self,
        fitted: Fitted,
        family: Planned,
        teacher: Teacher,
        told: Guidance,
        objective: Objective,
        way: Way,
        *,
        seed: int = 0,
        critic_steps: int = 5,
        decay: float = 0.95,
    ) -> None:
        self.fitted = fitted
        self.family = family
        self.teacher = teacher
        self.told = told
        self.objective = objective
        self.way = way
        self.seed = seed
        self.critic_steps = critic_steps
        mine = [name for name in fitted.parameters if f".{CRITIC}." not in name]
        self.average = Average(fitted, decay, mine)
        self.count = torch.zeros(1, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses [B] of one batch; `model` is the network, wrapped by the loop."""
        step = int(self.count)
        if (step + 1) % (self.critic_steps + 1):
            with torch.no_grad(), resting(self.fitted.module), self.teacher.autocast():
                drawn = self._drawn(self.fitted.module, batch, step)
            again, times = self._disturbance(batch, step, "critic")
            made = batch.with_rows(latents=drawn, noise=again, timesteps=times)
            with using_adapter(self.fitted.module, CRITIC):
                rows = denoising_loss(self.family, self.objective, model, made, guidance=self.told.told)
            return {"loss": rows, "critic": rows}
        drawn = self._drawn(model, batch, step)
        with torch.no_grad(), resting(self.fitted.module), self.teacher.autocast():
            again, times = self._disturbance(batch, step, "student")
            noisy = mixed(self.objective, drawn.detach(), again, times)
            with self.teacher.network(self.fitted.module) as network:
                said = self.teacher.asked.predict(self.family, network, noisy, times, batch).float()
            wanted = self.objective.apart(said, noisy, times)[0]
            with using_adapter(self.fitted.module, CRITIC):
                said = self.told.predict(self.family, self.fitted.module, noisy, times, batch).float()
            found = self.objective.apart(said, noisy, times)[0]
            size = (drawn - wanted).abs().flatten(1).mean(1).clamp(min=1e-6)
            target = drawn - (found - wanted) / size.view(-1, *[1] * (drawn.ndim - 1))
        rows = 0.5 * (drawn - target).square().flatten(1).mean(1) * batch.weight
        return {"loss": rows, "student": rows}

    def _drawn(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """The latents that the student answers with at each row's point, having drawn up to there itself."""
        way = self.way.to(batch.latents.device)
        number = batch.timesteps.long()
        noisy, given = batch.noise, batch.noise
        with torch.no_grad(), resting(self.fitted.module), self.teacher.autocast():
            for done in range(int(number.max())):
                now, then = (points[done].expand(len(batch)) for points in (way.points, way.following))
                clean = self._answer(self.fitted.module, noisy, now, batch)
                again = _noise(batch, self.seed, step, f"draw {done}")
                noisy = mixed(self.objective, clean, again, then)
                given = torch.where(_rows(number == done + 1, noisy), noisy, given)
        return self._answer(model, given, way.points[number], batch)

    def _answer(self, network: nn.Module, noisy: Tensor, now: Tensor, batch: Batch) -> Tensor:
        said = self.told.predict(self.family, network, noisy, now, batch).float()
        clean = self.objective.apart(said, noisy, now)[0]
        if self.way.scaling is None:
            return clean
        kept, taken = boundary(now, self.way.scaling)
        return _rows(kept, noisy) * noisy + _rows(taken, noisy) * clean

    def _disturbance(self, batch: Batch, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Noise [B, ...] and timesteps [B], which belong to the samples and the update."""
        draws = [sample_generator(self.seed, step, name, f"{purpose} time") for name in batch.ids]
        shares = [LEAST + (MOST - LEAST) * float(torch.rand((), generator=draw)) for draw in draws]
        times = torch.tensor([self.objective.level(share) for share in shares])
        return _noise(batch, self.seed, step, purpose), times.to(batch.latents.device)

    def updated(self, step: int) -> None:
        """The mean follows the student."""
        self.count += 1
        if step % (self.critic_steps + 1) == 0:
            self.average.follow()

    def state(self) -> dict[str, Tensor]:
        """The mean, and how many updates there were."""
        return {**self.average.values, COUNT: self.count}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back the mean and the count."""
        self.average.restore(state)
        self.count.copy_(state[COUNT])


def _noise(batch: Batch, seed: int, step: int, purpose: str) -> Tensor:
    shape = batch.latents.shape[1:]
    drawn: Sequence[Tensor] = [
        torch.randn(shape, generator=sample_generator(seed, step, name, purpose)) for name in batch.ids
    ]
    return torch.stack(list(drawn)).to(batch.latents)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
