"""Trains a pruned or quantized model to give its parent's output again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tunekit.config import BatchSize, Count, Steps
from tunekit.passes.base import NO_EXAMPLES, Context, Outcome, Pass, Start, formats, learned_from, untrainable
from tunekit.passes.metrics import PARAMETERS, RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact


class Heal(Pass):
    """Trains the model for a short while to give the output of the model before the last step.

    The loss is the squared error of the output and of each large block's hidden state against the parent's,
    on the run's own pictures, or where it has none on pictures that the parent draws from the run's prompts.
    Where training leaves the output farther away than it was, the weights stay as they were, and it is said.
    """

    kind: ClassVar[str] = "heal"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "comes after {giver}, and packed weights cannot be trained; put it before"
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        PARAMETERS,
        SIZE,
        RELATIVE_ERROR,
        Metric("loss", "loss", lower_is_better=True),
        Metric("steps", "steps", "count"),
    )

    max_steps: Steps = 200
    """Optimizer steps."""
    lr: float = Field(1e-4, gt=0, le=100)
    """Highest learning rate; it warms up over a twentieth of the steps and falls to zero as a cosine."""
    batch_size: BatchSize = 8
    """Samples per optimizer step."""
    micro_batch: BatchSize | None = None
    """Samples per forward; null means the whole batch at once."""
    feature_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the blocks' hidden states; the output counts 1."""
    optimizer: str = "adamw"
    """Row of tunekit/optimizers.py."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; the trained weights are fp32."""
    pictures: Count = 32
    """Pictures the parent draws where the run has none of its own."""

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other, and a model that nothing has changed."""
        if trouble := untrainable(self.optimizer, self.batch_size, self.micro_batch):
            return trouble
        last = next((step for step in reversed(earlier) if not step.looks), None)
        if last is not None and "few_steps" in last.gives():
            return f"would teach the student of {last.kind} to be its teacher again; put it before"
        if not any("changed" in step.gives() for step in earlier):
            return "has nothing to heal: no step before it changed the model (put it behind prune)"
        return None

    def reads(self, context: Context) -> frozenset[str]:
        """Its teacher, and what both learn from."""
        return frozenset({"parent"}) | learned_from(context)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain that has nothing to learn from or nobody to learn from."""
        if sum(format != "adapter" for format in formats(start.format, earlier)) < 2:
            return "has no parent to learn from: there is only one whole model so far"
        return None if start.examples else NO_EXAMPLES

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Measures, trains, measures again, saves.

        Raises:
            ConfigError: the run knows neither pictures nor prompts.
            NonFiniteError: the loss is not finite.
        """
        import copy

        from tunekit import families
        from tunekit.config import TrainConfig
        from tunekit.data.cache import Draws, Stream
        from tunekit.data.calibration import UNCONDITIONAL
        from tunekit.memory.levers import Fitted
        from tunekit.passes.prunable import parameters
        from tunekit.training.distill import Distillation, output_error
        from tunekit.training.loop import Hooks, train
        from tunekit.training.run import build_optimizer

        family = families.get(context.family)
        origin = context.reference("parent")
        assert origin is not None  # `problem` has seen to it
        whole = context.open(artifact)
        denoiser, teacher = family.denoiser(whole), family.denoiser(context.open(origin))
        student = copy.deepcopy(denoiser)
        settings = TrainConfig(
            max_steps=self.max_steps,
            lr=self.lr,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            schedule="cosine",
            warmup_steps=self.max_steps // 20,
            weight_decay=0.0,
            log_every=max(1, self.max_steps // 10),
        )
        drawn = context.examples(origin, count=self.pictures, precision=self.precision)
        with drawn as (examples, accelerator):
            for module in (student, teacher):
                module.to(accelerator.device)
            before = output_error(family, student, teacher, examples)
            context.say(f"learning from {examples.origin}")
            batches = Stream(
                examples.dataset,
                examples.objective,
                Draws(self.batch_size, self.micro_batch, caption_dropout=UNCONDITIONAL),
                seed=context.seed,
            )
            fitted = Fitted.plain(student.train().requires_grad_(True))
            result = train(
                accelerator,
                Distillation(fitted, family, teacher, examples.objective, self.feature_weight),
                build_optimizer(settings, fitted, accelerator.device),
                batches,
                settings,
                Hooks(seed=context.seed, say=context.say, title="heal"),
            )
            student.eval().requires_grad_(False)
            trained = output_error(family, student, teacher, examples)
        worse = not trained <= before  # NaN, too
        note = f"learned from {examples.origin}"
        if worse:
            note += (
                f"; training made the output worse ({before:.3g} -> {trained:.3g}), so the weights are as"
                " before: lower lr, or leave heal out"
            )
        context.save(whole if worse else around(whole, {family.facts.denoiser_name: student}), artifact)
        return Outcome(
            metrics={
                "parameters": parameters(student),
                "relative_error_before": before,
                "relative_error": before if worse else trained,
                "loss": result.loss,
                "steps": result.step,
            },
            details={"note": note},
        )


PASS = Heal
