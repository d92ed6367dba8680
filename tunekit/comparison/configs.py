"""What differs in the configs of several runs, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunekit.comparison.contestants import Contestant
from tunekit.provenance import public, shown

OWN = ("name", "runs")
"""Keys that differ from run to run by their nature."""
ABSENT, NOTHING = "-", "null"
MEASURED_BY = ("data.path", "data.validation", "data.resolution", "data.crop", "seed")
"""Keys by which two validation losses are not of the same pictures, or not of the same size."""

Differing = Mapping[str, Mapping[str, str]]
"""Dotted key -> name of a run -> its value, as it would be written."""


def differences(contestants: Sequence[Contestant]) -> Differing:
    """The keys that are not alike in all runs, in the order of their configs; what one lacks is "-"."""
    flat = {
        one.name: dict(_flat(one.material.config))
        for one in contestants
        if one.material and one.material.config
    }
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        values = {name: own.get(key, ABSENT) for name, own in flat.items()}
        # A key that did not exist when a run was made is as one that is left open.
        if key not in OWN and len({NOTHING if value == ABSENT else value for value in values.values()}) > 1:
            found[key] = values
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name == "optimize" and isinstance(value, list):
            yield from _chain(value)
        elif isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, _written(value, str(key))


def _chain(passes: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The passes in a line, and the settings of each; of a second `verify` as `optimize.verify#2.against`."""
    kinds, settings = [], []
    for item in passes:
        kind, own = next(iter(item.items()), ("", None)) if isinstance(item, Mapping) else (str(item), None)
        kinds.append(str(kind))
        settings.append(own if isinstance(own, Mapping) else {})
    yield "optimize", " > ".join(kinds) or "none"
    seen: Counter[str] = Counter()
    for kind, own in zip(kinds, settings, strict=True):
        seen[kind] += 1
        number = f"#{seen[kind]}" if seen[kind] > 1 else ""
        yield from _flat(own, f"optimize.{kind}{number}.")


def _written(value: Any, key: str) -> str:
    value = public(value, key)
    if isinstance(value, str):
        return shown(value)
    return json.dumps(value, ensure_ascii=False, default=str)
