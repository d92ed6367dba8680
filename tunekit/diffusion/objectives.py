"""How noise is added, what the denoiser is asked to predict, and how much each timestep counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunekit.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """The discrete variance-preserving objective of DDPM and Stable Diffusion.

    Attributes:
        prediction_type: "epsilon" (the noise), "v_prediction" or "sample" (the clean latents).
        alphas_cumprod: [T] float32, the share of signal power left at each timestep.
        snr_gamma: clamp of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); None weighs all
            timesteps 1.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f'unknown prediction type "{self.prediction_type}" in the scheduler',
                hint=f"this objective knows {', '.join(PREDICTION_TYPES)}",
            )

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], *, snr_gamma: float | None = None) -> Objective:
        """Read the noise schedule from a diffusers scheduler's config; samplers share the training keys."""
        from diffusers import DDPMScheduler

        # The sampler of training; it also rescales betas to zero terminal SNR where the config says so.
        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(scheduler.config.prediction_type, scheduler.alphas_cumprod.float(), snr_gamma)

    @property
    def num_train_timesteps(self) -> int:
        """Length of the noise schedule."""
        return len(self.alphas_cumprod)

    def draw_timesteps(self, generator: torch.Generator) -> int:
        """Draw one timestep, uniform in [0, num_train_timesteps)."""
        return int(torch.randint(self.num_train_timesteps, (), generator=generator))

    def sample(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise and say what has to be predicted.

        Args:
            latents: [B, ...] scaled clean latents.
            noise: [B, ...] standard normal.
            timesteps: [B] integers.

        Returns:
            noisy latents [B, ...], target [B, ...] and the loss weight [B] of each sample.
        """
        alpha = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, *[1] * (latents.ndim - 1))
        signal, sigma = alpha.sqrt().to(latents.dtype), (1 - alpha).sqrt().to(latents.dtype)
        noisy = signal * latents + sigma * noise
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = signal * noise - sigma * latents
        else:
            target = latents
        return noisy, target, self.weight(timesteps)

    def weight(self, timesteps: Tensor) -> Tensor:
        """Return the min-SNR weight of each timestep, [B] float32."""
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha / (1 - alpha)
        if self.prediction_type == "epsilon":
            # min(snr, g) / snr without its 0/0: a zero-terminal schedule has snr = 0, where the quotient
            # is 1.
            return (self.snr_gamma / snr).clamp(max=1)
        clamped = snr.clamp(max=self.snr_gamma)
        return clamped / (snr + 1) if self.prediction_type == "v_prediction" else clamped
