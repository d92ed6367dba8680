"""From noise to latents, with any diffusers scheduler and any denoiser that can be called."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunekit import install
from tunekit.config import SamplingConfig
from tunekit.errors import ConfigError, MissingPackageError, did_you_mean

__all__ = [
    "Begin",
    "Denoise",
    "Guided",
    "SamplingConfig",
    "Step",
    "initial_latents",
    "sample",
    "sample_steps",
    "sampler",
    "scheduler_class",
]

Conditioning = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents [B, C, h, w], timesteps [B], conditioning) -> prediction [B, C, h, w]."""
Begin = Callable[[Any, int, Tensor], Tensor]
"""(fresh scheduler, steps, unit noise) -> the latents it starts from; see `Family.begin`."""


class Guided(NamedTuple):
    """Classifier-free guidance: without + scale * (with the prompt - without)."""

    negative: Conditioning
    """Of the negative prompts, dim 0 of all tensors is the batch."""
    scale: float
    """See `Family.cfg_scale`."""
    interval: tuple[float, float] | None = None
    """From which share of the steps to which it is on (Kynkaanniemi et al. 2024, arXiv:2404.07724); None: in
    all."""

    def at(self, step: int, total: int) -> bool:
        """Whether it is on in a step, counted from 0."""
        low, high = self.interval or (0.0, 1.0)
        return low <= step / total < high


ZERO_SNR = "rescale_betas_zero_snr"
"""Key of the schedulers that can end in noise alone."""


def initial_latents(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw unit noise [B, *shape], float32 on the CPU, each picture from its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def scheduler_class(name: str) -> Any:
    """A scheduler of diffusers by its name.

    Raises:
        ConfigError: there is none.
        MissingPackageError: it needs a package that is not installed.
    """
    import diffusers

    made = getattr(diffusers, name, None)
    for package in getattr(made, "_backends", ()):  # of those that diffusers shows and cannot use
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"the scheduler {name} needs the package {package}, which is not installed",
                hint=f"{install.pip()} {package}; or choose another, such as EulerDiscreteScheduler",
            )
    if not hasattr(made, "set_timesteps"):
        raise ConfigError(
            f'diffusers has no scheduler "{name}"', hint="such as EulerDiscreteScheduler or LCMScheduler"
        )
    return made


def sampler(scheduler: Any, sampling: SamplingConfig) -> Any:
    """A fresh sampler, configured like `scheduler` but for what `sampling.scheduler` says.

    Where no class is named and the model's own does not know of zero terminal SNR, it is DDIM.

    Raises:
        ConfigError: a class that diffusers does not have, or a key that the class does not have.
    """
    import diffusers

    changes = dict(sampling.scheduler or {})
    made: Any = type(scheduler)
    if name := changes.pop("class", None):
        made = scheduler_class(str(name))
    known = inspect.signature(made.__init__).parameters
    if name:
        changes = {**_flow_keys(scheduler, made), **changes}
    if ZERO_SNR not in known and ZERO_SNR in changes:
        if not changes[ZERO_SNR]:
            del changes[ZERO_SNR]  # it has no such schedule anyway
        elif not name:
            made = diffusers.DDIMScheduler
            known = inspect.signature(made.__init__).parameters
            changes.setdefault("clip_sample", False)  # latents are not within [-1, 1]
    for key in changes:
        if key not in known:
            own = [parameter for parameter in known if parameter != "self"]
            raise ConfigError(
                f'{made.__name__} has no key "{key}"',
                hint=did_you_mean(key, own) or f"known: {', '.join(own)}",
            )
    return made.from_config(scheduler.config, **changes)


def is_flow(scheduler: Any) -> bool:
    """Whether a sampler is one for flow matching, or configured for it."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def _flow_keys(scheduler: Any, made: Any) -> dict[str, Any]:
    """What another class of sampler has to be told, so that it draws what flow matching has learned.

    Raises:
        ConfigError: it is for the other kind of diffusion.
    """
    own, needed = made.__name__.startswith("FlowMatch"), is_flow(scheduler)
    if needed and not own:
        if "use_flow_sigmas" not in inspect.signature(made.__init__).parameters:
            raise ConfigError(
                f"{made.__name__} is no sampler of flow matching, which this model was trained with",
                hint="such as FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler",
            )
        shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
        return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    if own and not needed:
        raise ConfigError(
            f"{made.__name__} is a sampler of flow matching, and this model was not trained with it",
            hint="such as EulerDiscreteScheduler or DPMSolverMultistepScheduler",
        )
    return {}


def sample(
    denoise: Denoise,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    guided: Guided | None,
    sampling: SamplingConfig,
    *,
    begin: Begin,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Denoise unit noise to scaled latents, step for step as diffusers' pipelines do.

    Args:
        denoise: the denoiser; called once per step, where guidance is on, on 2B rows: negative first.
        scheduler: a configured diffusers scheduler; a fresh copy is used, so it keeps no state between calls.
        latents: [B, C, h, w] from `initial_latents`.
        conditioning: of the prompts, dim 0 is B.
        guided: classifier-free guidance, dim 0 of its conditioning is B too; None means none.
        sampling: reads steps and scheduler; steps are not None.
        begin: sets the sampler's timesteps, see `Family.begin`.
        seeds: of the pictures. A sampler that adds noise while it runs draws each picture's from its own
            seed, going on after `initial_latents`; without seeds it is taken from the global random state.
    """
    taken = sample_steps(
        denoise, scheduler, latents, conditioning, guided, sampling, begin=begin, seeds=seeds
    )
    for step in taken:
        latents = step.latents
    return latents


class Step(NamedTuple):
    """Where sampling is."""

    done: int
    """Steps done, counted from 1."""
    total: int
    """All steps; some samplers call the denoiser more often than was asked for, and so count more."""
    latents: Tensor
    """[B, C, h, w] after it."""


@torch.no_grad()
def sample_steps(
    denoise: Denoise,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    guided: Guided | None,
    sampling: SamplingConfig,
    *,
    begin: Begin,
    seeds: Sequence[int] | None = None,
) -> Iterator[Step]:
    """`sample`, one step at a time."""
    assert sampling.steps is not None
    scheduler = sampler(scheduler, sampling)
    options = _step_options(scheduler, latents, seeds)
    latents = begin(scheduler, sampling.steps, latents)
    both = conditioning
    if guided is not None:
        both = {key: torch.cat([guided.negative[key], value]) for key, value in conditioning.items()}
    total = len(scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps):
        scale = guided.scale if guided is not None and guided.at(i, total) else None
        rows = latents if scale is None else torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):  # those for flow matching have none
            rows = scheduler.scale_model_input(rows, timestep)
        told = conditioning if scale is None else both
        prediction = denoise(rows, timestep.float().expand(len(rows)), told)
        if scale is not None:
            without, with_prompt = prediction.chunk(2)
            prediction = without + scale * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        yield Step(i + 1, total, latents)


def _step_options(scheduler: Any, latents: Tensor, seeds: Sequence[int] | None) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "generator" in known and seeds is not None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for generator in generators:
            torch.randn(latents.shape[1:], generator=generator)  # what initial_latents has used up
        options["generator"] = generators
    return options
