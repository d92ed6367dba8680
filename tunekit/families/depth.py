"""Whole blocks that leave a network, so that its configuration describes what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

UNSET = "_use_default_values"
"""Of a configuration: the keys that nobody has set."""


def lies_in(path: str, gone: Collection[str]) -> bool:
    """Whether a module's path is among those that leave, or below one."""
    return any(path == other or path.startswith(f"{other}.") for other in gone)


def renumbered(paths: Iterable[str], gone: Collection[str]) -> dict[str, str]:
    """What modules are called when others have left the lists that they stand in.

    Args:
        paths: of a network's modules.
        gone: of those that leave; what lies below them leaves, too.

    Returns:
        Path before -> path afterwards, of those that stay.
    """
    made = {}
    for path in paths:
        if lies_in(path, gone):
            continue
        parts = path.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                before = path.split(".")[:place]
                left = sum(".".join([*before, str(number)]) in gone for number in range(int(part)))
                parts[place] = str(int(part) - left)
        made[path] = ".".join(parts)
    return made


def counterparts(paths: Collection[str], gone: Collection[str]) -> dict[str, str]:
    """Whose output each block's is to be, where others have left: the next block has been given that.

    Args:
        paths: of the whole network's blocks, in the order that they run.
        gone: those that leave.

    Returns:
        A block's path afterwards -> the path before of the last one, up to the next that stays in the list.
    """
    kept = renumbered(paths, gone)
    made: dict[str, str] = {}
    last: str | None = None
    for path in paths:
        if path in kept:
            last = kept[path]
            made[last] = path
        elif last is not None and _list(path) == _list(made[last]):
            made[last] = path
    return made


def configured(network: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a network of diffusers with other values."""
    known = network.config
    # What nobody has set would be taken for its default again.
    unset = [key for key in known.get(UNSET, ()) if key not in changes]
    return {**known, **changes, UNSET: unset}


def described(network: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """The network that a configuration describes, without data."""
    with torch.device("meta"):
        return type(network).from_config(configured(network, changes or {}))


def fits(network: nn.Module) -> bool:
    """Whether a network has the modules that its configuration describes."""
    made = described(network)
    return [name for name, _ in made.named_modules()] == [name for name, _ in network.named_modules()]


def _list(path: str) -> str:
    return path.rpartition(".")[0]
