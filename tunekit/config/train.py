"""The sections `train:` and `preview:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tunekit import optimizers
from tunekit.config.sampling import SamplingConfig
from tunekit.config.schema import (
    MOST_STEPS,
    BatchSize,
    PathText,
    Section,
    Seed,
    Steps,
    Text,
    no_effect,
    refuse,
    wrong,
)
from tunekit.errors import ConfigError

TRACKERS = {"tensorboard": "trackers", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""A tracker, and the package of its name -> the extra of ours that installs it."""
CHOSEN_BY = "val_loss"
"""The figure that the best is lowest in."""


class TrainConfig(Section):
    """How it is trained."""

    max_steps: Steps
    """Optimizer steps. It may grow later: steps already made keep their learning rates, and those to come
    follow the schedule of the new length."""
    lr: float = Field(gt=0, le=100)
    """Highest learning rate."""
    batch_size: BatchSize = 1
    """Samples per optimizer step, over all processes."""
    optimizer: str = "auto"
    """A row of tunekit/optimizers.py: adamw, adamw8bit, paged_adamw8bit or adafactor; auto is adamw, unless
    memory is planned and only another one fits."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the optimizer's moments."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Added to the optimizer's denominator."""
    weight_decay: float = Field(0.01, ge=0, le=100)
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; linear and cosine end at zero."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e9)] | None = 1.0
    """Gradients are clipped to this global norm; null means no clipping."""
    checkpoint_every: Steps = 200
    """Steps between checkpoints."""
    keep_checkpoints: Steps = 2
    """Checkpoints kept; older ones are removed."""
    validate_every: Steps | None = None
    """Steps between validation losses; needs data.validation."""
    save_every: Steps | None = None
    """Steps between adapters that are kept, each with its previews, under adapters/ in the run folder."""
    keep_best: Literal["val_loss"] | bool | None = None
    """Keep what had the lowest validation loss so far: the adapter as adapters/best, or all weights in best/.
    val_loss is the one measure there is, and true says the same; null keeps an adapter where validate_every
    is set, and no weights."""
    final: Literal["best", "last"] | None = None
    """What becomes the result, which the passes go on from; null takes the best where it is kept."""
    early_stop: Steps | None = None
    """Validations in a row without a lower loss after which training ends by itself; null never does. The
    steps that it made are those that a longer run would have made."""
    log_every: Steps = 10
    """Steps between console lines and, on a GPU, looks at the losses; metrics.jsonl has every step."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Further places to log figures, previews and the plan to: tensorboard, wandb, trackio or mlflow; each is
    a package of that name."""

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        try:
            optimizers.find(value)
        except ConfigError as error:
            refuse(error.message)
        return value  # "auto" stays: find has adamw for it

    @field_validator("keep_best", mode="before")
    @classmethod
    def _measured(cls, value: object) -> object:
        if isinstance(value, str) and value != CHOSEN_BY:
            refuse(f'"{value}" is not measured while training; what is, is {CHOSEN_BY}')
        return value

    @model_validator(mode="after")
    def _effects(self) -> TrainConfig:
        if self.warmup_steps >= self.max_steps:
            wrong(
                "warmup_steps", f"the warm-up never ends: it must be less than max_steps ({self.max_steps})"
            )
        takes = optimizers.find(self.optimizer).takes
        unused = [key for key in optimizers.SHARED if key not in takes]
        no_effect(self, unused, f"{self.optimizer} does not take it")
        return self


class PreviewConfig(SamplingConfig):
    """Pictures drawn during and after training."""

    prompts: Annotated[list[Text], Field(max_length=1000)] = []
    """One picture each."""
    every: Steps | None = None
    """Steps between previews; null draws them only at the start and the end."""
    seed: Seed = 0
    """Seed of the first picture; the next ones count up."""
    clip_model: PathText | None = None
    """Folder of a CLIP, as transformers saves it, that says how well previews show their prompts: their mean
    score is `clip` in metrics.jsonl, from -1 to 1, the more the better. Nothing is downloaded."""

    @model_validator(mode="after")
    def _effects(self) -> PreviewConfig:
        if not self.prompts:
            no_effect(
                self, (key for key in type(self).model_fields if key != "prompts"), "preview.prompts is empty"
            )
        return self

    @property
    def sampling(self) -> SamplingConfig:
        """What of it is how a picture is drawn."""
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})
