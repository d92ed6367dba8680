"""Teaching a denoiser to leap: what its teacher does in many guided steps, in a few without guidance.

A step of DDIM (and, on the straight path of flow matching, of Euler) takes the latents and the noise that a
prediction names, and mixes them anew at another time. A student learns to answer at every point of a way as
it answers one solver's step further on, up to the next edge: consistency (Song et al. 2023, arXiv:2303.01469;
in latents, Luo et al. 2023, arXiv:2310.04378). With one phase all points lead to the picture; with as many
phases as the student has steps each leads to the end of its own (phased consistency: Wang et al. 2024,
arXiv:2405.18407), so that it draws without new noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters import without_adapter
from tunekit.config import SamplingConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import Objective, mixed
from tunekit.diffusion.sampling import Begin, Guided, is_flow, sample
from tunekit.families.family import Conditioning, Family, Pipeline, Planned
from tunekit.memory.levers import Fitted
from tunekit.tasks import Losses
from tunekit.training.average import Average

HUBER = 1e-3
"""Where the pseudo-Huber loss turns from a square into a line, in units of latents."""
ASKED = 0.5
"""Share of the samples that are learned at the points where the student will be asked. The answers there are
all that a picture is made of; those between are what they are learned from."""
SIGMA_DATA = 0.5
"""Of LCM's boundary condition, as LCMScheduler has it."""
PROCESS = ("prediction_type", "rescale_betas_zero_snr")
"""Keys of a sampler that say what the model was trained on; a student keeps its teacher's."""


def student_scheduler(scheduler: Any, method: str, points: int) -> dict[str, Any]:
    """The keys of the sampler that a student draws with; see `SamplingConfig.scheduler`.

    Args:
        scheduler: its teacher's, as it is configured.
        method: "pcm" goes on from where it is; the others add new noise after every step.
        points: of the way that is learned, for those with new noise.
    """
    known = scheduler.config
    if is_flow(scheduler):
        name = "FlowMatchEulerDiscreteScheduler" if method == "pcm" else "FlowMatchLCMScheduler"
        shift = {} if "shift" in known else {"shift": known.get("flow_shift") or 1.0}
        return {"class": name, **shift}
    kept = {key: known[key] for key in PROCESS if known.get(key)}
    usual = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
    if method == "pcm":
        return {"class": "DDIMScheduler", **kept, **usual, "timestep_spacing": "trailing"}
    return {"class": "LCMScheduler", **kept, **usual, "original_inference_steps": points}


@dataclass(frozen=True)
class Way:
    """Points in time from noise to a picture.

    Attributes:
        points: [N], the first is noise alone.
        following: [N], the point after each; after the last there is none without noise.
        edges: [N], the end of each one's phase.
        called: numbers of the points at which the student will be asked.
        scaling: of timesteps in LCM's boundary condition, for samplers that have it; else None.
    """

    points: Tensor
    following: Tensor
    edges: Tensor
    called: tuple[int, ...]
    scaling: float | None = None

    @classmethod
    def through(
        cls,
        edges: Sequence[float],
        hops: int,
        objective: Objective,
        asked: Sequence[float],
        scaling: float | None = None,
    ) -> Way:
        """A way over these edges, `clean` included, with `hops` solver's steps from one to the next.

        Where a discrete schedule has fewer timesteps than that between two edges, it takes them all.

        Args:
            asked: the timesteps of the sampler; of each the nearest point is called.
        """
        points: list[float] = []
        ends: list[float] = []
        for first, last in pairwise(edges):
            between = list(dict.fromkeys(objective.between(first, last, hops)))
            between = [point for point in between if point > last]
            points += between
            ends += [last] * len(between)

        def nearest(time: float) -> int:
            return min(range(len(points)), key=lambda number: abs(points[number] - time))

        now, then, end = (
            torch.tensor(row, dtype=torch.float32) for row in (points, [*points[1:], edges[-1]], ends)
        )
        return cls(now, then, end, tuple(dict.fromkeys(map(nearest, asked))), scaling)

    @classmethod
    def of_sampler(
        cls,
        scheduler: Any,
        begin: Begin,
        sampling: SamplingConfig,
        latents: Tensor,
        objective: Objective,
        *,
        points: int,
        phased: bool,
    ) -> Way:
        """The way that a sampler goes.

        Args:
            scheduler: a fresh one.
            begin: `Family.begin`.
            sampling: reads steps.
            latents: [1, C, h, w] of a picture's size.
            points: solver's steps of the whole way; with phases, at least one for each.
            phased: whether the sampler's own timesteps are edges, or the picture alone is one.
        """
        assert sampling.steps is not None
        begin(scheduler, sampling.steps, latents)
        own = [float(time) for time in scheduler.timesteps]
        edges = [*(own if phased else own[:1]), objective.clean]
        hops = -(-points // (len(edges) - 1))
        return cls.through(edges, hops, objective, own, scheduler.config.get("timestep_scaling"))

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device | str) -> Way:
        """The same on another device."""
        return replace(
            self,
            points=self.points.to(device),
            following=self.following.to(device),
            edges=self.edges.to(device),
        )

    def chance(self, objective: Objective) -> OnWay:
        """Draws numbers of points in place of timesteps."""
        return OnWay(objective, len(self), torch.tensor(self.called))


@dataclass(frozen=True)
class OnWay:
    """See `objectives.Chance`; a timestep is the number of a point.

    Of the draws, `ASKED` are points at which the student will be asked; the others are any, each as often.
    """

    objective: Objective
    count: int
    called: Tensor

    def draw(
        self, generator: torch.Generator, latents: tuple[int, ...], shape: tuple[int, ...] = ()
    ) -> Tensor:
        """Whole numbers in [0, count), float32."""
        anywhere = torch.randint(self.count, shape, generator=generator)
        there = self.called[torch.randint(len(self.called), shape, generator=generator)]
        return torch.where(torch.rand(shape, generator=generator) < ASKED, there, anywhere).float()

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """See `Objective.noise`."""
        return self.objective.noise(generator, shape)


@dataclass(frozen=True)
class Guidance:
    """How a teacher is asked.

    Attributes:
        told: the guidance scale, for networks that are told it.
        scale: of classifier-free guidance; None asks with the prompt alone.
        negative: what the text encoders gave for the negative prompt, [1, ...]; the empty prompt encoded, not
            zeros, is what networks have learned.
    """

    told: float | None
    scale: float | None
    negative: Conditioning = field(default_factory=dict)

    @classmethod
    def of(cls, family: Planned, pipeline: Pipeline, guidance: float, negative: Conditioning) -> Guidance:
        """A guidance scale as the family counts it."""
        return cls(guidance, family.cfg_scale(pipeline, guidance), negative)

    def predict(
        self, family: Planned, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: Batch
    ) -> Tensor:
        """The guided prediction [B, ...] for the rows of a batch."""
        told = self.positive(family, batch)
        if self.scale is None:
            return family.denoise(network, noisy, timesteps, told)
        negative = self.negatives(family, batch)
        both = {name: torch.cat([negative[name], value]) for name, value in told.items()}
        made = family.denoise(network, torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both)
        without, with_prompt = made.chunk(2)
        return without + self.scale * (with_prompt - without)

    def positive(self, family: Planned, batch: Batch) -> Conditioning:
        """What a network is told for the captions of a batch."""
        return family.conditioning(batch.conditioning, batch.frame, self.told)

    def negatives(self, family: Planned, batch: Batch) -> Conditioning:
        """What a network is told for the negative prompt, once for each row of a batch."""
        rows = {
            name: value.to(batch.frame.device).expand(len(batch), *value.shape[1:])
            for name, value in self.negative.items()
        }
        return family.conditioning(rows, batch.frame, self.told)

    def draw(
        self, family: Family, network: nn.Module, scheduler: Any, sampling: SamplingConfig, batch: Batch
    ) -> Tensor:
        """The latents that a network draws from the noise and the captions of a batch."""
        guided = (
            None
            if self.scale is None
            else Guided(self.negatives(family, batch), self.scale, sampling.guidance_interval)
        )
        return sample(
            lambda rows, times, told: family.denoise(network, rows, times, told),
            scheduler,
            batch.noise,
            self.positive(family, batch),
            guided,
            sampling,
            begin=family.begin,
            seeds=range(len(batch)),
        )


@dataclass(frozen=True)
class Teacher:
    """Who is learned from.

    Attributes:
        asked: how it is asked.
        own: its network; None is the student without its adapter.
        autocast: what it computes in.
    """

    asked: Guidance
    own: nn.Module | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def network(self, student: nn.Module) -> Iterator[nn.Module]:
        """Inside, what is given answers as the teacher."""
        if self.own is not None:
            yield self.own
        else:
            with without_adapter(student):
                yield student


def unguided(family: Planned, pipeline: Pipeline, guidance: float) -> float:
    """The guidance scale that a student of a teacher with this one is drawn with.

    One call of the network is enough for it: none, or what a network is told anyway.
    """
    if family.cfg_scale(pipeline, guidance) is None:
        return guidance
    return next(scale for scale in (1.0, 0.0) if family.cfg_scale(pipeline, scale) is None)


class Consistency:
    """A student that answers at each point of a way as it does at the next. A task: see `tunekit.tasks.Task`.

    The latents with noise are those of pictures; at the first point they are noise alone, as a sampler
    starts. The teacher leads from a point to the next; what the student, or the mean of what it was lately,
    answers there is the target; at an edge the point itself is.

    Args:
        fitted: the student as it is trained.
        family: calls both.
        teacher: who is learned from.
        told: how the student is asked.
        objective: says what a prediction means.
        way: batches have numbers of its points for timesteps, see `Way.chance`.
        decay: of the mean (EMA); 0 takes the student itself.
    """

    def __init__(
        self,
        fitted: Fitted,
        family: Planned,
        teacher: Teacher,
        told: Guidance,
        objective: Objective,
        way: Way,
        *,
        decay: float = 0.95,
    ) -> None:
        self.fitted = fitted
        self.family = family
        self.teacher = teacher
        self.beside = teacher.own  # a module among the attributes, so that plans see it
        self.told = told
        self.objective = objective
        self.way = way
        self.average = Average(fitted, decay)

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses [B] of one batch; `model` is the student, wrapped by the loop."""
        way = self.way.to(batch.latents.device)
        number = batch.timesteps.long()
        now, then, edge = way.points[number], way.following[number], way.edges[number]
        noisy = mixed(self.objective, batch.latents, batch.noise, now)
        noisy = torch.where(_rows(number == 0, noisy), batch.noise, noisy)
        with torch.no_grad(), resting(self.fitted.module), self.teacher.autocast():
            with self.teacher.network(self.fitted.module) as network:
                said = self.teacher.asked.predict(self.family, network, noisy, now, batch).float()
            nearer = mixed(self.objective, *self.objective.apart(said, noisy, now), then)
            with self.average.used():
                there = self._leap(self.fitted.module, nearer, then.clamp(min=0), edge, batch)
            target = torch.where(_rows(then == edge, nearer), nearer, there)
        made = self._leap(model, noisy, now, edge, batch)
        return {"loss": pseudo_huber(made, target) * batch.weight}

    def _leap(self, network: nn.Module, noisy: Tensor, now: Tensor, edge: Tensor, batch: Batch) -> Tensor:
        """What the student makes of the latents at the end of their phase."""
        said = self.told.predict(self.family, network, noisy, now, batch).float()
        made = mixed(self.objective, *self.objective.apart(said, noisy, now), edge)
        if self.way.scaling is None:
            return made
        kept, taken = boundary(now, self.way.scaling)
        return _rows(kept, noisy) * noisy + _rows(taken, noisy) * made

    def updated(self, step: int) -> None:
        """The mean follows."""
        self.average.follow()

    def state(self) -> dict[str, Tensor]:
        """The mean."""
        return self.average.values

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back the mean."""
        self.average.restore(state)


def boundary(timesteps: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out, [B] each: without noise the answer is the question (arXiv:2310.04378, 4.1)."""
    scaled = (timesteps * scaling).square()
    whole = scaled + SIGMA_DATA**2
    return SIGMA_DATA**2 / whole, (scaled / whole).sqrt()


def pseudo_huber(made: Tensor, wanted: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c, the mean of each row: [B, ...], [B, ...] -> [B], float32."""
    error = made.float() - wanted.float()
    return ((error.square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)


@contextmanager
def resting(module: nn.Module) -> Iterator[None]:
    """Inside, a network that is trained drops nothing out."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
