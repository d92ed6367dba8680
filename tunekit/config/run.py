"""What every recipe's config has, and what those that train share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from tunekit.config.adapter import AdapterConfig
from tunekit.config.memory import MemoryConfig
from tunekit.config.model import ModelConfig
from tunekit.config.objective import ObjectiveConfig
from tunekit.config.schema import Section, wrong
from tunekit.config.train import PreviewConfig, TrainConfig
from tunekit.config.yaml import Key


class RunConfig(Section):
    """What every recipe's config has."""

    recipe: str
    """Name of a recipe, or the path of a recipe file."""
    name: str = Field("run", pattern=r"^[\w][\w.+=@ -]*$")
    """Folder under `runs`; the default is the config file's name."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = Field(0, ge=0)
    """Everything that is drawn at random follows from it."""

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.runs).expanduser() / self.name


class TrainingRunConfig(RunConfig):
    """What the training recipes share; each adds its own `data`."""

    model: ModelConfig
    """The base model."""
    adapter: AdapterConfig | None = AdapterConfig()
    """The adapter that is trained; null trains all weights."""
    train: TrainConfig
    """How it is trained."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures drawn during training."""
    memory: MemoryConfig = MemoryConfig()
    """What fits where."""
    optimize: list[dict[str, Any] | str] = []
    """Passes to run after training, in order."""

    moved: ClassVar[dict[Key, Key]] = {("train", "snr_gamma"): ("objective", "snr_gamma")}
    """Former names of keys; configs that have them still run."""

    @model_validator(mode="after")
    def _effects(self) -> TrainingRunConfig:
        train, memory, preview = self.train, self.memory, self.preview
        validation = getattr(getattr(self, "data", None), "validation", None)
        if train.validate_every is not None and validation is None:
            wrong(
                "train.validate_every",
                "has no effect: there are no held-out pictures without data.validation",
            )
        if memory.class_batch is not None and not getattr(getattr(self, "data", None), "class_prompt", None):
            wrong("memory.class_batch", "has no effect: no class pictures are drawn")
        frozen_only = "needs a frozen base: all weights are trained with adapter=null"
        if self.adapter is None and memory.base_precision in ("int8", "nf4"):
            wrong("memory.base_precision", frozen_only)
        if self.adapter is None and memory.offload:
            wrong("memory.offload", frozen_only)
        if memory.optimizer_in_backward:
            key = "memory.optimizer_in_backward"
            if self.adapter is not None:
                wrong(key, "saves nothing with an adapter, whose gradients are small")
            if train.max_grad_norm is not None:
                wrong(
                    key,
                    "contradicts train.max_grad_norm: the norm of all gradients is known only when all are"
                    " there; set train.max_grad_norm to null, or leave this out",
                )
            if (memory.micro_batch or train.batch_size) < train.batch_size:
                wrong(
                    key,
                    "contradicts memory.micro_batch: gradients of several forwards are summed before they"
                    " are used",
                )
            if memory.precision == "fp16":
                wrong(key, "does not go with fp16, whose gradients are unscaled all at once")
        if memory.micro_batch is not None and memory.micro_batch > train.batch_size:
            wrong("memory.micro_batch", f"must not be larger than train.batch_size ({train.batch_size})")
        if preview.every is not None and preview.every > train.max_steps:
            wrong("preview.every", f"has no effect: training ends before, at step {train.max_steps}")
        if train.validate_every is not None and train.validate_every > train.max_steps:
            wrong("train.validate_every", f"has no effect: training ends before, at step {train.max_steps}")
        return self
