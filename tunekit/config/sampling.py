"""How a picture is drawn: a part of `preview:`, and of artifact.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tunekit.config.schema import Multiple, SamplingSteps, Section, Text, refuse

Share = Annotated[float, Field(ge=0, le=1)]


def _some(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] >= value[1]:
        refuse("must begin before it ends; leave guidance out with guidance: 1 instead")
    return value


class CacheConfig(Section):
    """Steps that take what the middle of the denoiser gave in an earlier step."""

    interval: int = Field(ge=2, le=100)
    """Every so many-th step runs the whole denoiser, the steps between its outer blocks alone."""
    order: Literal[0, 1] = 0
    """0: what the middle gave last; 1: carried on in a straight line from the last two times."""


class SamplingConfig(Section):
    """How a picture is drawn; what is null is the model's own."""

    steps: SamplingSteps | None = None
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Guidance scale as the family counts it; of classifier-free guidance, up to 1 is none in most."""
    guidance_interval: Annotated[tuple[Share, Share], AfterValidator(_some)] | None = None
    """From which share of the sampling steps to which guidance is on, such as [0, 0.6]; the other steps run
    the denoiser once each, not twice. null: in all."""
    negative_prompt: Text | None = None
    """What the pictures should not show."""
    height: Multiple | None = None
    """In pixels."""
    width: Multiple | None = None
    """In pixels."""
    scheduler: dict[str, Any] | None = None
    """Keys of the sampler's configuration that differ from the model's; `class` names another sampler."""
    cache: CacheConfig | None = None
    """Steps that reuse what the middle of the denoiser gave; null: every step runs all of it, as previews
    while a model is trained always do."""

    def over(self, other: SamplingConfig | None) -> SamplingConfig:
        """This one, with what it leaves open taken from another."""
        if other is None:
            return self
        known = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        return SamplingConfig(
            **{name: getattr(other, name) if value is None else value for name, value in known.items()}
        )
