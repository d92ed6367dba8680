"""The section `adapter:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunekit.config.schema import Names, PathText, Section, refuse

Preset = Literal["attention", "attention_feed_forward", "all_linear"]


class AdapterConfig(Section):
    """A low-rank adapter, as in PEFT."""

    kind: Literal["lora", "dora"] = "lora"
    """dora also learns the length of each weight column."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapter; its masks belong to the samples."""
    targets: Names | Preset | None = None
    """Modules to adapt: names, such as to_q; or attention, attention_feed_forward or all_linear of the
    denoiser; null means the family's own choice."""
    init: PathText | None = None
    """An adapter to start from: a run, a folder or a file, of tunekit, kohya or PEFT; of the same kind, rank
    and modules."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, value: list[str] | str | None) -> list[str] | str | None:
        if value is not None and not value:
            refuse("an empty list adapts nothing; null means the family's own choice")
        return value
