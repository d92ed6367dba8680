"""Strict typed sections, and errors that name file, line, key and the nearest valid name."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from tunekit.config.yaml import REQUIRED, Document, Key, dotted, read
from tunekit.errors import ConfigError, TunekitError, did_you_mean
from tunekit.registry import load_recipe

if TYPE_CHECKING:
    from tunekit.config.run import RunConfig

S = TypeVar("S", bound=BaseModel)


# Sections --------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """Base of all that is read from YAML: frozen, no unknown keys, a field's docstring describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def refuse(message: str) -> NoReturn:
    """Raised by validators of one field."""
    raise PydanticCustomError("tunekit", "{message}", {"message": message})


def wrong(key: str, message: str) -> NoReturn:
    """Raised by validators over a whole section, so that the message still points at the line of `key`."""
    raise PydanticCustomError("tunekit", "{message}", {"message": message, "key": key})


def changed(section: BaseModel, key: str) -> bool:
    """Whether the user gave `key` a value that is not its default."""
    default = type(section).model_fields[key].get_default(call_default_factory=True, validated_data={})
    return key in section.model_fields_set and getattr(section, key) != default


def no_effect(section: BaseModel, keys: Iterable[str], because: str) -> None:
    """Refuses options that were set but would change nothing."""
    for key in keys:
        if changed(section, key):
            wrong(key, f"has no effect: {because}")


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Multiple = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


# Validation -------------------------------------------------------------------------------------------------


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The sections within an annotation such as `AdapterConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        return [found for part in get_args(annotation) for found in _section_types(part)]
    return []


def _field_names(schema: type[BaseModel], key: Key) -> list[str]:
    """The keys that the section at `key` takes."""
    current = [schema]
    for part in key:
        if isinstance(part, int):
            continue
        current = [
            found
            for model in current
            if part in model.model_fields
            for found in _section_types(model.model_fields[part].annotation)
        ]
    return [name for model in current for name in model.model_fields]


_MESSAGES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be a finite number",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "literal_error": "must be {expected}",
}


def _shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _get(tree: Any, key: Key) -> tuple[bool, Any]:
    for part in key:
        keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
        if part not in keys:
            return False, None
        tree = tree[part]
    return True, tree


def _messages(error: ValidationError, schema: type[BaseModel], tree: Any) -> dict[Key, list[str]]:
    """What pydantic found, in our words, by the key in the YAML that each is about."""
    found: dict[Key, list[str]] = {}
    for detail in error.errors(include_url=False):
        kind = detail["type"]
        context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in detail.get("ctx", {}).items()}
        loc: Key = tuple(detail["loc"])
        message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else detail["msg"]
        if kind in {"missing", "extra_forbidden"}:
            key = loc
            if kind == "missing":
                message = "is required"
            else:
                hint = did_you_mean(str(loc[-1]), _field_names(schema, loc[:-1]))
                names = ", ".join(_field_names(schema, loc[:-1]))
                message = f"unknown key; {hint or 'known here: ' + names}"
        elif kind == "tunekit":
            key = (*loc, *str(context["key"]).split(".")) if "key" in context else loc
        else:
            key = loc
            while key and not _get(tree, key)[0]:  # pydantic names the members of a union in the location
                key = key[:-1]
        messages = found.setdefault(key, [])
        if message not in messages:
            messages.append(message)
    return found


def _required(tree: Any, key: Key = ()) -> list[Key]:
    """Keys whose value is `???`."""
    if tree == REQUIRED:
        return [key]
    items: Iterable[tuple[str | int, Any]] = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    )
    return [found for name, value in items for found in _required(value, (*key, name))]


def _without(tree: Any, keys: set[Key], key: Key = ()) -> Any:
    if isinstance(tree, dict):
        return {
            name: _without(value, keys, (*key, name))
            for name, value in tree.items()
            if (*key, name) not in keys
        }
    if isinstance(tree, list):
        return [_without(v, keys, (*key, i)) for i, v in enumerate(tree)]
    return tree


def _description(schema: type[BaseModel], key: Key) -> str:
    current = [schema]
    description = ""
    for part in key:
        fields = [model.model_fields[str(part)] for model in current if str(part) in model.model_fields]
        description = next((item.description for item in fields if item.description), "")
        current = [found for item in fields for found in _section_types(item.annotation)]
    return f"({description.rstrip('.')})" if description else "on the command line"


def validate(
    schema: type[S],
    tree: dict[str, Any],
    where: Callable[[Key], str],
    *,
    error: type[TunekitError] = ConfigError,
) -> S:
    """Makes a section out of plain values, strictly: 1 is not true, "1" is not a number; lists do for tuples.

    Args:
        where: the place of a key within `tree`; of its section where the key is absent.
        error: class to raise.

    Raises:
        ConfigError: (or `error`) one that lists everything that is wrong, each with place, key and reason.
    """
    unset = _required(tree)
    found: dict[Key, list[str]] = {}
    result: S | None = None
    try:
        # Through JSON: strict about types, yet a list may fill a tuple.
        text = json.dumps(_without(tree, set(unset)), default=str)
        result = schema.model_validate_json(text, strict=True)
    except ValidationError as problem:
        found = _messages(problem, schema, tree)
    for key in unset:
        found[key] = ["is required"]
    if not found and result is not None:
        return result
    lines = []
    for key, messages in found.items():
        message = " or ".join([messages[0], *(text.removeprefix("must be ") for text in messages[1:])])
        present, value = _get(tree, key)
        if message == "is required":
            message += f"; set it here or give {dotted(key)}=... {_description(schema, key)}"
        elif present and message.startswith("must "):
            message += f", not {_shown_value(value)}"
        text = f"{dotted(key) or schema.__name__}: {message}"
        lines.append((where(key), text, error(message, where=where(key), key=dotted(key))))
    lines.sort(key=lambda line: _line_order(line[0]))
    listed = "\n".join(f"{place}: {text}" for place, text, _ in lines)
    raise error(listed, parts=[part for *_, part in lines])


def _line_order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (place, 0)


# Loading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A validated config and where each of its values came from.

    Attributes:
        config: the validated config.
        document: the values as read, and their places.
    """

    config: Any
    document: Document

    @property
    def path(self) -> Path:
        """The file."""
        return self.document.path

    @property
    def tree(self) -> dict[str, Any]:
        """The merged plain values, before defaults."""
        return dict(self.document.tree)

    def where(self, key: Key | str = ()) -> str:
        """The place of a key ("configs/x.yaml:12"); of the nearest enclosing section where it is absent."""
        return self.document.where(tuple(key.split(".")) if isinstance(key, str) else key)

    def chain_where(self, index: int, key: str | None = None) -> str:
        """The place of item `index` of `optimize:`, or of one key of that pass."""
        parent: Key = ("optimize", index)
        if key is not None:
            item = self.tree.get("optimize", [])[index]
            parent = (*parent, *(item if isinstance(item, dict) else ()), key)
        return self.where(parent)


def load(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    schema: type[RunConfig] | None = None,
    *,
    stand_in: str | None = None,
) -> Loaded:
    """Reads and validates a config.

    Args:
        path_or_name: a path, or a name under the ready-made configs ("sd15/lora").
        overrides: `a.b=c` each; the value is YAML.
        schema: the recipe's `Config`; found through `recipe:` if not given.
        stand_in: taken for values that are required and not given, by those who do not need them (a plan
            needs no pictures).

    Raises:
        ConfigError: one that lists everything that is wrong, each with file and line.
    """
    document = read(path_or_name, overrides)
    if stand_in is not None:
        for *path, last in _required(document.tree):
            _get(document.tree, tuple(path))[1][last] = stand_in
    document.tree.setdefault("name", document.path.stem)
    schema = schema or _recipe_schema(document)
    for former, key in getattr(schema, "moved", {}).items():
        document.move(former, key)
    return Loaded(validate(schema, document.tree, document.where), document)


def load_schema(path_or_name: str | Path, overrides: Sequence[str] = ()) -> type[RunConfig]:
    """The `Config` class of a config's recipe; the config itself may still lack required values."""
    return _recipe_schema(read(path_or_name, overrides))


def _recipe_schema(document: Document) -> type[RunConfig]:
    recipe = document.tree.get("recipe")
    where = document.where(("recipe",))
    if not isinstance(recipe, str) or recipe == REQUIRED:
        message = "recipe: is required: the name of a recipe, such as lora"
        raise ConfigError(message, where=where, key="recipe")
    schema: type[RunConfig] = load_recipe(recipe, where=where).Config
    return schema


def dump_yaml(config: BaseModel) -> str:
    """A config with all its defaults, as YAML that `load` reads back to the same config."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
