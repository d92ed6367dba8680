"""What a model family answers. Shared behaviour is functions (`loading`, here), not a base class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunekit.diffusion.objectives import Objective

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides latents and time, keyed by its own keyword names; batched along dim 0."""

Pipeline = Any
"""A diffusers pipeline, or anything with its components as attributes (the ONNX runtime makes such)."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FamilyFacts:
    """Constants of a family.

    Attributes:
        title: for people, e.g. "Stable Diffusion 1.x".
        pipeline_classes: `_class_name`s of model_index.json that this family loads; the first is the one
            it makes.
        denoiser_name: attribute of the pipeline that is trained; also the prefix of its keys in PEFT files.
        encoders: (tokenizer attribute, text encoder attribute) pairs.
        kohya_prefixes: component -> prefixes of its keys in kohya files; the first is written, all are read.
        ss_base_model_version: what kohya's tools write for this base, e.g. "sd_v1".
        modelspec_architecture: of modelspec 1.0.1, without "/lora", e.g. "stable-diffusion-v1".
        default_source: hub id of the usual base.
        fp32_components: names of export components that overflow in fp16, such as SDXL's VAE.
    """

    title: str
    pipeline_classes: tuple[str, ...]
    denoiser_name: str
    encoders: tuple[tuple[str, str], ...]
    kohya_prefixes: Mapping[str, tuple[str, ...]]
    ss_base_model_version: str
    modelspec_architecture: str
    default_source: str
    fp32_components: tuple[str, ...] = ()

    @property
    def pipeline_class(self) -> str:
        return self.pipeline_classes[0]


@dataclass(frozen=True)
class ExportComponent:
    """One graph to export: a module with positional tensor inputs, and everything an exporter must know.

    Attributes:
        name: folder of the component, e.g. "unet".
        module: takes `inputs` in order, returns a tensor or a tuple in the order of `outputs`.
        inputs: name -> example tensor, on the CPU.
        dynamic: input name -> {dim: axis name}; equal axis names are equal sizes within one component.
        outputs: names.
        config: written as config.json beside the graph.
        multiples: axis name -> number that its size is always divisible by, where it is not 1.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: list[str]
    config: dict[str, Any]
    multiples: dict[str, int] = field(default_factory=dict)


class Family(Protocol):
    """A model family. Methods take the pipeline (or the denoiser) and keep no state."""

    name: str
    facts: FamilyFacts
    lora_targets: tuple[str, ...]

    def load(
        self,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> Pipeline:
        """Load a pipeline on the CPU, in eval mode.

        Args:
            source: folder, hub id, single file, "builtin/..." or "tiny".
            dtype: of all weights that are not packed.
            revision: of a hub id.
            variant: of a folder's or hub id's files, e.g. "fp16".
            allow_pickle: open .bin and .ckpt files, and then nothing in them but weights.

        Raises:
            ModelError: nothing there, not this family, pickled or non-finite weights.
        """
        ...

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        """Write the pipeline in diffusers' layout and its own dtype, pruned and quantized layers too."""
        ...

    def tiny(self, seed: int = 0) -> Pipeline:
        """Build the smallest pipeline that runs all code of the family, with random weights from `seed`."""
        ...

    def denoiser(self, pipeline: Pipeline) -> nn.Module:
        """Return the network that is trained."""
        ...

    def objective(self, pipeline: Pipeline, *, snr_gamma: float | None = None) -> Objective:
        """Return the objective that the pipeline's scheduler was configured for."""
        ...

    def default_size(self, pipeline: Pipeline) -> tuple[int, int]:
        """Return the (height, width) in pixels the model was made for."""
        ...

    def latent_shape(self, pipeline: Pipeline, height: int, width: int) -> tuple[int, int, int]:
        """Return [C, h, w] of one picture's latents.

        Raises:
            ConfigError: the size is not a multiple of `resolution_multiple`.
        """
        ...

    def resolution_multiple(self, pipeline: Pipeline) -> int:
        """Return the number that height and width in pixels have to be divisible by."""
        ...

    def encode_prompt(self, pipeline: Pipeline, prompts: list[str]) -> Conditioning:
        """Encode prompts; every tensor has dim 0 of len(prompts) and lies where the encoders are."""
        ...

    def encode_image(self, pipeline: Pipeline, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] to [B, 2C, h, w] float32: scaled mean, then scaled std."""
        ...

    def decode(self, pipeline: Pipeline, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [0, 1], float32."""
        ...

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Run the denoiser on noisy latents [B, C, h, w] at timesteps [B] (or [1] for all)."""
        ...

    def blocks(self, denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the denoiser's large blocks, (module path, module), in the order they run."""
        ...

    def export_components(self, pipeline: Pipeline) -> list[ExportComponent]:
        """Return the graphs that make up the pipeline, in the layout that Optimum and diffusers expect."""
        ...
