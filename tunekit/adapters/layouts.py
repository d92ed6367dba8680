"""The two layouts that the world uses, PEFT's and kohya's: tensors by key to updates by module, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.delta import KINDS, Delta, Deltas, State, check_shape, some
from tunekit.errors import AdapterError
from tunekit.families import FAMILIES
from tunekit.families.family import Family, FamilyFacts

HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps alpha, as JSON

Modules = Mapping[str, Mapping[str, nn.Module]]
"""Component -> module path -> layer that can carry an adapter; all of them, see `modules_of`."""

Place = tuple[str, str]
"""Component and module path."""

Layout = list[tuple[set[str], Callable[[State, float | None], Delta]]]
"""Of each kind of adapter, what a module's keys end with, and what makes an update of those tensors."""

PEFT: Layout = [(set(kind.peft_names.values()), kind.from_peft) for kind in KINDS.values()]
KOHYA: Layout = [(set(kind.kohya_names.values()), kind.from_kohya) for kind in KINDS.values()]


def to_kohya(deltas: Deltas, modules: Modules, family: Family) -> State:
    """Lay updates out as kohya's tools do: their names of the modules, alpha and DoRA scale as tensors.

    Raises:
        AdapterError: two modules whose names become equal.
    """
    names = _kohya_names(modules, family)
    state: State = {}
    for component, updates in deltas.items():
        for path, delta in updates.items():
            name = names[component, path][0]
            if f"{name}.alpha" in state:
                raise AdapterError(f"two modules have the kohya name {name}")
            state |= {f"{name}.{ending}": tensor for ending, tensor in delta.kohya().items()}
            state[f"{name}.alpha"] = torch.tensor(float(delta.alpha))
    return state


def from_kohya(state: Mapping[str, Tensor], modules: Modules, family: Family) -> Deltas:
    """Read kohya's layout, under every name that `family` knows for a module.

    Raises:
        AdapterError: keys that name no module.
    """
    places = {name: place for place, names in _kohya_names(modules, family).items() for name in names}
    groups = _grouped(state, {*_endings(KOHYA), "alpha"}, places, family)
    alphas = {place: float(tensors.pop("alpha")) for place, tensors in groups.items() if "alpha" in tensors}
    return _deltas(groups, alphas, KOHYA)


def from_peft(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], modules: Modules, family: Family
) -> Deltas:
    """Read PEFT's layout; `settings` is the header's JSON, without which alpha is the rank.

    Raises:
        AdapterError: keys that name no module.
    """
    places = {
        f"{component}.{level}{path}": (component, path)
        for component, paths in modules.items()
        for path in paths
        for level in ("text_model.", "")  # transformers 5 dropped this level, which files keep naming
    }
    groups = _grouped(state, _endings(PEFT), places, family)
    alphas: dict[Place, float] = {}
    for component, path in groups:
        alpha = settings.get(f"{component}.lora_alpha")
        for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
            if path == pattern.removeprefix("^") or path.endswith("." + pattern):
                alpha = value
        if alpha is not None:
            alphas[component, path] = float(alpha)
    found = _deltas(groups, alphas, PEFT)
    for component, updates in found.items():
        if settings.get(f"{component}.use_rslora"):  # scales by alpha / sqrt(rank)
            for path, delta in updates.items():
                updates[path] = dataclasses.replace(delta, alpha=delta.alpha * math.sqrt(delta.rank))
    return found


def parse(state: State, header: Mapping[str, str], modules: Modules, family: Family, where: str) -> Deltas:
    """Read either layout and check every shape against its module."""
    try:
        if any(_ending(key, _endings(KOHYA)) for key in state):
            deltas = from_kohya(state, modules, family)
        elif any(_ending(key, _endings(PEFT)) for key in state):
            deltas = from_peft(state, json.loads(header.get(HEADER_KEY, "{}")), modules, family)
        else:
            raise AdapterError(f"no LoRA or DoRA adapter: it holds {some(sorted(state)) or 'nothing'}")
        for component, updates in deltas.items():
            if len(kinds := sorted({delta.kind for delta in updates.values()})) > 1:
                raise AdapterError(f"some modules of {component} have a {kinds[0]}, and some a {kinds[1]}")
            for path, delta in updates.items():
                check_shape(f"{component}.{path}", delta, modules[component][path])
    except ValueError as error:
        raise AdapterError(f"its header's {HEADER_KEY} is not JSON: {error}", where=where) from error
    except AdapterError as error:
        other = _made_for(header)
        hint = error.hint
        if other is not None and other is not family.facts:
            hint = f"its header says that it was made for {other.title}, and this is {family.facts.title}"
        raise AdapterError(error.message, where=where, hint=hint) from error
    return deltas


def _made_for(header: Mapping[str, str]) -> FamilyFacts | None:
    """The family that a file's header names, as kohya's tools and modelspec do."""
    base, architecture = header.get("ss_base_model_version", ""), header.get("modelspec.architecture")
    for _, family in FAMILIES.items():
        facts: FamilyFacts = family.facts
        if (
            base.startswith(facts.ss_base_model_version)
            or architecture == f"{facts.modelspec_architecture}/lora"
        ):
            return facts
    return None


def _kohya_names(modules: Modules, family: Family) -> dict[Place, list[str]]:
    """What modules are called in kohya files; the first name is written, all are read."""
    return {
        (component, path): [f"{prefix}_{name}" for prefix in prefixes for name in names]
        for component, prefixes in family.facts.kohya_prefixes.items()
        for path, names in family.adapter_names(component, list(modules.get(component, ()))).items()
    }


def _endings(layout: Layout) -> set[str]:
    return {ending for endings, _ in layout for ending in endings}


def _ending(key: str, endings: set[str]) -> str | None:
    return next((ending for ending in endings if key.endswith("." + ending)), None)


def _grouped(
    state: Mapping[str, Tensor], endings: set[str], places: Mapping[str, Place], family: Family
) -> dict[Place, State]:
    """Sort tensors by the module they name."""
    groups: dict[Place, State] = {}
    unknown = []
    for key, tensor in state.items():
        ending = _ending(key, endings)
        place = places.get(key.removesuffix(f".{ending}")) if ending else None
        if ending is None or place is None:
            unknown.append(key)
        else:
            groups.setdefault(place, {})[ending] = tensor
    if unknown:
        raise AdapterError(
            f"{len(unknown)} of its keys name nothing in {family.facts.title}: {some(unknown)}",
            hint="it was made for another model family, or by a method other than LoRA and DoRA",
        )
    return groups


def _deltas(groups: Mapping[Place, State], alphas: Mapping[Place, float], layout: Layout) -> Deltas:
    """Make an update of each module's tensors, of the first kind that knows them all."""
    found: Deltas = {}
    for (component, path), tensors in groups.items():
        endings, read = next((endings, read) for endings, read in layout if tensors.keys() <= endings)
        if missing := sorted(endings - tensors.keys()):
            raise AdapterError(f"{component}.{path} has no {missing[0]}", hint="the file is incomplete")
        found.setdefault(component, {})[path] = read(tensors, alphas.get((component, path)))
    return found
