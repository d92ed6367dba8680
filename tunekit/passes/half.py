"""Networks in half precision, of which some modules stay in float32.

What a module that stays is given is made float32, and what it gives is made half again; within it, nothing is
rounded. An export sees that as casts around it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tunekit.passes.paths import under

if TYPE_CHECKING:
    from torch import Tensor, nn


def exact_weights(network: nn.Module, paths: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a network in float32 that modules at these paths have, by name."""
    names = [name for name, _ in network.named_modules()]
    state = network.state_dict() if paths else {}
    return {name: tensor for name, tensor in state.items() if under(name, paths, names)}


def keep_whole(half: nn.Module, weights: Mapping[str, Tensor], paths: Collection[str]) -> list[str]:
    """Puts modules of a network in half precision back into float32, in place; returns their names.

    Args:
        weights: of these modules before they were rounded, see `exact_weights`.
        paths: of modules, as `paths.under` takes them.
    """
    modules = dict(half.named_modules())
    chosen = [name for name in modules if name and under(name, paths, modules)]
    found: list[str] = []
    outside = next(half.parameters()).dtype
    for name in chosen:
        if under(name, found, modules) or not _is_called(modules[name]):
            continue  # it is within one that stays, or a list of modules
        found.append(name)
        module = modules[name].float()
        with torch.no_grad():
            for own, tensor in module.state_dict(keep_vars=True, prefix=f"{name}.").items():
                tensor.copy_(weights[own])
        for inner in module.modules():  # some cast in between, to the type of another input
            inner.register_forward_pre_hook(_take, with_kwargs=True)
        module.register_forward_hook(partial(_give, outside))
    return found


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)


def _take(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _give(outside: torch.dtype, module: nn.Module, args: Any, made: Any) -> Any:
    return _cast(made, outside)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same, with every floating tensor in it in another type, and every type that is to be made."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value
