"""Trains a pruned or quantized model to give its parent's output again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tunekit.config import AdapterConfig, BatchSize, Count, Steps
from tunekit.passes.base import NO_EXAMPLES, Context, Outcome, Pass, Start, formats, learned_from, untrainable
from tunekit.passes.metrics import PARAMETERS, RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around

if TYPE_CHECKING:
    from torch import nn

    from tunekit.artifacts import Artifact
    from tunekit.memory.decided import Levers
    from tunekit.training.loop import Result


class Heal(Pass):
    """Trains the model for a short while to give the output of the model before the last step.

    The loss is the squared error of the output and of each large block's hidden state against the parent's,
    on the run's own pictures, or where it has none on pictures that the parent draws from the run's prompts.
    Where whole blocks have left, the one before them learns to give on what they did. It ends by itself when
    the error on held-out noise stops falling; the weights at its lowest are taken. Where training leaves the
    output farther away than it was, the weights stay as they were, and it is said. A healing that was killed
    goes on from its last checkpoint.
    """

    kind: ClassVar[str] = "heal"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})
    learns: ClassVar[bool] = True
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
    """Optimizer steps at most."""
    minutes: float | None = Field(None, gt=0, le=100_000)
    """Fewer steps, where these minutes have no time for all at the pace that the first ones have here."""
    lr: float = Field(5e-4, gt=0, le=100)
    """Highest learning rate, of layers with up to 32 inputs; of wider ones it is less in proportion, so that
    one rate serves networks of any size. It warms up over a twentieth of the steps and falls to zero as a
    cosine."""
    adapter: AdapterConfig | None = None
    """Train an adapter in place of all weights, in much less memory; it is folded in."""
    batch_size: BatchSize = 8
    """Samples per optimizer step."""
    micro_batch: BatchSize | None = None
    """Samples per forward; null means the whole batch at once."""
    feature_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the blocks' hidden states; the output counts 1."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Share of itself that a mean of the weights keeps at each step; it is what is kept in the end. 0 takes
    the weights themselves."""
    check_every: Steps = 50
    """Optimizer steps between looks at the error on held-out noise."""
    patience: Count | None = 3
    """Looks in a row without a lower error, after which it ends; null never ends before `max_steps`."""
    optimizer: str = "adamw"
    """Row of tunekit/optimizers.py."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; the trained weights are fp32."""
    gradient_checkpointing: bool = False
    """Keep less of each forward pass and compute it again: slower, in less memory."""
    pictures: Count = 32
    """Pictures the parent draws where the run has none of its own."""
    checkpoint_every: Steps = 100
    """Optimizer steps between checkpoints."""

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds settings that contradict each other, and a model that nothing has changed."""
        if trouble := untrainable(self.optimizer, self.batch_size, self.micro_batch):
            return trouble
        last = next((step for step in reversed(earlier) if not step.looks), None)
        if last is not None and "few_steps" in last.gives():
            return f"would teach the student of {last.kind} to be its teacher again; put it before"
        sparse = next((step for step in earlier if "sparse" in step.gives()), None)
        if sparse is not None and self.adapter is not None:
            return f"trains an adapter, which would fill the zeros of {sparse.kind}; leave adapter out"
        if not any("changed" in step.gives() for step in earlier):
            return "has nothing to heal: no step before it changed the model (put it behind prune)"
        return None

    def reads(self, context: Context) -> frozenset[str]:
        """Its teacher, and what both learn from."""
        return frozenset({"parent"}) | learned_from(context)

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds a chain that has nothing to learn from or nobody to learn from."""
        if "sparse" in start.traits and self.adapter is not None:
            return "trains an adapter, which would fill the zeros of a sparse model; leave adapter out"
        if sum(format != "adapter" for format in formats(start.format, earlier)) < 2:
            return "has no parent to learn from: there is only one whole model so far"
        return None if start.examples else NO_EXAMPLES

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Measures, trains, measures again, saves.

        Raises:
            ConfigError: the run knows neither pictures nor prompts.
            NonFiniteError: the loss is not finite.
            Interrupted: it was told to stop; started again, it goes on.
        """
        import copy

        from safetensors.torch import load_file

        from tunekit import families
        from tunekit.adapters import fold_adapter
        from tunekit.data.cache import Draws, Stream, save_tensors
        from tunekit.data.calibration import UNCONDITIONAL
        from tunekit.memory.levers import fit
        from tunekit.passes.learning import affordable, checkpointed, gone, settings_of
        from tunekit.passes.prunable import parameters
        from tunekit.passes.sparse import patterns
        from tunekit.training.distill import Distillation, HeldOut
        from tunekit.training.loop import Hooks, train
        from tunekit.training.run import build_optimizer
        from tunekit.training.schedule import scales

        family = families.get(context.family)
        origin = context.reference("parent")
        assert origin is not None  # `problem` has seen to it
        whole = context.open(artifact)
        denoiser, teacher = family.denoiser(whole), family.denoiser(context.open(origin))
        best = context.state / "best.safetensors"
        drawn = context.examples(origin, count=self.pictures, precision=self.precision, adapter=self.adapter)
        with drawn as (examples, accelerator):
            student = copy.deepcopy(denoiser)
            for module in (student, teacher):
                module.to(accelerator.device)
            held = HeldOut(family, teacher, examples)
            before = held.error(student)
            context.say(f"learning from {examples.origin}")
            fitted = fit(
                student,
                self.adapter,
                family.facts,
                self.levers,
                device=accelerator.device,
                seed=context.seed,
            )
            fitted.module.train()
            task = Distillation(
                fitted,
                family,
                teacher,
                examples.objective,
                self.feature_weight,
                gone=gone(artifact, origin),
                decay=self.ema,
                patterns=patterns(family, student) if "sparse" in Start.of(artifact).traits else {},
            )

            def error(module: nn.Module) -> dict[str, float]:
                with task.average.used():
                    return {"val_loss": held.error(module)}

            def keep(name: str, step: int, figures: Mapping[str, float]) -> None:
                save_tensors(best, dict(fitted.parameters) | task.average.values)

            stream = Stream(
                examples.dataset,
                examples.objective,
                Draws(self.batch_size, self.micro_batch, caption_dropout=UNCONDITIONAL),
                seed=context.seed,
            )
            most = affordable(self, accelerator, task, stream, context)
            settings = settings_of(self, most).model_copy(update={"validate_every": self.check_every})
            result = train(
                accelerator,
                task,
                build_optimizer(
                    settings, fitted, accelerator.device, scales(fitted.module, fitted.parameters)
                ),
                stream,
                settings,
                Hooks(
                    seed=context.seed,
                    checkpoints=checkpointed(context),
                    evaluate=error,
                    keep=keep,
                    keep_best=True,
                    patience=self.patience,
                    say=context.say,
                    title="heal",
                ),
            )
            fitted.finish()
            taken = int(result.metrics.get("best_step", 0))
            if taken:
                own = dict(fitted.module.named_parameters())
                for name, value in load_file(best).items():
                    own[name].data.copy_(value)
            student = fitted.module.eval().requires_grad_(False)
            trained = held.error(student)
            if self.adapter is not None:
                folded = copy.deepcopy(denoiser).to("cpu")
                fold_adapter(folded, student.to("cpu"))
                student = folded
        worse = not taken or not trained <= before  # NaN, too
        note = self._note(examples.origin, result, most, taken, before, trained, worse=worse)
        context.save(whole if worse else around(whole, {family.facts.denoiser_name: student}), artifact)
        return Outcome(
            metrics={
                "parameters": parameters(denoiser),
                "relative_error_before": before,
                "relative_error": before if worse else trained,
                "loss": result.loss,
                "steps": result.step,
            },
            details={
                "note": note,
                "ended": {
                    "step": result.step,
                    "taken": 0 if worse else taken,
                    "why": self._why(result.step, most, taken),
                },
            },
        )

    def _why(self, step: int, most: int, taken: int) -> str:
        if step >= most:
            return "max_steps" if most == self.max_steps else f"minutes: {self.minutes:g}"
        return f"no lower error on held-out noise in {self.patience} looks, since step {taken}"

    def _note(
        self,
        origin: str,
        result: Result,
        most: int,
        taken: int,
        before: float,
        trained: float,
        *,
        worse: bool,
    ) -> str:
        said = f"learned from {origin}"
        if result.step < self.max_steps:
            said += (
                f"; ended at step {result.step} of {self.max_steps}: {self._why(result.step, most, taken)}"
            )
        if worse:
            said += (
                f"; training made the output worse ({before:.3g} -> {trained:.3g}), so the weights are as"
                " before: lower lr, or leave heal out"
            )
        elif taken < result.step:
            said += f"; the weights are those of step {taken}, whose error was lowest"
        return said

    @property
    def levers(self) -> Levers:
        """How its memory is arranged."""
        from tunekit.passes.learning import levers_of

        return levers_of(self)


PASS = Heal
