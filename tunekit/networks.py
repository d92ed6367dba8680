"""Networks as a whole: one like another without data, and one that computes where it does not fit."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

# Of many objects --------------------------------------------------------------------------------------------


@contextmanager
def collected_once() -> Iterator[None]:
    """Lets the garbage collector look at what a block makes when it ends, and at nothing else.

    Who makes objects by the million wakes it again and again, and each time it may go through all that is
    loaded: a second with the libraries that are needed here.
    """
    if not gc.isenabled():  # who disabled it, will collect
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        gc.enable()


# Without data -----------------------------------------------------------------------------------------------


def twin(model: nn.Module) -> nn.Module:
    """Another model like this one, which has no data: the same modules over tensors of its own.

    That is what `copy.deepcopy` makes, in a tenth of the time: networks have thousands of modules, and a plan
    needs one of them many times.
    """
    known: dict[int, Any] = {}
    collects = gc.isenabled()
    gc.disable()  # so many small objects would wake it several times, for nothing
    try:
        _remember_twins(model, known)
    finally:
        if collects:
            gc.enable()
    return cast(nn.Module, known[id(model)])


def _remember_twins(module: nn.Module, known: dict[int, Any]) -> None:
    """Makes the twin of a module and of what is in it; `known` is deepcopy's memory of what was copied."""
    if id(module) in known:
        return
    made = known[id(module)] = object.__new__(type(module))
    own: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name == "_modules":
            for child in value.values():
                if child is not None:
                    _remember_twins(child, known)
            own[name] = {key: None if child is None else known[id(child)] for key, child in value.items()}
        elif name in ("_parameters", "_buffers"):
            own[name] = {key: _empty_twin(tensor, known) for key, tensor in value.items()}
        elif value is None or type(value) in _PLAIN:
            own[name] = value
        elif type(value) in (dict, set, list, OrderedDict) and not value:
            own[name] = type(value)()
        else:
            own[name] = copy.deepcopy(value, known)
    vars(made).update(own)


_PLAIN = frozenset({bool, int, float, str, type, torch.dtype, torch.device, torch.Size, FunctionType})


def _empty_twin(tensor: Tensor | None, known: dict[int, Any]) -> Tensor | None:
    if tensor is None or id(tensor) in known:
        return None if tensor is None else cast(Tensor, known[id(tensor)])
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_meta or vars(tensor):
        made = copy.deepcopy(tensor, known)
    else:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    known[id(tensor)] = made
    return made


# Layer by layer ---------------------------------------------------------------------------------------------


def repeated(model: nn.Module) -> list[nn.Module]:
    """The layers that a network has many of, one like the other, in order: those of its outermost lists."""
    found: list[nn.Module] = []
    for child in model.children():
        layers = list(child) if isinstance(child, nn.ModuleList) else []
        alike = len(layers) > 1 and len({type(layer) for layer in layers}) == 1
        found += layers if alike else repeated(child)
    return found


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The smallest blocks that a network is made of, by module path: residual and transformer blocks.

    They stand in lists whose items all have parts of their own, as far down as there are such lists; the
    layers within a block, of which some stand in lists too, are none.
    """
    found: dict[str, nn.Module] = {}

    def look(path: str, module: nn.Module) -> bool:
        """Whether there are blocks in it."""
        any_here = False
        for name, child in module.named_children():
            at = f"{path}.{name}" if path else name
            listed = isinstance(child, nn.ModuleList) and len(child) > 0 and all(map(_has_parts, child))
            for index, item in child.named_children() if listed else ():
                if not look(f"{at}.{index}", item):
                    found[f"{at}.{index}"] = item
            any_here = listed or look(at, child) or any_here
        return any_here

    look("", model)
    return found


def _has_parts(module: nn.Module | None) -> bool:
    """Whether it is more than a layer, be that adapted or not."""
    return module is not None and not hasattr(module, "base_layer") and any(True for _ in module.children())


@contextmanager
def visiting(
    model: nn.Module, device: torch.device | str, *, layers: bool = False, on_host: bool = False
) -> Iterator[None]:
    """Lets a network that is not trained compute; before and after, it is in host memory.

    Args:
        device: where it computes.
        layers: it is there layer by layer, see `by_layer`.
        on_host: it computes on the CPU instead.
    """
    if layers:
        with by_layer(model, device):
            yield
        return
    model.to("cpu" if on_host else device)
    try:
        yield
    finally:
        model.to("cpu")


@contextmanager
def by_layer(
    model: nn.Module,
    device: torch.device | str,
    watch: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> Iterator[None]:
    """Lets a network in host memory compute on a device that has not the room for it.

    Its `repeated` layers come one by one, each when it runs, and leave again; all else is there as long. Only
    for networks that are not trained: what was changed there would be lost.

    Args:
        watch: told of the tensors of each layer that comes, for observers.
    """
    visitors = {id(layer): _tensors(layer) for layer in repeated(model)}
    away = {id(tensor) for tensors in visitors.values() for tensor in tensors}
    stays = [tensor for tensor in _tensors(model) if id(tensor) not in away]
    with _disable_current_modes():
        home = {id(tensor): tensor.data for tensor in _tensors(model)}

    def come(layer: nn.Module, _: Any) -> None:
        with _disable_current_modes():  # whoever watches operators is told by `watch`
            for tensor in visitors[id(layer)]:
                whole = home[id(tensor)]
                tensor.data = torch.empty_like(whole, device=device).copy_(whole)
        watch(visitors[id(layer)])

    def leave(layer: nn.Module, *_: Any) -> None:
        for tensor in visitors[id(layer)]:
            tensor.data = home[id(tensor)]

    hooks: list[Any] = []
    for layer in repeated(model):
        hooks.append(layer.register_forward_pre_hook(come))
        hooks.append(layer.register_forward_hook(leave, always_call=True))
    try:
        for tensor in stays:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor in _tensors(model):
            tensor.data = home[id(tensor)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
