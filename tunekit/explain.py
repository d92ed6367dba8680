"""What a key, a pass or an optimizer is, for people and as JSON schemas for their editors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunekit import optimizers
from tunekit.config import known_as
from tunekit.errors import ConfigError, did_you_mean
from tunekit.registry import PASSES, load_recipe, recipe_names
from tunekit.resources import PACKAGE

SCHEMAS = PACKAGE / "schemas"
"""`<recipe>.json`, which `scripts/update_docs` writes and the first line of a copied config names."""


# Schemas ----------------------------------------------------------------------------------------------------


def schema(recipe: str) -> dict[str, Any]:
    """The JSON schema of a recipe's config files, the passes of `optimize:` included.

    A file that `extends:` another may leave out what is required otherwise.

    Args:
        recipe: name of a recipe, or the path of a recipe file.

    Raises:
        ConfigError: there is no such recipe.
    """
    made: dict[str, Any] = load_recipe(recipe).Config.model_json_schema()
    definitions, properties = made.setdefault("$defs", {}), made["properties"]
    sections = {}
    for name, found in properties.items():
        section = definitions.get(found.get("$ref", "").rpartition("/")[2])
        if section and (required := section.pop("required", None)):
            sections[name] = {"required": required}
    whole = {"required": made.pop("required", []), "properties": sections}
    made |= {"if": {"required": ["extends"]}, "then": {}, "else": whole}
    extends = "A config file that this one changes, relative to it, or the name of a ready-made one."
    made["properties"] = {"extends": {"type": "string", "description": extends}, **properties}
    if "optimize" in properties:
        properties["optimize"]["items"] = _step(definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _step(definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one item of `optimize:`; the passes go into `definitions`."""
    alone, settings = [], {}
    for kind, step in PASSES.items():
        found = step.model_json_schema()
        definitions |= found.pop("$defs", {})
        definitions[step.__name__] = found
        if "required" not in found:
            alone.append(kind)
        reference = {"$ref": f"#/$defs/{step.__name__}"}
        settings[kind] = {"anyOf": [reference, {"type": "null"}], "description": step.summary()}
    one = {"type": "object", "properties": settings, "additionalProperties": False}
    return {"anyOf": [{"enum": alone}, {**one, "minProperties": 1, "maxProperties": 1}]}


# Words ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What a name stands for.

    Attributes:
        name: as it is written: "train.lr", "prune", "adamw8bit".
        kind: "key", "section", "pass" or "optimizer".
        about: what it is, in a few lines.
        facts: what is known beside that, by name: "takes", "default", "of the recipes".
        keys: of a section or a pass: (key, what it takes, what it is).
    """

    name: str
    kind: str
    about: str
    facts: dict[str, str]
    keys: tuple[tuple[str, str, str], ...] = ()


def explain(name: str) -> list[Explanation]:
    """Everything that goes by a name: a key ("train.lr", "lr", "prune.ratio"), a section, pass or optimizer.

    Words of other trainers ("learning_rate") are known too.

    Raises:
        ConfigError: nothing of that name.
    """
    known = list(_everything())
    theirs, remark = known_as(name)
    for wanted in (name, theirs):
        if found := [item for item in known if wanted and item.name == wanted]:
            return found
        if found := [item for item in known if wanted and item.name.rpartition(".")[2] == wanted]:
            return found
    names = list(dict.fromkeys([item.name for item in known] + [i.name.rpartition(".")[2] for i in known]))
    raise ConfigError(
        f'nothing is called "{name}"' + (f"; {remark}" if remark else ""),
        hint=did_you_mean(name, names)
        or "give a key such as train.lr, a pass such as prune, or an optimizer",
    )


def _everything() -> Iterator[Explanation]:
    keys: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {}
    for recipe in recipe_names():
        whole = load_recipe(recipe).Config.model_json_schema()
        for key, found in _properties(whole, whole):
            keys.setdefault(key, (found, whole, []))[2].append(recipe)
    for key, (found, whole, recipes) in keys.items():
        yield _key(key, found, whole, {"of the recipes": ", ".join(recipes)})
    for kind, step in PASSES.items():
        whole = step.model_json_schema()
        rows = tuple(_row(key, found, whole) for key, found in _properties(whole, whole))
        facts = {"takes": ", ".join(sorted(step.accepts)), "gives": step.produces or "what it takes"}
        yield Explanation(kind, "pass", inspect.getdoc(step) or "", facts, rows)
        for key, found in _properties(whole, whole):
            yield _key(f"{kind}.{key}", found, whole, {"of the pass": kind})
    for optimizer, facts_ in optimizers.TABLE.items():
        facts = {
            "state": f"{facts_.state_bytes_per_parameter:g} bytes for each trained parameter",
            "options": ", ".join(f"train.{key}" for key in optimizers.SHARED if key in facts_.takes),
            "class": facts_.import_path.replace(":", "."),
        }
        if facts_.extra:
            facts["of the extra"] = facts_.extra
        yield Explanation(optimizer, "optimizer", f"train.optimizer={optimizer}", facts)


def _properties(
    section: dict[str, Any], whole: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, found in section.get("properties", {}).items():
        yield f"{prefix}{name}", found
        for part in [found, *found.get("anyOf", [])]:
            if inner := _referred(part, whole):
                yield from _properties(inner, whole, f"{prefix}{name}.")


def _referred(part: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    found = whole.get("$defs", {}).get(part.get("$ref", "").rpartition("/")[2])
    return found if found and "properties" in found else None


def _key(key: str, found: dict[str, Any], whole: dict[str, Any], facts: dict[str, str]) -> Explanation:
    sections = [inner for part in [found, *found.get("anyOf", [])] if (inner := _referred(part, whole))]
    rows = tuple(_row(name, item, whole) for inner in sections for name, item in inner["properties"].items())
    about = " ".join((found.get("description") or (sections and sections[0]["description"]) or "").split())
    default = {"default": _shown(found["default"])} if "default" in found and not sections else {}
    takes = {"takes": _takes(found, whole)}
    return Explanation(key, "section" if sections else "key", about, {**takes, **default, **facts}, rows)


def _row(key: str, found: dict[str, Any], whole: dict[str, Any]) -> tuple[str, str, str]:
    default = f"; default {_shown(found['default'])}" if "default" in found and "$ref" not in found else ""
    return key, _takes(found, whole) + default, " ".join(found.get("description", "").split())


def _takes(found: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a key takes, in words: "a whole number from 1 to 100"."""
    if "anyOf" in found:
        return " or ".join(dict.fromkeys(_takes(part, whole) for part in found["anyOf"]))
    if "$ref" in found:
        inner = whole.get("$defs", {}).get(found["$ref"].rpartition("/")[2], {})
        return "a section" if "properties" in inner else _takes(inner, whole)
    if "enum" in found or "const" in found:
        return " or ".join(_shown(value) for value in found.get("enum", [found.get("const")]))
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    words |= {"null": "null", "array": "a list", "object": "a section"}
    text = words.get(found.get("type", ""), "anything")
    bounds = [
        f"{word} {_number(found[name])}"
        for name, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if name in found
    ]
    if found.get("multipleOf"):
        bounds.append(f"in steps of {found['multipleOf']}")
    if found.get("prefixItems"):
        bounds.append(f"of {len(found['prefixItems'])}, each {_takes(found['prefixItems'][0], whole)}")
    elif isinstance(found.get("items"), dict):
        bounds.append(f"of {_takes(found['items'], whole)}")
    return " ".join([text, *bounds])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
