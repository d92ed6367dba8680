"""What saves memory: how each lever is put on a denoiser, the same way while planning and while training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from tunekit.errors import ConfigError, did_you_mean
from tunekit.families.family import DTYPES

OnUnit = Callable[[str, Callable[[], Any]], Any]
"""Called for each unit with its module path and what runs it."""


def apply_levers(
    denoiser: nn.Module, precision: str, checkpointed: bool | Collection[str], *, frozen: bool
) -> nn.Module:
    """Sets what is trained, the type of frozen weights, and which units are computed twice.

    Args:
        precision: of `memory.precision`; frozen weights are kept in it, trained ones stay float32.
        checkpointed: see `checkpoint_units`.
        frozen: the denoiser will carry an adapter.
    """
    denoiser.requires_grad_(not frozen)
    checkpoint_units(denoiser, checkpointed)
    if frozen and precision != "fp32":
        denoiser.to(DTYPES[precision])
    return denoiser


def checkpoint_units(
    denoiser: nn.Module, chosen: bool | Collection[str], *, on_unit: OnUnit | None = None
) -> None:
    """Lets the chosen units keep their input only and compute the rest again in the backward pass.

    Units are what diffusers checkpoints: residual blocks and transformer blocks, 37 in Stable Diffusion 1.5.
    The non-reentrant kind is used: the reentrant one gives no gradients behind frozen inputs.

    Args:
        denoiser: a diffusers model.
        chosen: True for all, False for none, or the module paths of units.
        on_unit: runs each unit, for observers.

    Raises:
        ConfigError: a path that is no module of the denoiser.
    """
    if chosen is False and on_unit is None:
        return
    names = {module: name for name, module in denoiser.named_modules()}
    known = set(names.values())
    if not isinstance(chosen, bool) and (unknown := sorted(set(chosen) - known)):
        raise ConfigError(
            f'the denoiser has no block "{unknown[0]}"',
            where="memory.gradient_checkpointing",
            hint=did_you_mean(unknown[0], known) or "tunekit plan --json names blocks: checkpointed_blocks",
        )

    @cache  # asked at the first step, when the adapter is there
    def draws() -> bool:
        """Whether the random state must be the same the second time; reading it costs."""
        return any(isinstance(module, _DropoutNd) and module.p > 0 for module in denoiser.modules())

    def run(module: nn.Module, *args: Any) -> Any:
        name = names[module]

        def once() -> Any:
            if chosen is True or (chosen is not False and name in chosen):
                return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=draws())
            return module(*args)

        return on_unit(name, once) if on_unit else once()

    denoiser.enable_gradient_checkpointing(run)  # type: ignore[operator]


def trained(denoiser: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
