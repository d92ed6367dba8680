"""What most families answer alike; a family states what it answers otherwise.

Whoever asks knows `family.Family` alone: a family may as well answer everything by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.families import family as answers
from tunekit.families import loading, vae
from tunekit.families.family import Conditioning, Dtypes, FamilyFacts, Middle, Packing, Pipeline, Tokens
from tunekit.families.weights import Entry
from tunekit.resources import Source


class Usual(ABC):
    """A pipeline of diffusers whose latents are those of an AutoencoderKL; see `Family` for each method."""

    facts: ClassVar[FamilyFacts]
    absent: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's constructor: parts of it that are left out."""

    # Opening and writing ------------------------------------------------------------------------------------

    def load(
        self,
        source: Source | str,
        dtypes: Dtypes = torch.float32,
        *,
        pack: Packing = "",
        only: Collection[str] | None = None,
    ) -> Pipeline:
        source = Source.of(source)
        if source.name == "tiny":
            return loading.cast(self.tiny(), self.facts, dtypes)
        return loading.load_pipeline(
            source, self.facts, dtypes, pack=pack, fixed=self.absent, misfits=self.misfits, only=only
        )

    def look(self, source: Source | str) -> list[ModelError]:
        return loading.look(Source.of(source), self.facts, fixed=self.absent, misfits=self.misfits)

    @abstractmethod
    def misfits(self, parts: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Entry]]) -> list[str]:
        """Why components do not make up a model that is trained and drawn here; see `loading.Misfits`."""

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        loading.save_pipeline(pipeline, folder, self.facts)

    @abstractmethod
    def tiny(self, seed: int = 0) -> Pipeline: ...

    def recognizes(self, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return True

    def is_distilled(self, pipeline: Pipeline) -> bool:
        return False  # configurations do not tell

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        network: nn.Module = getattr(pipeline, self.facts.denoiser_name)
        return network

    # Sizes --------------------------------------------------------------------------------------------------

    @abstractmethod
    def resolution_multiple(self, pipeline: Pipeline) -> int: ...

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        channels, multiple = pipeline.vae.config.latent_channels, self.resolution_multiple(pipeline)
        return vae.latent_shape(channels, vae.vae_factor(pipeline), multiple, height, width)

    # Text and pictures --------------------------------------------------------------------------------------

    def tokenize(self, pipeline: Pipeline, prompts: list[str]) -> Tokens:
        return answers.tokenize(self.facts, pipeline, prompts)

    @abstractmethod
    def encode_tokens(self, pipeline: Pipeline, tokens: Tokens) -> Conditioning: ...

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        return self.encode_tokens(pipeline, self.tokenize(pipeline, prompts))

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        return vae.encode_image(pipeline, pixels)

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        return vae.decode(pipeline, latents)

    def conditioning(
        self, encoded: Conditioning, frame: Tensor, guidance: float | None = None
    ) -> Conditioning:
        return encoded

    def middle(self, denoiser: Any) -> Middle | None:
        return None

    # Drawing ------------------------------------------------------------------------------------------------

    def cfg_scale(self, pipeline: Pipeline, guidance: float) -> float | None:
        return answers.cfg_scale(guidance)

    def picture_state(self, output: Any) -> Tensor | None:
        return answers.first_state(output)

    # Fewer blocks -------------------------------------------------------------------------------------------

    def removable(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        return {}

    def layouts(self, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
        return {}

    def without(self, denoiser: nn.Module, gone: Collection[str]) -> nn.Module:
        raise NotImplementedError(f"nothing of a {type(denoiser).__name__} may leave")
