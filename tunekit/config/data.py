"""The sections `data:`: what is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunekit.config.schema import (
    Count,
    Fraction,
    Multiple,
    PathText,
    SamplingSteps,
    Section,
    Text,
    Word,
    no_effect,
)


class _Pictures(Section):
    path: PathText
    """Folder of pictures, or "builtin/pictures/..."."""
    resolution: Multiple = 512
    """Side of the training pictures, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of a picture that does not fit the resolution."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew in each epoch."""
    cache: PathText | None = None
    """Folder of the encoded pictures and captions; the default is .cache under `runs`."""


class DataConfig(_Pictures):
    """Captioned pictures."""

    path: PathText
    """Folder of captioned pictures, parquet files or shards (.tar), a hub id, or "builtin/pictures/..."."""
    split: Word = "train"
    """Split to read: of a hub data set, or where files or sub-folders are named after splits."""
    streaming: bool = False
    """Read the data set through `datasets` as a stream, and keep no copy of it on this disk."""
    image_column: Word | None = None
    """Column of the pictures, if it cannot be told; of shards, the suffix of their members."""
    caption_column: Word | None = None
    """Column of the captions, if it cannot be told; of shards, the suffix of members or a key in .json."""
    tolerate: float = Field(0.0, ge=0, lt=1)
    """Share of the pictures that may be unusable: so many are left out, with more nothing starts."""
    buckets: bool = True
    """Group pictures by aspect ratio; otherwise all are cropped square."""
    caption_prefix: Text = ""
    """Put before every caption, with a blank between."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with an empty caption."""
    validation: PathText | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out pictures: a path like `path`, or the share of the pictures to hold out."""


class DreamboothData(_Pictures):
    """A few pictures of one subject, and the class it belongs to."""

    path: PathText
    """Folder of the pictures of the subject."""
    instance_prompt: Text
    """Prompt naming the subject by a rare word: "a photo of sks robot"."""
    class_prompt: Text | None = None
    """Prompt of the class, "a photo of a robot"; null trains without prior preservation."""
    class_path: PathText | None = None
    """Folder of class pictures; the base model draws those that are missing. Default: in the run folder."""
    class_pictures: Count = 50
    """How many class pictures."""
    class_steps: SamplingSteps = 30
    """Sampling steps of a class picture."""
    class_guidance: float = Field(5.0, ge=0, le=1000)
    """Guidance of a class picture."""
    prior_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of the class pictures' loss."""

    @model_validator(mode="after")
    def _effects(self) -> DreamboothData:
        if self.class_prompt is None:
            keys = ("class_path", "class_pictures", "class_steps", "class_guidance", "prior_weight")
            no_effect(self, keys, "there are no class pictures without class_prompt")
        return self
