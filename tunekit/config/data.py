"""The sections `data:`: what is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunekit.config.schema import Fraction, Multiple, Positive, Section, no_effect


class _Pictures(Section):
    path: str
    """Folder of pictures, or "builtin/pictures/..."."""
    resolution: Multiple = 512
    """Side of the training pictures, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of a picture that does not fit the resolution."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew in each epoch."""
    cache: str | None = None
    """Folder of the encoded pictures and captions; the default is .cache under `runs`."""


class DataConfig(_Pictures):
    """Captioned pictures."""

    path: str
    """Folder of captioned pictures, a parquet file, a hub id of a data set, or "builtin/pictures/..."."""
    split: str = "train"
    """Split of a `datasets` data set."""
    image_column: str | None = None
    """Column of the pictures, if it cannot be told."""
    caption_column: str | None = None
    """Column of the captions, if it cannot be told."""
    buckets: bool = True
    """Group pictures by aspect ratio; otherwise all are cropped square."""
    caption_prefix: str = ""
    """Put before every caption."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with an empty caption."""
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out pictures: a path like `path`, or the share of the pictures to hold out."""


class DreamboothData(_Pictures):
    """A few pictures of one subject, and the class it belongs to."""

    path: str
    """Folder of the pictures of the subject."""
    instance_prompt: str
    """Prompt naming the subject by a rare word: "a photo of sks robot"."""
    class_prompt: str | None = None
    """Prompt of the class, "a photo of a robot"; null trains without prior preservation."""
    class_path: str | None = None
    """Folder of class pictures; the base model draws those that are missing. Default: in the run folder."""
    class_pictures: Positive = 50
    """How many class pictures."""
    class_steps: Positive = 30
    """Sampling steps of a class picture."""
    class_guidance: float = Field(5.0, ge=0)
    """Guidance of a class picture."""
    prior_weight: float = Field(1.0, ge=0)
    """Weight of the class pictures' loss."""

    @model_validator(mode="after")
    def _effects(self) -> DreamboothData:
        if self.class_prompt is None:
            keys = ("class_path", "class_pictures", "class_steps", "class_guidance", "prior_weight")
            no_effect(self, keys, "there are no class pictures without class_prompt")
        return self
