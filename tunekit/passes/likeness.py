"""Pictures judged by networks: what is wanted, and where their weights are; never fetched from anywhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from tunekit.config import PathText, Section, no_effect, wrong
from tunekit.errors import ModelError
from tunekit.passes.providers import lacks

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.diffusion.perceptual import ClipScore, Lpips

ALEXNET = "alexnet-owt-7be5be79.pth"
"""torchvision's weights, as torch keeps them in its hub folder."""
ADDRESS = f"https://download.pytorch.org/models/{ALEXNET}"
HEADS = "functional/image/lpips_models/alex.pth"
"""Within torchmetrics."""


@dataclass(frozen=True)
class Judges:
    """LPIPS and CLIP, opened when they are first asked.

    Attributes:
        lpips: whether LPIPS is wanted.
        clip: whether CLIP is.
        lpips_weights: file of AlexNet's weights; None is torch's hub folder.
        clip_model: folder of a CLIP.
    """

    lpips: bool = False
    clip: bool = False
    lpips_weights: str | None = None
    clip_model: str | None = None

    def lack(self) -> str | None:
        """What is missing, for a message about a pass; None if nothing is."""
        if self.lpips:
            if absent := lacks("torchmetrics", extra="metrics"):
                return f"{absent} (lpips)"
            if not self._weights.is_file():
                if self.lpips_weights:
                    return f"finds no weights for lpips: there is no file {self.lpips_weights}"
                return (
                    f"finds no weights of AlexNet for lpips at {self._weights}; put {ADDRESS} there, or name"
                    " a file of them: lpips_weights"
                )
        if self.clip:
            folder = Path(self.clip_model or "").expanduser()
            for name in ("config.json", "preprocessor_config.json"):
                if not (folder / name).is_file():
                    return f"finds no CLIP at {self.clip_model}: there is no {name} in it"
        return None

    def distances(self, value: Tensor, reference: Tensor) -> list[float]:
        """LPIPS of each picture from its reference; pixels [B, 3, H, W] in [0, 1]."""
        return [float(one) for one in self._lpips(value, reference)]

    def scores(self, pixels: Tensor, prompts: Sequence[str]) -> list[float]:
        """CLIP score of each picture for its prompt, -1 to 1."""
        return [float(one) for one in self._clip(pixels.nan_to_num(0), prompts)]

    @property
    def _weights(self) -> Path:
        if self.lpips_weights:
            return Path(self.lpips_weights).expanduser()
        home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
        return Path(home).expanduser() / "hub" / "checkpoints" / ALEXNET

    @cached_property
    def _lpips(self) -> Lpips:
        from tunekit.diffusion.perceptual import Lpips

        found = importlib.util.find_spec("torchmetrics")
        places = (found.submodule_search_locations if found else None) or []
        heads = next((path for place in places if (path := Path(place, HEADS)).is_file()), None)
        if heads is None:
            raise ModelError(
                f"torchmetrics has no {HEADS} here", hint="install the version in constraints.txt"
            )
        return Lpips(self._weights, heads)

    @cached_property
    def _clip(self) -> ClipScore:
        from tunekit.diffusion.perceptual import ClipScore

        return ClipScore(Path(self.clip_model or "").expanduser())


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
