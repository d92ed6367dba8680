"""The section `objective:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunekit.config.schema import Section, no_effect


class ObjectiveConfig(Section):
    """What the denoiser is asked to learn; what is null is as the base was trained."""

    timesteps: Literal["uniform", "logit_normal"] | None = None
    """How noise levels are drawn; null is uniform, or what a family of flow matching was trained with."""
    shift: Annotated[float, Field(gt=0, le=1000)] | Literal["resolution"] | None = None
    """Of flow matching: more than 1 draws more noise, as larger pictures need; "resolution" follows their
    size, in families that do so."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the base predicts, for a base whose scheduler does not say it, such as a merge in one file."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep is noise alone, for a base whose scheduler does not say it."""
    snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """min-SNR loss weighting; 5 is usual."""
    noise_offset: float = Field(0.0, ge=0, le=100)
    """Noise added to each channel as a whole, so that dark and bright pictures are learned; 0.05 is usual."""
    loss: Literal["mse", "huber"] = "mse"
    """huber counts errors above huber_delta linearly, so that odd pictures matter less."""
    huber_delta: float = Field(0.1, gt=0, le=1e6)
    """Error from which the huber loss is linear."""

    @model_validator(mode="after")
    def _effects(self) -> ObjectiveConfig:
        if self.loss != "huber":
            no_effect(self, ("huber_delta",), "loss is not huber")
        return self
