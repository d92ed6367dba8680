"""One file per model family. The folder is the registry; plug-ins add theirs by entry point."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunekit import registry
from tunekit.errors import ConfigError, ModelError
from tunekit.families import sizes
from tunekit.families.family import (
    Component,
    Conditioning,
    ExportComponent,
    Family,
    FamilyFacts,
    Frame,
    Planned,
)
from tunekit.families.sizes import Sizes
from tunekit.registry import Registry
from tunekit.resources import Source

__all__ = [
    "FAMILIES",
    "Component",
    "Conditioning",
    "ExportComponent",
    "Family",
    "FamilyFacts",
    "Frame",
    "Planned",
    "Sizes",
    "detect",
    "distilled",
    "get",
    "planned",
    "runnable",
    "sizes_of",
]

FAMILIES: Registry[Any] = registry.FAMILIES


def planned(name: str) -> Planned:
    """Return the family called `name`, which may be one that can be planned only.

    Raises:
        ConfigError: unknown; names the nearest.
    """
    family: Planned = FAMILIES.get(name)
    return family


def get(name: str) -> Family:
    """Return the family called `name`, to run it.

    Raises:
        ConfigError: unknown (names the nearest), or one that can be planned only.
    """
    family: Family = FAMILIES.get(name)
    if not family.facts.runs:
        raise ConfigError(
            f'the family "{name}" is planned only: tunekit plan takes it, and nothing is run with it yet',
            hint=f"families that run: {', '.join(runnable())}",
        )
    _check_is_there(family)
    return family


def _check_is_there(family: Planned) -> None:
    """Refuses a family whose classes the installed diffusers does not have.

    Raises:
        ConfigError: says which version has them.
    """
    if not family.facts.is_there:
        here, needed = version("diffusers"), family.facts.since
        raise ConfigError(
            f'the family "{family.name}" needs diffusers {needed} or later, and {here} is installed',
            hint=f"families that run with it: {', '.join(runnable())}",
        )


def runnable() -> list[str]:
    """Names of the families that can be run with the diffusers that is installed, sorted."""
    return [name for name, family in FAMILIES.items() if family.facts.runs and family.facts.is_there]


def sizes_of(name: str, source: Source | str) -> Sizes:
    """What the base `source` of a family is made of, without its weights.

    Raises:
        ConfigError: an unknown family, one that has no tiny version, or one that needs a newer diffusers.
        ModelError: a folder that is not what it should be.
    """
    source, family = Source.of(source), planned(name)
    _check_is_there(family)
    return _tiny_sizes(name) if source.name == "tiny" else sizes.sized(family, source)


def distilled(sizes: Sizes, source: str) -> str:
    """Say what comes of training a base that was distilled to few steps, and which to train instead.

    Of other bases, "" is said.

    Args:
        source: what the base is called, where its configurations are not here.
    """
    facts = sizes.family.facts
    called = source if Source(source).path is None else Path(source).name
    base = f"the base that it was made from, such as {facts.default_source},"
    if facts.distilled and re.search(facts.distilled, called, re.IGNORECASE):
        base = facts.default_source
        if facts.distilled_from:
            base = re.sub(facts.distilled, facts.distilled_from, called, flags=re.IGNORECASE)
    elif not sizes.family.is_distilled(sizes.configs):
        return ""
    return (
        "this base was distilled to draw in few steps: trained, it comes to give grey or blurred pictures in"
        f" so few; train {base} and draw with either"
    )


def multiple_of(name: str, source: Source | str) -> int:
    """What height and width in pixels have to be divisible by for the base `source` of a family.

    Raises:
        ConfigError, ModelError: see `sizes_of`.
    """
    sizes = sizes_of(name, source)
    return sizes.family.resolution_multiple(sizes.configs)


@cache
def _tiny_sizes(name: str) -> Sizes:
    family = get(name)
    return sizes.like(family, family.tiny())


def detect(source: Source | str) -> str:
    """Name the family of a diffusers folder, "builtin/..." or hub id from its configuration files.

    Of a single file, from the names of its tensors.

    Raises:
        ModelError: no model_index.json can be read, or no family loads its pipeline class.
    """
    from tunekit.families import single_file, weights
    from tunekit.families.loading import component_configs, pipeline_class_name

    source = Source.of(source)
    if source.path is not None and source.path.is_file():
        names = weights.entries([source.path], allow_pickle=source.allow_pickle)
        for key, family in FAMILIES.items():
            if family.facts.runs and single_file.is_of(names, family.facts):
                return key
        parts = [key for key, family in FAMILIES.items() if single_file.held(names, family.facts)]
        if len(parts) == 1:
            return parts[0]
        kind = single_file.what_is(names)
        raise ModelError(
            f"is {kind}" if kind else "one weights file does not say its family",
            where=source.name,
            hint="a whole model is needed" if kind and not parts else "name it: model.family, or --family",
        )
    name = pipeline_class_name(source)
    for key, family in _candidates(name):
        configs = component_configs(source, [family.facts.denoiser_name])
        if not family.facts.runs or family.recognizes(configs):
            return key
    known = sorted({c for _, family in FAMILIES.items() for c in family.facts.pipeline_classes})
    raise ModelError(
        f'no family loads the pipeline class "{name}"', where=source.name, hint=f"known: {', '.join(known)}"
    )


def _candidates(pipeline_class: str) -> Iterator[tuple[str, Any]]:
    for key, family in FAMILIES.items():
        if pipeline_class in family.facts.pipeline_classes:
            yield key, family
