"""Samplers that can stand in for a model's own: what diffusers calls them, and what each has to be told."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tunekit.config import SamplingConfig
from tunekit.errors import TunekitError

if TYPE_CHECKING:
    from tunekit.families.family import FamilyFacts
    from tunekit.runtime import Runtime

Sampler = Literal["ddim", "euler", "heun", "dpm++2m", "dpm++2m_karras", "unipc", "lcm"]
Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: tuple[Spacing, ...] = ("trailing", "leading")
"""Those that are tried: linspace is within a timestep of trailing, but for the first."""

OWN = "own"
LCM_GUIDANCE = (1.0, 1.5)
"""Of latent consistency, whose few steps overshoot with more (Luo et al. 2023, arXiv:2310.04378). Without
any, a step is one call, and a model that knows its pictures well draws them so."""
KEPT = ("prediction_type", "rescale_betas_zero_snr", "trained_betas")
"""Keys of a model's sampler that say what it has learned: a class that does not know one cannot draw it."""


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        discrete: class for models that predict noise, velocity or the picture; "" for none.
        flow: class for models of flow matching; "" for none.
        keys: of its configuration.
        is_spaced: whether timesteps of a discrete model may be spread otherwise.
        equals: row whose pictures of discrete models are the same; tried only where it is named.
        guidance: that it is tried with instead of a larger one of the model's own.
    """

    discrete: str = ""
    flow: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    is_spaced: bool = True
    equals: str = ""
    guidance: tuple[float, ...] = ()


_DPM, _FLOW = "DPMSolverMultistepScheduler", "FlowMatch{}DiscreteScheduler"
TABLE: dict[str, Kind] = {
    "lcm": Kind("LCMScheduler", is_spaced=False, guidance=LCM_GUIDANCE),
    "unipc": Kind("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "dpm++2m": Kind(_DPM, _DPM),
    "ddim": Kind("DDIMScheduler", keys={"clip_sample": False}),  # latents are not within [-1, 1]
    "euler": Kind("EulerDiscreteScheduler", _FLOW.format("Euler"), equals="ddim"),
    "heun": Kind("HeunDiscreteScheduler", _FLOW.format("Heun")),
    "dpm++2m_karras": Kind(_DPM, keys={"use_karras_sigmas": True}, is_spaced=False),
}
"""In the order they are tried: those first that need fewest steps as a rule."""


@dataclass(frozen=True)
class Candidate:
    """One way to draw.

    Attributes:
        name: for people.
        sampling: whole, but for its steps.
    """

    name: str
    sampling: SamplingConfig

    def at(self, steps: int, interval: tuple[float, float] | None = None) -> SamplingConfig:
        """In so many steps, with guidance in a part of them."""
        changes: dict[str, Any] = {"steps": steps}
        if interval is not None:
            changes["guidance_interval"] = interval
        return self.sampling.model_copy(update=changes)


def unsuited(names: Sequence[str], facts: FamilyFacts) -> str | None:
    """What to say of the first sampler that no model of a family can be drawn with; None if all suit."""
    flow = facts.of_role("scheduler")[0].classes.partition(":")[2].startswith("FlowMatch")
    known = [name for name, kind in TABLE.items() if (kind.flow if flow else kind.discrete)]
    for name in names:
        if name not in known:
            learned = "learned by flow matching" if flow else "did not learn by flow matching"
            return f'the sampler "{name}" does not suit {facts.title}, which {learned}; {", ".join(known)} do'
    return None


def candidates(
    runtime: Runtime, own: SamplingConfig, names: Sequence[str] | None, spacings: Sequence[Spacing] | None
) -> tuple[list[Candidate], list[str]]:
    """The model's own sampler, then all others that suit it; and why the rest of those named do not.

    Args:
        own: how the model is drawn with now; whole, but for the scheduler.
        names: rows of the table; None for all.
        spacings: of timesteps; None for the usual ones. The first of a class that has several.
    """
    from tunekit.diffusion.sampling import is_flow

    flow = is_flow(runtime.scheduler)
    found = {_identity(runtime, own): Candidate(OWN, own)}
    troubles = []
    usual = [name for name, kind in TABLE.items() if flow or not kind.equals]
    for name in usual if names is None else names:
        kind = TABLE[name]
        made = kind.flow if flow else kind.discrete
        if not made:
            continue  # said by `unsuited` where it was asked for
        guided = runtime.cfg_scale(own) is not None and (own.guidance or 0) > max(kind.guidance, default=0)
        ways = [
            (spacing, guidance)
            for spacing in ((spacings or SPACINGS) if kind.is_spaced and not flow else (None,))
            for guidance in ((kind.guidance if guided else ()) or (None,))
        ]
        for spacing, guidance in ways:
            changes: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
            try:
                changes["scheduler"] = _scheduler(
                    runtime.scheduler, own, made, {} if flow else kind.keys, spacing
                )
                sampling = own.model_copy(update=changes)
                title = _title(name, spacing, guidance)
                found.setdefault(_identity(runtime, sampling), Candidate(title, sampling))
            except TunekitError as error:
                troubles.append(f"{name} does not suit this model: {error.message}")
                break
    return list(found.values()), troubles


def _title(name: str, spacing: str | None, guidance: float | None) -> str:
    words = [name, *([spacing] if spacing else ())]
    return " ".join(words if guidance is None else [*words, f"guidance {guidance:g}"])


def _scheduler(
    scheduler: Any, own: SamplingConfig, made: str, keys: Mapping[str, Any], spacing: str | None
) -> dict[str, Any]:
    """`SamplingConfig.scheduler` of a class: what a model was told before, as far as the class knows it.

    Raises:
        ConfigError: it does not know what the model has learned.
    """
    from tunekit.diffusion.sampling import scheduler_class
    from tunekit.errors import ConfigError

    known = inspect.signature(scheduler_class(made).__init__).parameters
    before = {key: value for key, value in (own.scheduler or {}).items() if key != "class"}
    configured = {**scheduler.config, **before}
    for key in KEPT:
        if configured.get(key) and key not in known:
            raise ConfigError(f"{made} does not know {key}, which this model was trained with")
    if configured.get("use_dynamic_shifting") and "use_dynamic_shifting" not in known:
        raise ConfigError(f"{made} cannot shift its times by the size of the picture")
    told = {"class": made, **{key: value for key, value in before.items() if key in known}, **keys}
    if spacing is not None and "timestep_spacing" in known:
        told["timestep_spacing"] = spacing
    # The model's own ends at the least noise that was trained, not at none: so does its stand-in.
    if configured.get("set_alpha_to_one") is False and "final_sigmas_type" in known:
        told.setdefault("final_sigmas_type", "sigma_min")
    return told


def _identity(runtime: Runtime, sampling: SamplingConfig) -> str:
    """Equal for two ways that draw the same."""
    from tunekit.diffusion.sampling import sampler

    way = sampler(runtime.scheduler, sampling)
    config = {key: value for key, value in way.config.items() if not key.startswith("_")}
    return f"{type(way).__name__} {sampling.guidance} {json.dumps(config, sort_keys=True, default=str)}"


def calls(runtime: Runtime, sampling: SamplingConfig) -> int:
    """Calls of the denoiser for one picture; with guidance a step has two, with and without the prompt.

    Raises:
        ValueError: the sampler does not take so many steps.
    """
    import torch

    from tunekit.diffusion.sampling import Guided, sampler

    assert sampling.steps is not None
    way = sampler(runtime.scheduler, sampling)
    runtime.family.begin(way, sampling.steps, torch.zeros(1, *runtime.latent_shape(*runtime.size(sampling))))
    total = len(way.timesteps)
    if runtime.cfg_scale(sampling) is None:
        return total
    guided = Guided({}, 1.0, sampling.guidance_interval)
    return total + sum(guided.at(step, total) for step in range(total))
