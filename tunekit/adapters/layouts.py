"""The two layouts that the world uses, PEFT's and kohya's: tensors by key to updates by module, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.delta import Delta, Deltas, State, check_shape, some
from tunekit.errors import AdapterError
from tunekit.families.family import Family

HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps alpha, as JSON


def to_kohya(deltas: Deltas, family: Family) -> State:
    """Lay updates out as kohya's tools do: underscored names, alpha and DoRA scale as tensors.

    Raises:
        AdapterError: two modules whose names become equal.
    """
    state: State = {}
    for component, updates in deltas.items():
        prefix = family.facts.kohya_prefixes[component][0]
        for path, delta in updates.items():
            name = _kohya_name(prefix, path)
            if f"{name}.alpha" in state:
                raise AdapterError(f"two modules have the kohya name {name}")
            state[f"{name}.lora_down.weight"] = delta.down
            state[f"{name}.lora_up.weight"] = delta.up
            state[f"{name}.alpha"] = torch.tensor(float(delta.alpha))
            if delta.magnitude is not None:
                # One column, so that it scales rows: ComfyUI tells the axis from the shape.
                state[f"{name}.dora_scale"] = delta.magnitude.view(-1, *[1] * (delta.down.ndim - 1))
    return state


def from_kohya(
    state: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, nn.Module]], family: Family
) -> Deltas:
    """Read kohya's layout; a missing alpha means the rank (scale 1).

    Args:
        state: the file's tensors.
        modules: component -> module path -> module.
        family: whose name prefixes to read.

    Raises:
        AdapterError: keys that name no module.
    """
    names = {
        _kohya_name(prefix, path): (component, path)
        for component, prefixes in family.facts.kohya_prefixes.items()
        for prefix in prefixes
        for path in modules.get(component, {})
    }
    groups, unknown = _grouped(state, ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"), names)
    return _deltas(
        groups, unknown, family, down="lora_down.weight", up="lora_up.weight", magnitude="dora_scale"
    )


def from_peft(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, nn.Module]],
    family: Family,
) -> Deltas:
    """Read PEFT's layout; `settings` is the header's JSON, without which alpha is the rank.

    Raises:
        AdapterError: keys that name no module.
    """
    names = {
        f"{component}.{path}": (component, path) for component, paths in modules.items() for path in paths
    }
    groups, unknown = _grouped(state, ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), names)
    for (component, path), tensors in groups.items():
        if f"{component}.lora_alpha" in settings and "lora_A.weight" in tensors:
            alpha = float(settings[f"{component}.lora_alpha"])
            for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
                if path == pattern.removeprefix("^") or path.endswith("." + pattern):
                    alpha = float(value)
            if settings.get(f"{component}.use_rslora"):  # scales by alpha / sqrt(rank)
                alpha *= math.sqrt(len(tensors["lora_A.weight"]))
            tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return _deltas(
        groups, unknown, family, down="lora_A.weight", up="lora_B.weight", magnitude="lora_magnitude_vector"
    )


def parse(
    state: State,
    header: Mapping[str, str],
    modules: Mapping[str, Mapping[str, nn.Module]],
    family: Family,
    where: str,
) -> Deltas:
    """Read either layout and check every shape against its module."""
    try:
        if any(".lora_down." in key for key in state):
            deltas = from_kohya(state, modules, family)
        elif any(".lora_A." in key for key in state):
            deltas = from_peft(state, json.loads(header.get(HEADER_KEY, "{}")), modules, family)
        else:
            raise AdapterError(f"no LoRA or DoRA adapter: it holds {some(sorted(state)) or 'nothing'}")
        for component, updates in deltas.items():
            if len({delta.magnitude is None for delta in updates.values()}) > 1:
                raise AdapterError(f"some modules of {component} have a DoRA magnitude and some have none")
            for path, delta in updates.items():
                check_shape(f"{component}.{path}", delta, modules[component][path])
    except ValueError as error:
        raise AdapterError(f"its header's {HEADER_KEY} is not JSON: {error}", where=where) from error
    except AdapterError as error:
        raise AdapterError(error.message, where=where, hint=error.hint) from error
    # Aliases of a path (see modules_of) become the path itself.
    own = {
        component: {id(m): path for path, m in reversed(list(paths.items()))}
        for component, paths in modules.items()
    }
    return {
        c: {own[c][id(modules[c][path])]: d for path, d in updates.items()} for c, updates in deltas.items()
    }


def _kohya_name(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _grouped(
    state: Mapping[str, Tensor], endings: tuple[str, ...], names: Mapping[str, tuple[str, str]]
) -> tuple[dict[tuple[str, str], State], list[str]]:
    """Sort tensors by the module they name; the rest are the unknown keys."""
    groups: dict[tuple[str, str], State] = {}
    unknown = []
    for key, tensor in state.items():
        ending = next((e for e in endings if key.endswith("." + e)), None)
        place = names.get(key.removesuffix(f".{ending}")) if ending else None
        if ending is None or place is None:
            unknown.append(key)
        else:
            groups.setdefault(place, {})[ending] = tensor
    return groups, unknown


def _deltas(
    groups: Mapping[tuple[str, str], State],
    unknown: list[str],
    family: Family,
    *,
    down: str,
    up: str,
    magnitude: str,
) -> Deltas:
    if unknown:
        raise AdapterError(
            f"{len(unknown)} of its keys name nothing in {family.facts.title}: {some(unknown)}",
            hint="it was made for another model family, or by a method other than LoRA and DoRA",
        )
    found: Deltas = {}
    for (component, path), tensors in groups.items():
        missing = [key for key in (down, up) if key not in tensors]
        if missing:
            raise AdapterError(f"{component}.{path} has no {missing[0]}", hint="the file is incomplete")
        rank = tensors[down].shape[0]
        scale = tensors.get(magnitude)
        found.setdefault(component, {})[path] = Delta(
            down=tensors[down],
            up=tensors[up],
            alpha=float(tensors["alpha"]) if "alpha" in tensors else float(rank),
            magnitude=None if scale is None else scale.reshape(-1),
        )
    return found
