"""The section `model:`."""

from __future__ import annotations

from pydantic import field_validator, model_validator

from tunekit.config.schema import PathText, Section, Word, no_effect, refuse
from tunekit.errors import did_you_mean
from tunekit.registry import FAMILIES
from tunekit.resources import Source


class ModelConfig(Section):
    """The base model."""

    family: str
    """Model family, a file in tunekit/families: sd15."""
    source: PathText
    """Hub id, folder, single .safetensors or .gguf file, "builtin/..." or "tiny" (small random weights)."""
    base: PathText | None = None
    """Folder or hub id of a whole model, for what a single file of a transformer or U-Net alone lacks."""
    revision: Word | None = None
    """Branch, tag or commit on the hub."""
    variant: Word | None = None
    """Variant of the weight files, such as fp16; null takes the plain ones, or the only ones in a folder."""
    allow_pickle: bool = False
    """Accept .bin and .ckpt files (still loaded as weights only)."""

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        names = FAMILIES.names()
        if value not in names:
            hint = did_you_mean(value, names) or f"known: {', '.join(names)}"
            refuse(f'there is no family "{value}"; {hint}')
        return value

    @model_validator(mode="after")
    def _effects(self) -> ModelConfig:
        if self.source == "tiny" or self.source.startswith("builtin/"):
            keys = ("base", "revision", "variant", "allow_pickle")
            no_effect(self, keys, f"model.source is {self.source}, of which there is one version")
        return self

    @property
    def opened(self) -> Source:
        """What to open, and how."""
        return Source(self.source, self.revision, self.variant, self.allow_pickle, self.base)
