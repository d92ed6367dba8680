"""How noise is added, what the denoiser is asked to predict, and how much each timestep counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tunekit.config import ObjectiveConfig, SamplingConfig
from tunekit.diffusion.sampling import is_flow, sampler
from tunekit.errors import ConfigError, ModelError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Noised(NamedTuple):
    """Rows that are ready for the denoiser, and what is wanted of it."""

    noisy: Tensor
    """[B, ...] latents with noise."""
    timesteps: Tensor
    """[B] float32, in [0, 1000): how much noise, as the family's scheduler counts."""
    target: Tensor
    """[B, ...] what has to be predicted."""
    weight: Tensor
    """[B] float32: how much each row counts."""


class Chance(Protocol):
    """What is drawn for a sample. Every draw takes a generator, so that it can belong to it."""

    def draw(
        self, generator: torch.Generator, latents: tuple[int, ...], shape: tuple[int, ...] = ()
    ) -> Tensor:
        """Draw timesteps, float32 in [0, num_train_timesteps).

        Args:
            latents: [C, h, w] of the sample that they are for.
            shape: of what is drawn.
        """
        ...

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """Draw noise for one sample's latents."""
        ...


class Objective(Chance, Protocol):
    """What is learned."""

    @property
    def num_train_timesteps(self) -> int:
        """Length of the noise schedule, in timesteps."""
        ...

    @property
    def clean(self) -> float:
        """The timestep of latents without noise."""
        ...

    def level(self, share: float) -> float:
        """The timestep at a share in [0, 1) of the schedule, however unevenly training draws them."""
        ...

    def between(self, first: float, last: float, count: int) -> list[float]:
        """`count` timesteps from `first` on, evenly as far as there are such; `last` would be the next."""
        ...

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the latents and of the noise is in noisy ones: [B] -> [B], [B], float32.

        Args:
            timesteps: [B], `clean` included.
        """
        ...

    def apart(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the noise [B, ...] that noisy ones are made of, if the prediction is right."""
        ...

    def sample(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Add noise and say what has to be predicted.

        Args:
            latents: [B, ...] scaled clean latents.
            noise: [B, ...] from `noise`.
            timesteps: [B] float32 from `draw`.
        """
        ...

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The error of each row times its weight: [B, ...], [B, ...], [B] -> [B], in float32."""
        ...

    def plain(self) -> Objective:
        """The same without what a user may change about loss and noise, for figures that are compared."""
        ...


@dataclass(frozen=True)
class Discrete:
    """The discrete variance-preserving objective of DDPM and Stable Diffusion.

    Attributes:
        prediction_type: "epsilon" (the noise), "v_prediction" or "sample" (the clean latents).
        alphas_cumprod: [T] float32, the share of signal power left at each timestep.
        config: reads snr_gamma (min-SNR weighting, Hang et al. 2023, arXiv:2303.09556), noise_offset and the
            kind of loss.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    config: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f'unknown prediction type "{self.prediction_type}" in the scheduler',
                hint=f"this objective knows {', '.join(PREDICTION_TYPES)}",
            )
        for key in ("timesteps", "shift"):
            if getattr(self.config, key) not in (None, "uniform"):
                raise ConfigError(
                    f"objective.{key} has no effect: this model family has a discrete noise schedule",
                    hint="it is for families of flow matching",
                )

    @classmethod
    def from_scheduler(cls, scheduler: Any, config: ObjectiveConfig | None = None) -> Discrete:
        """Read the noise schedule from a diffusers scheduler; samplers share the training keys.

        Raises:
            ModelError: a scheduler that has no such schedule (flow matching, EDM).
        """
        from diffusers import DDPMScheduler

        settings: Mapping[str, Any] = dict(scheduler.config)
        name = type(scheduler).__name__
        flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
        if flow or "beta_schedule" not in settings:
            raise ModelError(
                f"its scheduler is {name}{' with flow sigmas' if flow else ''}, which has no discrete noise"
                " schedule of a variance-preserving diffusion",
                hint="a model of flow matching belongs to another family: check model.family",
            )
        # The sampler of training; it also rescales betas to zero terminal SNR where the config says so.
        training = DDPMScheduler.from_config(settings)
        return cls(
            training.config.prediction_type, training.alphas_cumprod.float(), config or ObjectiveConfig()
        )

    @property
    def num_train_timesteps(self) -> int:
        """Length of the noise schedule."""
        return len(self.alphas_cumprod)

    def draw(
        self, generator: torch.Generator, latents: tuple[int, ...], shape: tuple[int, ...] = ()
    ) -> Tensor:
        """Uniform whole numbers in [0, num_train_timesteps), float32."""
        return torch.randint(self.num_train_timesteps, shape, generator=generator).float()

    def level(self, share: float) -> float:
        """See `Objective.level`."""
        return float(int(share * self.num_train_timesteps))

    @property
    def clean(self) -> float:
        """One before the first timestep."""
        return -1.0

    def between(self, first: float, last: float, count: int) -> list[float]:
        """See `Objective.between`; whole numbers."""
        return [float(round(first + (last - first) * index / count)) for index in range(count)]

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.levels`."""
        alpha = torch.where(timesteps < 0, 1.0, self._alpha(timesteps.clamp(min=0)))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def apart(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.apart`; of noise alone epsilon says nothing, and of no noise sample."""
        signal, sigma = (_as_rows(part, noisy) for part in self.levels(timesteps))
        if self.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / signal, prediction
        if self.prediction_type == "v_prediction":
            return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy
        return prediction, (noisy - signal * prediction) / sigma

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """Standard normal and, with `noise_offset`, a constant per channel.

        https://www.crosslabs.org/blog/diffusion-with-offset-noise
        """
        return _offset_noise(generator, shape, self.config.noise_offset)

    def sample(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """See `Objective.sample`; timesteps are whole numbers."""
        alpha = self._alpha(timesteps).view(-1, *[1] * (latents.ndim - 1))
        signal, sigma = alpha.sqrt().to(latents.dtype), (1 - alpha).sqrt().to(latents.dtype)
        noisy = signal * latents + sigma * noise
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = signal * noise - sigma * latents
        else:
            target = latents
        return Noised(noisy, timesteps, target, self.weight(timesteps))

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """See `Objective.loss`."""
        return _weighted(self.config, prediction, target, weight)

    def plain(self) -> Discrete:
        """See `Objective.plain`."""
        return replace(self, config=ObjectiveConfig())

    def weight(self, timesteps: Tensor) -> Tensor:
        """Return the min-SNR weight of each timestep, [B] float32."""
        gamma = self.config.snr_gamma
        if gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alpha = self._alpha(timesteps)
        snr = alpha / (1 - alpha)
        if self.prediction_type == "epsilon":
            # min(snr, g) / snr without its 0/0: a zero-terminal schedule has snr = 0, where the quotient
            # is 1.
            return (gamma / snr).clamp(max=1)
        clamped = snr.clamp(max=gamma)
        return clamped / (snr + 1) if self.prediction_type == "v_prediction" else clamped

    def _alpha(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps.long()]


@dataclass(frozen=True)
class ShiftByTokens:
    """A shift that follows the size of a picture: its logarithm is linear in the number of tokens.

    Attributes:
        patch: latents along one side of a token.
        tokens: few and many.
        mus: the shift's logarithm at so many; beyond them the line goes on.
    """

    patch: int
    tokens: tuple[int, int] = (256, 4096)
    mus: tuple[float, float] = (0.5, 1.15)

    @classmethod
    def from_scheduler(cls, scheduler: Any, patch: int) -> ShiftByTokens:
        """As a scheduler of diffusers is configured, which draws pictures with it."""
        config: Mapping[str, Any] = dict(scheduler.config)
        few, many = (config.get(f"{end}_image_seq_len") for end in ("base", "max"))
        low, high = (config.get(f"{end}_shift") for end in ("base", "max"))
        usual = cls(patch)
        return cls(
            patch,
            (few or usual.tokens[0], many or usual.tokens[1]),
            (usual.mus[0] if low is None else low, usual.mus[1] if high is None else high),
        )

    def mu(self, latents: tuple[int, ...]) -> float:
        """The shift's logarithm for latents [..., h, w]."""
        count = latents[-2] * latents[-1] / self.patch**2
        (few, many), (low, high) = self.tokens, self.mus
        slope = (high - low) / (many - few)
        return slope * count + (low - slope * few)


@dataclass(frozen=True)
class FlowMatching:
    """The straight path from latents to noise (rectified flow; Liu et al. 2022, arXiv:2209.03003).

    Latents at time s in [0, 1] are (1 - s) latents + s noise, and noise - latents is predicted. Times are
    drawn as in Esser et al. 2024 (arXiv:2403.03206, section 3.1), then shifted (5.3.2).

    Attributes:
        shift: s becomes shift s / (1 + (shift - 1) s); None follows the size of the picture.
        by_tokens: how it follows it, in families that do.
        timesteps: "uniform" or "logit_normal", where the config does not say.
        config: reads timesteps, shift, noise_offset and the kind of loss.
        num_train_timesteps: what s = 1 is as a timestep.
    """

    shift: float | None = 1.0
    by_tokens: ShiftByTokens | None = None
    timesteps: str = "logit_normal"
    config: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        for key in ("snr_gamma", "prediction", "zero_terminal_snr"):
            if getattr(self.config, key) is not None:
                raise ConfigError(
                    f"objective.{key} has no effect: this model family learns by flow matching",
                    hint="it is for families with a discrete noise schedule",
                )
        if self.config.shift == "resolution" and self.by_tokens is None:
            raise ConfigError(
                "objective.shift: resolution is for families whose shift follows the size of a picture",
                hint="give a number, or leave it out",
            )

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        config: ObjectiveConfig | None = None,
        *,
        patch: int | None = None,
        shift: float | None = None,
        timesteps: str = "logit_normal",
    ) -> FlowMatching:
        """Check that a diffusers scheduler is one for flow matching, and read its shift.

        Args:
            patch: latents along one side of a token, in families whose shift may follow a picture's size;
                it does where the scheduler says `use_dynamic_shifting` and nobody says otherwise.
            shift: of the family's own training, where that is not the scheduler's.
            timesteps: "uniform" or "logit_normal", as the family was trained.

        Raises:
            ModelError: it is not.
        """
        settings: Mapping[str, Any] = dict(scheduler.config)
        name = type(scheduler).__name__
        if not is_flow(scheduler):
            raise ModelError(
                f"its scheduler is {name}, and this family learns by flow matching",
                hint="a model of discrete diffusion belongs to another family: check model.family",
            )
        own = settings.get("shift" if name.startswith("FlowMatch") else "flow_shift")
        dynamic = bool(settings.get("use_dynamic_shifting"))
        if shift is None and not (dynamic and patch):
            shift = 1.0 if dynamic else float(own or 1.0)
        return cls(
            shift,
            ShiftByTokens.from_scheduler(scheduler, patch) if patch else None,
            timesteps,
            config=config or ObjectiveConfig(),
            num_train_timesteps=int(settings.get("num_train_timesteps", 1000)),
        )

    def draw(
        self, generator: torch.Generator, latents: tuple[int, ...], shape: tuple[int, ...] = ()
    ) -> Tensor:
        """See `Objective.draw`; any real number."""
        if (self.config.timesteps or self.timesteps) == "uniform":
            share = torch.rand(shape, generator=generator)
        else:
            share = torch.randn(shape, generator=generator).sigmoid()
        return self._shifted(share, latents) * self.num_train_timesteps

    def level(self, share: float) -> float:
        """See `Objective.level`."""
        return share * self.num_train_timesteps

    @property
    def clean(self) -> float:
        """The start of the path."""
        return 0.0

    def between(self, first: float, last: float, count: int) -> list[float]:
        """See `Objective.between`."""
        return [first + (last - first) * index / count for index in range(count)]

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.levels`."""
        time = timesteps.float() / self.num_train_timesteps
        return 1 - time, time

    def apart(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.apart`."""
        rest, time = (_as_rows(part, noisy) for part in self.levels(timesteps))
        return noisy - time * prediction, noisy + rest * prediction

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """See `Discrete.noise`."""
        return _offset_noise(generator, shape, self.config.noise_offset)

    def sample(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """See `Objective.sample`."""
        time = (timesteps / self.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
        noisy = (1 - time) * latents + time * noise
        weight = torch.ones(timesteps.shape, device=timesteps.device)
        return Noised(noisy, timesteps, noise - latents, weight)

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """See `Objective.loss`."""
        return _weighted(self.config, prediction, target, weight)

    def plain(self) -> FlowMatching:
        """See `Objective.plain`."""
        return replace(self, config=ObjectiveConfig())

    def _shifted(self, share: Tensor, latents: tuple[int, ...]) -> Tensor:
        wanted = self.config.shift or self.shift or "resolution"
        if wanted == "resolution":
            assert self.by_tokens is not None
            wanted = math.exp(self.by_tokens.mu(latents))
        return wanted * share / (1 + (wanted - 1) * share)


def mixed(objective: Objective, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Latents with as much noise as there is at these timesteps, `clean` included: [B, ...]."""
    signal, sigma = (_as_rows(part, latents) for part in objective.levels(timesteps))
    return signal * latents + sigma * noise


def _as_rows(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], in the type of what it is multiplied with."""
    return values.view(-1, *[1] * (like.ndim - 1)).to(like)


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each row times its weight: [B, ...], [B, ...], [B] -> [B], in float32."""
    return weight * (prediction.float() - target.float()).square().flatten(1).mean(1)


def _weighted(config: ObjectiveConfig, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    if config.loss == "mse":
        return weighted_mse(prediction, target, weight)
    error = F.huber_loss(prediction.float(), target.float(), reduction="none", delta=config.huber_delta)
    # Twice, so that small errors count as much as in the mean square.
    return weight * 2 * error.flatten(1).mean(1)


def _offset_noise(generator: torch.Generator, shape: tuple[int, ...], offset: float) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if offset:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        noise = noise + offset * torch.randn(per_channel, generator=generator)
    return noise


def configured(scheduler: Any, config: ObjectiveConfig) -> Any:
    """A scheduler that says what the `objective:` section knows better than its own configuration.

    Zero terminal SNR needs a base that predicts anything but the noise, of which the last timestep consists
    (Lin et al. 2023, arXiv:2305.08891). Samplers that do not know of it, such as PNDM, give way to DDIM.

    Raises:
        ConfigError: zero terminal SNR for a base that predicts the noise.
    """
    changes = scheduler_changes(config)
    if not changes:
        return scheduler
    predicted = changes.get("prediction_type", scheduler.config.get("prediction_type"))
    if config.zero_terminal_snr and predicted == "epsilon":
        raise ConfigError(
            "objective.zero_terminal_snr needs a base that predicts v: at the last timestep there is nothing"
            " but noise, which says nothing about the picture",
            hint="set objective.prediction to v_prediction, if the base was trained with it",
        )
    return sampler(scheduler, SamplingConfig(scheduler=changes))


def scheduler_changes(config: ObjectiveConfig) -> dict[str, Any]:
    """Keys of a scheduler's configuration that the `objective:` section changes.

    With zero terminal SNR a sampler has to start at the last timestep.
    """
    changes: dict[str, Any] = {}
    if config.prediction is not None:
        changes["prediction_type"] = config.prediction
    if config.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = config.zero_terminal_snr
        if config.zero_terminal_snr:
            changes["timestep_spacing"] = "trailing"
    return changes
