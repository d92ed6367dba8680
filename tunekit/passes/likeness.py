"""Settings of passes that have pictures judged by networks."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from tunekit.config import PathText, Section, no_effect, wrong
from tunekit.diffusion.judges import Judges


class Judged(Section):
    """Settings of whatever has pictures judged by networks."""

    lpips_key: ClassVar[str] = "lpips"
    """Key that asks for LPIPS."""
    clip_key: ClassVar[str] = "clip"
    """Key that asks for CLIP."""

    lpips_weights: PathText | None = None
    """File of torchvision's AlexNet; null: torch's hub folder. Nothing is downloaded."""
    clip_model: PathText | None = None
    """Folder of the CLIP that gives the score, as transformers saves it."""

    @model_validator(mode="after")
    def _judged(self) -> Judged:
        judges = self.judges
        if not judges.lpips:
            no_effect(self, ("lpips_weights",), f"{self.lpips_key} is not set")
        if not judges.clip:
            no_effect(self, ("clip_model",), f"{self.clip_key} is not set")
        elif self.clip_model is None:
            wrong(self.clip_key, "needs a CLIP: give its folder as clip_model")
        return self

    @property
    def judges(self) -> Judges:
        """The networks that are asked."""
        lpips, clip = (getattr(self, key) is not None for key in (self.lpips_key, self.clip_key))
        return Judges(lpips, clip, self.lpips_weights, self.clip_model)
