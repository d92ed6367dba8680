"""What every recipe's config has, and what those that train share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tunekit import optimizers
from tunekit.config.adapter import AdapterConfig
from tunekit.config.memory import MemoryConfig, free_on_resume
from tunekit.config.model import ModelConfig
from tunekit.config.objective import ObjectiveConfig
from tunekit.config.schema import PathText, Section, Seed, idle, refuse, wrong
from tunekit.config.train import CHOSEN_BY, PreviewConfig, TrainConfig
from tunekit.config.yaml import Key
from tunekit.resources import expand

FREE = (
    "name",
    "runs",
    "recipe",
    "optimize",
    "preview",
    "data.path",  # the pictures themselves are compared, see `training/checkpoint.py`
    "data.class_path",
    "data.validation",
    "data.cache",
    "data.streaming",
    "data.tolerate",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.log_every",
    "train.save_every",
    "train.keep_best",
    "train.early_stop",
    "train.final",
    "train.trackers",
    "adapter.init",  # what it holds is compared
    *free_on_resume(),
)
"""Keys that do not change what is learned: they may differ between the lives of one run."""
LONGEST_NAME = 150
"""Bytes of a run's name: a file system takes 255, and there is `.<name>.comfyui.safetensors.tmp-<pid>`."""


class RunConfig(Section):
    """What every recipe's config has."""

    recipe: PathText
    """Name of a recipe, or the path of a recipe file."""
    name: str = "run"
    """Folder under `runs`; the default is the config file's name."""
    runs: PathText = "runs"
    """Folder of all runs."""
    seed: Seed = 0
    """Everything that is drawn at random follows from it."""

    @field_validator("name")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.+=@(), -]*", value) or value[-1] in " .":
            refuse("must begin with a letter or a digit, and go on with these or . + = @ ( ) , - _ or blanks")
        if len(value.encode()) > LONGEST_NAME:
            refuse(f"must be at most {LONGEST_NAME} bytes long, because files are named after it")
        return value

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return expand(self.runs) / self.name


Chain = Annotated[list[dict[str, Any] | str], Field(max_length=100)]
"""Passes, each by its name or with its settings."""


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
    optimize: Chain = []
    """Passes to run after training, in order."""

    @property
    def cache_dir(self) -> Path:
        """Where encoded pictures are kept: by default beside the run folders, shared by all runs."""
        named = getattr(getattr(self, "data", None), "cache", None)
        return Path(named).expanduser() if named is not None else self.run_dir.parent / ".cache"

    @property
    def keeps_best(self) -> bool:
        """Whether the best by validation is kept."""
        if getattr(getattr(self, "data", None), "validation", None) is None:
            return False
        kept = self.train.keep_best
        if kept is None:  # weights take the room of a model each time
            return self.adapter is not None and self.train.validate_every is not None
        return bool(kept)

    @property
    def final(self) -> str:
        """What becomes the result: "best" or "last"."""
        return self.train.final or ("best" if self.keeps_best else "last")

    @staticmethod
    def _ends_early(train: TrainConfig, patience: int, *, measured: bool) -> None:
        """Refuse a wish to end early that cannot come true."""
        every, key = train.validate_every, "train.early_stop"
        if every is None or not measured:
            lacking = "train.validate_every" if measured else "data.validation"
            idle(key, f"{CHOSEN_BY} is not measured without {lacking}")
        first = (1 + patience) * every
        if first >= train.max_steps:
            idle(key, f"it could end the training at step {first} at the earliest, of {train.max_steps}")

    moved: ClassVar[dict[Key, Key]] = {("train", "snr_gamma"): ("objective", "snr_gamma")}
    """Former names of keys; configs that have them still run."""

    @model_validator(mode="after")
    def _effects(self) -> TrainingRunConfig:
        train, memory, preview = self.train, self.memory, self.preview
        validation = getattr(getattr(self, "data", None), "validation", None)
        if train.validate_every is not None and validation is None:
            idle("train.validate_every", "there are no held-out pictures without data.validation")
        if self.adapter is None and train.save_every:
            wrong(
                "train.save_every",
                "keeps adapters, and all weights are trained; train.checkpoint_every and"
                " train.keep_checkpoints keep states to continue from",
            )
        if train.keep_best and validation is None:
            wrong(
                "train.keep_best",
                f"has nothing to choose by without data.validation: {CHOSEN_BY} is not measured",
            )
        if train.keep_best and train.validate_every is None:
            idle("train.keep_best", "without train.validate_every the last step alone is measured")
        if train.final == "best" and not self.keeps_best:
            wrong(
                "train.final",
                "there is no best without a choice: set data.validation, train.validate_every and"
                f" train.keep_best={CHOSEN_BY}",
            )
        if train.early_stop is not None:
            self._ends_early(train, train.early_stop, measured=validation is not None)
        if train.save_every is not None and train.save_every > train.max_steps:
            idle("train.save_every", f"training ends before, at step {train.max_steps}")
        if memory.class_batch is not None and not getattr(getattr(self, "data", None), "class_prompt", None):
            idle("memory.class_batch", "no class pictures are drawn")
        frozen_only = "needs a frozen base: all weights are trained with adapter=null"
        if self.adapter is None and memory.base_precision not in (None, "same"):
            wrong("memory.base_precision", frozen_only)
        if self.adapter is None and memory.offload:
            wrong("memory.offload", frozen_only)
        if memory.sharding == "full" and self.adapter is None:
            if not optimizers.find(train.optimizer).by_element:
                wrong(
                    "memory.sharding",
                    f"does not go with train.optimizer={train.optimizer}, whose state is of whole tensors or"
                    " of blocks of them; adamw's is of each weight",
                )
            if memory.precision == "fp16":
                wrong("memory.sharding", "does not go with fp16 where all weights are trained; bf16 does")
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
            idle("preview.every", f"training ends before, at step {train.max_steps}")
        if train.validate_every is not None and train.validate_every > train.max_steps:
            idle("train.validate_every", f"training ends before, at step {train.max_steps}")
        return self
