"""LPIPS and CLIP for whoever has pictures judged: where their weights are; never fetched from anywhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import ModelError, missing

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

    @classmethod
    def of_previews(cls, clip_model: str | None) -> Judges:
        """Who scores previews: the CLIP that is named, or nobody."""
        return cls(clip=clip_model is not None, clip_model=clip_model)

    def lack(self) -> str | None:
        """What is missing, as the rest of a sentence; None if nothing is."""
        if self.lpips:
            if absent := missing("torchmetrics", extra="metrics", why="needs"):
                return f"{absent.message} (lpips)"
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
            if not self.clip_bytes:
                return f"finds no CLIP at {self.clip_model}: there are no weights in it"
        return None

    @property
    def clip_bytes(self) -> int:
        """What the weights of the CLIP take; 0 where there are none."""
        if self.clip_model is None:
            return 0
        folder = Path(self.clip_model).expanduser()
        kinds = ([*folder.glob(f"*.{ending}")] for ending in ("safetensors", "bin"))
        return sum(file.stat().st_size for file in next((found for found in kinds if found), []))

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
