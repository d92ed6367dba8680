"""Trains a model to draw in a few steps, without guidance, what it draws in many with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunekit.config import AdapterConfig, BatchSize, Count, SamplingConfig, Steps
from tunekit.passes.base import (
    NO_EXAMPLES,
    SAMPLING,
    Context,
    Ladder,
    Outcome,
    Pass,
    Start,
    learned_from,
    untrainable,
)
from tunekit.passes.learning import part_of
from tunekit.passes.metrics import PARAMETERS, RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunekit.artifacts import Artifact
    from tunekit.diffusion.objectives import Objective
    from tunekit.families.family import Family, Pipeline, Planned
    from tunekit.memory.decided import Levers
    from tunekit.memory.levers import Fitted
    from tunekit.training.consistency import Consistency, Teacher, Way
    from tunekit.training.matching import Matching

HELD_OUT = 8
"""Pictures that teacher and student draw from the same noise, for `relative_error`."""


class Distill(Pass):
    """Teaches the model to draw in 1 to 8 steps without guidance what it draws in many with it.

    The teacher is the model itself: with an adapter, the same weights without it, so that there is one of it
    in memory. It learns from the run's own pictures and captions, or where it has none from pictures that the
    model draws from the run's prompts. How the student is drawn with is said in its artifact. A distillation
    that was killed goes on from its last checkpoint.
    """

    kind: ClassVar[str] = "distill"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    learns: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, and packed weights cannot be trained; put it before",
        "few_steps": "comes after {giver}: the model draws in few steps already, and is no teacher any more",
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        PARAMETERS,
        SIZE,
        RELATIVE_ERROR,
        Metric("loss", "loss", lower_is_better=True),
        Metric("steps", "steps", "count"),
    )

    method: Literal["pcm", "lcm", "dmd"] = "pcm"
    """pcm (phased consistency) draws the teacher's own picture of the same noise, with DDIM or Euler; lcm
    (latent consistency) adds new noise after each step, and may be drawn with more or fewer steps; dmd
    (distribution matching) draws pictures like the teacher's and not the same ones."""
    steps: Annotated[int, Field(ge=1, le=8)] = 4
    """Sampling steps of the student; each is one call of the network."""
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    """The teacher's guidance scale, which the student takes in; null is what the model is drawn with."""
    solver_steps: Annotated[int, Field(ge=1, le=1000)] = 32
    """The teacher's sampling steps; more are more faithful to it, fewer are learned sooner. None for dmd."""
    adapter: AdapterConfig | None = AdapterConfig(rank=64, alpha=64)
    """What is trained; null trains all weights. The adapter is folded in, and kept beside as adapter/."""
    max_steps: Steps = 1000
    """Optimizer steps."""
    minutes: float | None = Field(None, gt=0, le=100_000)
    """Fewer steps, where these minutes have no time for all at the pace that the first ones have here."""
    lr: float = Field(1e-4, gt=0, le=100)
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero as a cosine."""
    batch_size: BatchSize = 8
    """Samples per optimizer step."""
    micro_batch: BatchSize | None = None
    """Samples per forward; null means the whole batch at once."""
    ema: float = Field(0.95, ge=0, lt=1)
    """Share of itself that the mean of the weights keeps at each step; it gives the target, and is what is
    kept in the end. 0 takes the student itself."""
    critic_steps: Annotated[int, Field(ge=1, le=1000)] = 5
    """Of dmd: updates of the critic, which learns what the student draws, for each of the student."""
    optimizer: str = "adamw"
    """Row of tunekit/optimizers.py."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; the trained weights are fp32."""
    gradient_checkpointing: bool = False
    """Keep less of each forward pass and compute it again: slower, in less memory."""
    pictures: Count = 64
    """Pictures the model draws where the run has none of its own."""
    checkpoint_every: Steps = 100
    """Optimizer steps between checkpoints."""

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """Ever fewer steps."""
        return [[[{cls.kind: {"steps": steps, "minutes": part_of(minutes)}}] for steps in (8, 4, 2)]]

    def gives(self) -> frozenset[str]:
        """That it draws in few steps; nothing that heal could mend by the model before."""
        return frozenset({"few_steps"})

    def reads(self, context: Context) -> frozenset[str]:
        """How its teacher draws, and what is learned from."""
        return SAMPLING | learned_from(context)

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other."""
        if self.solver_steps < self.steps:
            return f"has fewer solver_steps ({self.solver_steps}) than steps ({self.steps})"
        if self.method == "dmd" and self.adapter is None:
            return "needs an adapter for dmd: student and critic are two on one network"
        if self.adapter is not None and self.adapter.init is not None:
            return "starts from an adapter that does nothing: leave adapter.init out, or merge it before"
        if self.adapter is not None and self.adapter.dropout:
            return "has a fixed answer for each picture, which adapter.dropout only blurs; leave it out"
        return untrainable(self.optimizer, self.batch_size, self.micro_batch)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain that has nothing to learn from."""
        return None if start.examples else NO_EXAMPLES

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Trains, compares a few pictures with the teacher's, saves.

        Raises:
            ConfigError: the run knows neither pictures nor prompts; the base was distilled already.
            NonFiniteError: the loss is not finite.
            Interrupted: it was told to stop; started again, it goes on.
        """
        import copy

        import torch

        from tunekit import families
        from tunekit.adapters import fold_adapter, save_adapter
        from tunekit.data.cache import Draws, Stream
        from tunekit.diffusion.sampling import sampler
        from tunekit.errors import ConfigError
        from tunekit.families.family import as_kept
        from tunekit.memory.levers import fit
        from tunekit.passes.learning import affordable, checkpointed, settings_of
        from tunekit.passes.prunable import parameters
        from tunekit.training.consistency import Guidance, Teacher
        from tunekit.training.loop import Hooks, train
        from tunekit.training.run import build_optimizer

        family = families.get(context.family)
        whole = context.open(artifact)
        if family.is_distilled(whole):
            raise ConfigError(
                f"{artifact.source}: this base was distilled to few steps already",
                hint="distill the base that it was made from, or draw with this one as it is",
            )
        sampling = context.sampling_of(artifact)
        height, width = family.default_size(whole)
        sampling = sampling.over(SamplingConfig(height=height, width=width))
        if self.guidance is not None:
            sampling = sampling.model_copy(update={"guidance": self.guidance})
        assert sampling.guidance is not None  # nothing of it is left open now
        assert sampling.height
        assert sampling.width
        learned = self.learned(family, whole, sampling)
        scheduler = sampler(whole.scheduler, learned)
        objective = family.objective(around(whole, {"scheduler": scheduler}))
        with context.examples(
            artifact, count=self.pictures, precision=self.precision, adapter=self.adapter
        ) as drawn:
            examples, accelerator = drawn
            negative = as_kept(family.encode_prompt(whole, [sampling.negative_prompt or ""]))
            asked = Guidance.of(family, whole, sampling.guidance, negative)
            fitted = fit(
                copy.deepcopy(family.denoiser(whole)),
                self.adapter,
                family.facts,
                self.levers,
                device=accelerator.device,
                seed=context.seed,
                initial=self.prepared,
            )
            own = None if self.adapter else family.denoiser(whole).to(accelerator.device)
            teacher = Teacher(asked, own, accelerator.autocast)
            latents = torch.zeros(1, *family.latent_shape(whole, sampling.height, sampling.width))
            way = self.way(family, scheduler, learned, latents, objective)
            task = self.task(fitted, family, teacher, learned, objective, way, context.seed)
            context.say(f"learning from {examples.origin}: {len(way)} points, guidance {sampling.guidance:g}")
            stream = Stream(
                examples.dataset,
                way.chance(objective),
                Draws(self.batch_size, self.micro_batch),
                seed=context.seed,
            )
            settings = settings_of(self, affordable(self, accelerator, task, stream, context))
            result = train(
                accelerator,
                task,
                build_optimizer(settings, fitted, accelerator.device),
                stream,
                settings,
                Hooks(
                    seed=context.seed,
                    checkpoints=checkpointed(context),
                    say=context.say,
                    title="distill",
                ),
            )
            fitted.finish()
            task.average.settle()
            student = fitted.module.eval()
            errors = torch.zeros(3, dtype=torch.float64)
            for batch in examples.batches(HELD_OUT, HELD_OUT, purpose="held out"):
                moved = batch.to(accelerator.device)
                with accelerator.autocast():
                    with teacher.network(student) as network:
                        wanted = asked.draw(family, network, whole.scheduler, sampling, moved).double()
                        plain = asked.draw(family, network, whole.scheduler, learned, moved).double()
                    made = task.told.draw(family, student, whole.scheduler, learned, moved).double()
                differences = [plain - wanted, made - wanted, wanted]
                errors += torch.stack([part.square().sum().cpu() for part in differences])
            before, after = (errors[:2] / errors[2].clamp(min=1e-30)).sqrt().tolist()
        student.to("cpu", torch.float32)
        if self.adapter is not None:
            save_adapter(
                context.folder / "adapter",
                student,
                family,
                self.adapter,
                name=f"{self.method}-{self.steps}-steps",
                title=f"{self.method.upper()}, {self.steps} steps",
            )
            folded = copy.deepcopy(family.denoiser(whole)).to("cpu")
            fold_adapter(folded, student)
            student = folded
        context.save(around(whole, {family.facts.denoiser_name: student}), artifact)
        return Outcome(
            metrics={
                "parameters": parameters(student),
                "relative_error_before": before,
                "relative_error": after,
                "loss": result.loss,
                "steps": result.step,
            },
            details={"note": self._note(examples.origin, sampling, before, after)},
            sampling=learned,
        )

    def _note(self, origin: str, sampling: SamplingConfig, before: float, after: float) -> str:
        said = (
            f"learned from {origin}; its teacher draws in {sampling.steps} steps with guidance"
            f" {sampling.guidance:g}"
        )
        if not after < before:
            said += (
                f"; the model before comes as near in {self.steps} steps with guidance ({before:.3g}, now"
                f" {after:.3g}): train longer, or with another lr"
            )
        return said

    @property
    def levers(self) -> Levers:
        """How its memory is arranged."""
        from tunekit.passes.learning import levers_of

        return levers_of(self)

    def learned(self, family: Planned, pipeline: Pipeline, sampling: SamplingConfig) -> SamplingConfig:
        """How the student is drawn with.

        Args:
            sampling: how its teacher is; guidance is not None.
        """
        from tunekit.diffusion.sampling import sampler
        from tunekit.training.consistency import student_scheduler, unguided

        assert sampling.guidance is not None
        teacher = sampler(pipeline.scheduler, sampling)
        return SamplingConfig(
            steps=self.steps,
            guidance=unguided(family, pipeline, sampling.guidance),
            scheduler=student_scheduler(teacher, self.method, self.solver_steps),
        )

    def task(
        self,
        fitted: Fitted,
        family: Planned,
        teacher: Teacher,
        learned: SamplingConfig,
        objective: Objective,
        way: Way,
        seed: int = 0,
    ) -> Consistency | Matching:
        """What is learned."""
        from tunekit.training.consistency import Consistency, Guidance
        from tunekit.training.matching import Matching

        told = Guidance(learned.guidance, None)
        if self.method != "dmd":
            return Consistency(fitted, family, teacher, told, objective, way, decay=self.ema)
        critic = self.critic_steps
        return Matching(
            fitted, family, teacher, told, objective, way, seed=seed, critic_steps=critic, decay=self.ema
        )

    def prepared(self, denoiser: nn.Module) -> None:
        """A second adapter for what is learned with one."""
        from tunekit.adapters import add_critic

        if self.method == "dmd":
            add_critic(denoiser)

    def way(
        self, family: Family, scheduler: Any, learned: SamplingConfig, latents: Tensor, objective: Objective
    ) -> Way:
        """The points in time that are learned.

        Args:
            scheduler: a fresh one, as `learned` has it.
            latents: [1, C, h, w] of a picture's size.
        """
        from tunekit.training.consistency import Way

        phased = self.method != "lcm"
        points = self.steps if self.method == "dmd" else self.solver_steps
        return Way.of_sampler(
            scheduler, family.begin, learned, latents, objective, points=points, phased=phased
        )


PASS = Distill
