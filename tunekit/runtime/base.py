"""What every runtime offers, and torch, which is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tunekit import hardware
from tunekit.artifacts import Artifact
from tunekit.config import RuntimeConfig, SamplingConfig
from tunekit.diffusion.sampling import Denoise, Guided
from tunekit.errors import ConfigError
from tunekit.families.family import DTYPES, Conditioning, Family, Frame, Middle, Pipeline, as_kept
from tunekit.families.prompts import cuts, tokenizers
from tunekit.runtime.step_cache import Split, StepCache, TorchSplit
from tunekit.runtime.tiles import decode_in_tiles

KEPT_BYTES = 64_000_000
"""Of encoded prompts that a runtime keeps: 400 of SD 1.5's, 8 of T5-XXL's."""


@dataclass
class Runtime:
    """A model that is ready to run. Tensors go in and come out on the CPU, in float32.

    Attributes:
        family: what kind of model it is.
        pipeline: a diffusers pipeline, or graphs that stand in for its components.
        title: what runs it, for people: "torch fp32 cpu", "onnxruntime CPUExecutionProvider".
        artifact: where it came from; None for a pipeline that is only in memory.
        threads: CPU threads, None for the library's own choice.
        tiled: decode pictures larger than the model's own in tiles, which takes less memory.
        settings: of the artifact, where they were measured with this runtime on this machine.
        reopen: opens the denoiser once more, run otherwise; None where there is no choice.
        take_apart: makes of the denoiser one whose middle can be left out; None where nothing can.
    """

    family: Family
    pipeline: Pipeline
    title: str
    artifact: Artifact | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    tiled: bool = False
    settings: RuntimeConfig | None = None
    reopen: Callable[[RuntimeConfig], Any] | None = None
    take_apart: Callable[[Runtime, Middle], Split] | None = None
    _split: Split | None = field(default=None, init=False, repr=False)
    _encoded: dict[str, Conditioning] = field(default_factory=dict, init=False, repr=False)
    """By prompt, those that were used last in the end."""

    def with_settings(self, settings: RuntimeConfig) -> Runtime:
        """The same, whose denoiser is opened once more and run otherwise; all else is shared.

        Raises:
            ConfigError: this runtime has no choice.
        """
        if self.reopen is None:
            raise ConfigError(f"{self.title} has no settings to choose")
        pipeline = copy.copy(self.pipeline)
        setattr(pipeline, self.family.facts.denoiser_name, self.reopen(settings))
        return replace(self, pipeline=pipeline, settings=settings, threads=settings.threads or self.threads)

    def in_rows(self, rows: int | None) -> Runtime:
        """The same graphs, the denoiser given at most so many rows at once; None: as many as there are."""
        name = self.family.facts.denoiser_name
        pipeline, denoiser = copy.copy(self.pipeline), copy.copy(getattr(self.pipeline, name))
        denoiser.graph = copy.copy(denoiser.graph)
        denoiser.graph.max_rows = rows
        setattr(pipeline, name, denoiser)
        settings = self.settings.model_copy(update={"rows": rows}) if self.settings else None
        return replace(self, pipeline=pipeline, settings=settings)

    @property
    def scheduler(self) -> Any:
        """The sampler that the model is configured with."""
        return self.pipeline.scheduler

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""
        return self.family.default_size(self.pipeline)

    @property
    def sampling(self) -> SamplingConfig:
        """How it is drawn with where nobody says otherwise: as the artifact, then the family says."""
        height, width = self.default_size
        own = self.artifact.sampling if self.artifact else None
        distilled = self.family.is_distilled(self.pipeline)
        usual = self.family.facts.usual_sampling(distilled=distilled).over(SamplingConfig(negative_prompt=""))
        whole = own.over(usual) if own else usual
        return whole.model_copy(update={"height": whole.height or height, "width": whole.width or width})

    def size(self, sampling: SamplingConfig) -> tuple[int, int]:
        """(height, width) in pixels of pictures that are drawn so."""
        height, width = self.default_size
        return sampling.height or height, sampling.width or width

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """[C, h, w] of one picture of `height` x `width` pixels."""
        return self.family.latent_shape(self.pipeline, height, width)

    def encode_prompt(self, prompts: list[str]) -> Conditioning:
        """Encode prompts; dim 0 of every tensor is len(prompts)."""
        with self._running():
            conditioning = self.family.encode_prompt(self.pipeline, prompts)
        return {key: value.cpu() for key, value in as_kept(conditioning).items()}

    def conditioning(self, prompts: list[str], sampling: SamplingConfig) -> Conditioning:
        """Encode prompts for pictures of the size and guidance that `sampling` says, none of them None.

        What the text encoders give is kept, so that many pictures of a prompt take them one call. Whoever
        changes the pipeline's text encoders calls `forget_prompts`.
        """
        encoded = self._told(prompts)
        frames = Frame.whole(*self.size(sampling)).rows(len(prompts))
        return self.family.conditioning(encoded, frames, sampling.guidance)

    def forget_prompts(self) -> None:
        """Lets go of what text encoders gave."""
        self._encoded.clear()

    def _told(self, prompts: list[str]) -> Conditioning:
        """As `encode_prompt`, of each prompt once."""
        wanted = dict.fromkeys(prompts)
        found = {prompt: self._encoded.pop(prompt) for prompt in wanted if prompt in self._encoded}
        if new := [prompt for prompt in wanted if prompt not in found]:
            made = self.encode_prompt(new)
            for row, prompt in enumerate(new):
                found[prompt] = {name: value[row : row + 1].clone() for name, value in made.items()}
        self._encoded |= found
        sizes = {
            prompt: sum(value.nbytes for value in kept.values()) for prompt, kept in self._encoded.items()
        }
        total = sum(sizes.values())
        for prompt, size in sizes.items():  # the least used first
            if total <= KEPT_BYTES:
                break
            del self._encoded[prompt]
            total -= size
        return {name: torch.cat([found[prompt][name] for prompt in prompts]) for name in found[prompts[0]]}

    def cfg_scale(self, sampling: SamplingConfig) -> float | None:
        """See `Family.cfg_scale`."""
        assert sampling.guidance is not None
        return self.family.cfg_scale(self.pipeline, sampling.guidance)

    def guided(self, prompts: int, sampling: SamplingConfig) -> Guided | None:
        """Guidance of as many prompts with the negative prompt, as `sampling` says, of which none is None."""
        scale = self.cfg_scale(sampling)
        if scale is None:
            return None
        negative = self.conditioning([sampling.negative_prompt or ""] * prompts, sampling)
        return Guided(negative, scale, sampling.guidance_interval)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [-1, 1] to scaled mean and std, [B, 2C, h, w]."""
        with self._running():
            return self.family.encode_image(self.pipeline, pixels).cpu()

    def denoise(self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning) -> Tensor:
        """Run the denoiser on latents [B, C, h, w] at one timestep or [B] of them."""
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(latents))
        denoiser = self.family.denoiser(self.pipeline)
        with self._running():
            rows, known = latents.to(self.device, self.dtype), self._to_device(conditioning)
            return self.family.denoise(denoiser, rows, times.to(self.device), known).float().cpu()

    def denoiser(self, sampling: SamplingConfig) -> Denoise:
        """What one drawing calls in each of its steps; keeps of a step what `sampling` says.

        Raises:
            ConfigError: steps shall take the middle of the denoiser from another, and this has none.
        """
        if sampling.cache is None:
            return self.denoise
        if self._split is None:
            middle = self.family.middle(self.family.denoiser(self.pipeline))
            if self.take_apart is None or middle is None:
                raise ConfigError(
                    f"steps cannot be cached with {self.title}: {self.family.facts.title} has no part there"
                    " that could be taken from another step",
                    hint="leave out cache, under sampling or preview",
                )
            self._split = self.take_apart(self, middle)
        return StepCache(self.denoise, self._split, sampling.cache)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to pixels [B, 3, H, W] in [0, 1]."""
        with self._running():
            decode = partial(self.family.decode, self.pipeline)
            if self.tiled:
                tile = self.latent_shape(*self.default_size)[1:]
                return decode_in_tiles(decode, latents.to(self.device), tile)
            return decode(latents.to(self.device)).cpu()

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is too long for a text encoder, which does not read it; "" if it fits."""
        found = cuts(tokenizers(self.family.facts, self.pipeline), [prompt])
        return found[0].lost if found else ""

    def close(self) -> None:
        """Let go of the model's memory."""
        self.pipeline = None
        self.forget_prompts()

    def _to_device(self, conditioning: Conditioning) -> Conditioning:
        keeps = self.family.facts.denoiser.keeps
        return {
            key: value.to(self.device, self.dtype)
            if value.is_floating_point() and key not in keeps
            else value.to(self.device)
            for key, value in conditioning.items()
        }

    def _running(self) -> torch.no_grad:
        # Of the process, so it is set again before each use: another runtime may have set its own.
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        return torch.no_grad()


def settings_here(artifact: Artifact | None, title: str) -> RuntimeConfig | None:
    """The settings of an artifact, where they were measured with this runtime on this machine."""
    found = artifact.runtime if artifact else None
    return found if found and (found.runtime, found.machine) == (title, hardware.machine()) else None


def torch_runtime(
    family: Family,
    pipeline: Pipeline,
    *,
    artifact: Artifact | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
) -> Runtime:
    """Run a pipeline that is in memory, on `device`; `dtype` is that of its denoiser if not given."""
    if torch.device(device) != pipeline.device:
        pipeline.to(device)
    dtype = dtype or cast(torch.dtype, family.denoiser(pipeline).dtype)
    name = {value: key for key, value in DTYPES.items()}.get(dtype, str(dtype))
    return Runtime(
        family,
        pipeline,
        f"torch {name} {device}",
        artifact,
        torch.device(device),
        dtype,
        threads,
        take_apart=lambda runtime, middle: TorchSplit(family.denoiser(runtime.pipeline), middle),
    )
