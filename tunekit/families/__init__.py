"""One file per model family. The folder is the registry; plug-ins add theirs by entry point."""

from __future__ import annotations

from pathlib import Path

from tunekit import registry
from tunekit.errors import ConfigError, ModelError
from tunekit.families.blueprint import Blueprint
from tunekit.families.family import Conditioning, ExportComponent, Family, FamilyFacts
from tunekit.registry import Registry
from tunekit.resources import builtin

__all__ = [
    "BLUEPRINTS",
    "FAMILIES",
    "Blueprint",
    "Conditioning",
    "ExportComponent",
    "Family",
    "FamilyFacts",
    "blueprint_of",
    "detect",
    "get",
]

FAMILIES: Registry[Family] = registry.FAMILIES
BLUEPRINTS: Registry[Blueprint] = registry.BLUEPRINTS


def get(name: str) -> Family:
    """Return the family called `name`; an unknown one is a ConfigError with the nearest name."""
    if name in BLUEPRINTS.names() and name not in FAMILIES.names():
        raise ConfigError(
            f'the family "{name}" can be planned (tunekit plan), but not be run yet',
            hint=f"families that run: {', '.join(FAMILIES.names())}",
        )
    return FAMILIES.get(name)


def blueprint_of(name: str, source: str) -> Blueprint:
    """What the base `source` of a family is made of, without its weights.

    Raises:
        ConfigError: the family has no blueprint, or no tiny version.
        ModelError: a folder that is not what it should be.
    """
    blueprint = BLUEPRINTS.get(name)
    return blueprint.like(get(name).tiny()) if source == "tiny" else blueprint.sized(source)


def detect(source: str) -> str:
    """Name the family of a diffusers folder, "builtin/..." or hub id from its model_index.json.

    Raises:
        ModelError: no model_index.json can be read, or no family loads its pipeline class.
    """
    from tunekit.families.loading import pipeline_class_name

    path = builtin(source) or Path(source)
    if path.is_file():
        raise ModelError(
            "one weights file does not say its family",
            where=source,
            hint="name it: model.family, or --family",
        )
    name = pipeline_class_name(source)
    for key, family in FAMILIES.items():
        if name in family.facts.pipeline_classes:
            return key
    known = sorted({c for _, family in FAMILIES.items() for c in family.facts.pipeline_classes})
    raise ModelError(
        f'no family loads the pipeline class "{name}"', where=source, hint=f"known: {', '.join(known)}"
    )
