"""Strict typed sections, and errors that name file, line, key and the nearest valid name."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from tunekit.config.words import known_as
from tunekit.config.yaml import COMMAND_LINE, REQUIRED, Document, Key, dotted, read
from tunekit.errors import ConfigError, TunekitError, nearest
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


def idle(key: str, because: str) -> NoReturn:
    """Raised by validators for an option that was set and would change nothing."""
    message = f"has no effect: {because}"
    raise PydanticCustomError("tunekit_idle", "{message}", {"message": message, "key": key})


def changed(section: BaseModel, key: str) -> bool:
    """Whether the user gave `key` a value that is not its default."""
    default = type(section).model_fields[key].get_default(call_default_factory=True, validated_data={})
    return key in section.model_fields_set and getattr(section, key) != default


def no_effect(section: BaseModel, keys: Iterable[str], because: str) -> None:
    """Refuses options that were set but would change nothing."""
    for key in keys:
        if changed(section, key):
            idle(key, because)


# Every number has a top: far above what anybody wants, far below where something overflows or never ends.
MOST_STEPS = 10_000_000
Fraction = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Multiple = Annotated[int, Field(ge=16, le=4096, multiple_of=8)]


def _path_text(value: str) -> str:
    if not value.strip():
        refuse("must not be empty")
    if len(value.encode()) > 4000 or any(len(part.encode()) > 255 for part in re.split(r"[/\\]", value)):
        refuse("is too long: a path takes 4000 bytes, and a name in it 255")
    return value


PathText = Annotated[str, AfterValidator(_path_text)]
"""A path, or the name of something that may also be one, such as a hub id."""


def paths_in(section: BaseModel, *, above: str = "") -> dict[str, str]:
    """What a section and those below it have as `PathText`, by dotted key; nothing that is null."""
    found: dict[str, str] = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{above}{name}"
        if isinstance(value, BaseModel):
            found |= paths_in(value, above=f"{key}.")
        elif isinstance(value, str) and _is_path((field.annotation, *field.metadata)):
            found[key] = value
    return found


def _is_path(parts: Iterable[Any]) -> bool:
    return any(getattr(part, "func", None) is _path_text or _is_path(get_args(part)) for part in parts)


Text = Annotated[str, Field(max_length=20_000)]
Word = Annotated[str, Field(min_length=1, max_length=255)]
Names = Annotated[list[Word], Field(max_length=2000)]


# Validation -------------------------------------------------------------------------------------------------


MOST_LISTED = 20
"""Lines of what is wrong; who mends that many finds the others soon."""


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
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
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


@dataclass
class _Trouble:
    """What is wrong with the value of one key: messages, and whether it is only that it changes nothing."""

    messages: list[str]
    is_idle: bool = False


def _messages(error: ValidationError, schema: type[BaseModel], tree: Any) -> dict[Key, _Trouble]:
    """What pydantic found, in our words, by the key in the YAML that each is about."""
    found: dict[Key, _Trouble] = {}
    for detail in error.errors(include_url=False):
        kind = detail["type"]
        context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in detail.get("ctx", {}).items()}
        loc: Key = tuple(detail["loc"])
        message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else detail["msg"]
        if kind == "missing":
            key, message = loc, "is required"
        elif kind == "extra_forbidden":
            key, message = loc, f"unknown key; {_known_instead(schema, loc)}"
        elif kind in {"tunekit", "tunekit_idle"}:
            key = (*loc, *str(context["key"]).split(".")) if "key" in context else loc
        else:
            key = _placed(tree, loc)
        trouble = found.setdefault(key, _Trouble([], is_idle=kind == "tunekit_idle"))
        if message not in trouble.messages:
            trouble.messages.append(message)
    # What is wrong inside of a list says more than that it is no word, which would do as well.
    inside = {key[:-1] for key in found if key and isinstance(key[-1], int)}
    return {key: trouble for key, trouble in found.items() if key not in inside}


def _placed(tree: Any, loc: Key) -> Key:
    """A location without the members of unions that pydantic names in it, as far as there are values."""
    key: Key = ()
    for part in loc:
        if _get(tree, (*key, part))[0]:
            key = (*key, part)
    return key


def _known_instead(schema: type[BaseModel], key: Key) -> str:
    """What may be meant by an unknown key: another trainer's word, one of the section, one of another."""
    name, siblings = str(key[-1]), _field_names(schema, key[:-1])
    (theirs, remark), everywhere = known_as(name), all_keys(schema)
    if remark:
        return remark
    if theirs.rpartition(".")[2] in siblings:
        return f'did you mean "{theirs.rpartition(".")[2]}"?'
    if theirs in everywhere:
        return f'did you mean "{theirs}"?'
    elsewhere = {other.rpartition(".")[2]: other for other in reversed(everywhere)}
    found = nearest(name, siblings, cutoff=0.8) or elsewhere.get(name)
    if found is None and (leaf := nearest(name, elsewhere, cutoff=0.8)):
        found = elsewhere[leaf]
    found = found or nearest(name, siblings)
    return f'did you mean "{found}"?' if found else f"known here: {', '.join(siblings)}"


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a section and of those in it: "train", "train.max_steps", ..."""
    keys = []
    for name, item in schema.model_fields.items():
        keys.append(f"{prefix}{name}")
        for section in _section_types(item.annotation):
            keys += all_keys(section, f"{prefix}{name}.")
    return keys


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


def _not_finite(tree: Any, key: Key = ()) -> list[Key]:
    """Keys of NaN and infinity, which no key takes."""
    if isinstance(tree, float):
        return [] if math.isfinite(tree) else [key]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for name, value in items for found in _not_finite(value, (*key, name))]


def _examine(schema: type[S], tree: dict[str, Any]) -> tuple[S | None, dict[Key, _Trouble]]:
    """The section that plain values make, or what keeps them from it."""
    unset, unbounded = _required(tree), _not_finite(tree)
    found: dict[Key, _Trouble] = {}
    result: S | None = None
    try:
        # Through JSON: strict about types, yet a list may fill a tuple.
        text = json.dumps(_without(tree, {*unset, *unbounded}), default=str)
        result = schema.model_validate_json(text, strict=True)
    except ValidationError as problem:
        found = _messages(problem, schema, tree)
    found |= {key: _Trouble(["is required"]) for key in unset}
    found |= {key: _Trouble(["must be a finite number"]) for key in unbounded}
    return (None, found) if found else (result, {})


def validate(
    schema: type[S],
    tree: dict[str, Any],
    where: Callable[[Key], str],
    *,
    error: type[TunekitError] = ConfigError,
    notes: Mapping[Key, str] | None = None,
) -> S:
    """Makes a section out of plain values, strictly: 1 is not true, "1" is not a number; lists do for tuples.

    Args:
        where: the place of a key within `tree`; of its section where the key is absent.
        error: class to raise.
        notes: what is added where a key is wrong.

    Raises:
        ConfigError: (or `error`) one that lists everything that is wrong, each with place, key and reason.
    """
    result, found = _examine(schema, tree)
    if result is not None:
        return result
    lines = []
    for key, trouble in found.items():
        first, *others = trouble.messages
        message = " or ".join([first, *(text.removeprefix("must be ") for text in others)])
        present, value = _get(tree, key)
        if message == "is required":
            message += f"; set it here or give {dotted(key)}=... {_description(schema, key)}"
        elif present and message.startswith("must "):
            message += f", not {_shown_value(value)}"
        message += (notes or {}).get(key, "")
        text = f"{_shown_key(key) or schema.__name__}: {message}"
        lines.append((where(key), text, error(message, where=where(key), key=dotted(key))))
    lines.sort(key=lambda line: _line_order(line[0]))
    listed = [f"{place}: {text}" for place, text, _ in lines[:MOST_LISTED]]
    if len(lines) > MOST_LISTED:
        listed.append(f"and {len(lines) - MOST_LISTED} more")
    raise error("\n".join(listed), parts=[part for *_, part in lines])


def _shown_key(key: Key) -> str:
    text = dotted(key)
    return text if len(text) <= 100 else text[:97] + "..."


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
        warnings: options of the file that an override has left without effect, each with its place.
    """

    config: Any
    document: Document
    warnings: tuple[str, ...] = ()

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
    schema = schema or _recipe_schema(document)
    notes = _prepare(schema, document)
    warnings = _leave_out_idle(schema, document, path_or_name) if overrides else []
    return Loaded(validate(schema, document.tree, document.where, notes=notes), document, tuple(warnings))


def _prepare(schema: type[RunConfig], document: Document) -> dict[Key, str]:
    """Gives the run its name and former keys their present one; returns what to add where a key is wrong."""
    notes: dict[Key, str] = {}
    if "name" not in document.tree:
        document.tree["name"] = document.path.stem
        notes["name",] = "; it is taken from the file's name: rename the file, or give name=..."
    for former, key in getattr(schema, "moved", {}).items():
        document.move(former, key)
    return notes


def _leave_out_idle(schema: type[RunConfig], document: Document, path_or_name: str | Path) -> list[str]:
    """Leaves out what the file sets and overrides have made idle, so that a base serves many runs; says it.

    What is idle in the file alone, or was given with the overrides, stays, to be refused.
    """
    warnings: list[str] = []
    while True:
        _, found = _examine(schema, document.tree)
        of_file = {key: trouble for key, trouble in found.items() if document.where(key) != COMMAND_LINE}
        if not found or of_file != found or not all(trouble.is_idle for trouble in found.values()):
            return warnings
        if not warnings and _is_idle_alone(schema, document, path_or_name):
            return []
        for key, trouble in found.items():
            place, text = document.where(key), trouble.messages[0]
            warnings.append(f"{place}: {dotted(key)}: {text} (by the command line); left out")
            del _get(document.tree, key[:-1])[1][key[-1]]


def _is_idle_alone(schema: type[RunConfig], document: Document, path_or_name: str | Path) -> bool:
    """Whether a file has idle options also without overrides, of which only what is required is taken."""
    alone = read(path_or_name)
    _prepare(schema, alone)
    while True:
        _, found = _examine(schema, alone.tree)
        missing = [key for key, trouble in found.items() if trouble.messages[0] == "is required"]
        added = False
        for key in missing:
            present, value = _get(document.tree, key)
            section_is_there, section = _get(alone.tree, key[:-1])
            if present and section_is_there and isinstance(section, dict):
                section[key[-1]] = value
                added = True
        if not added:
            return any(trouble.is_idle for trouble in found.values())


def recipe_of(path_or_name: str | Path, overrides: Sequence[str] = ()) -> str:
    """The recipe that a config names; the config itself may still lack required values."""
    return _recipe(read(path_or_name, overrides))


def _recipe(document: Document) -> str:
    recipe = document.tree.get("recipe")
    if not isinstance(recipe, str) or recipe == REQUIRED:
        message = "recipe: is required: the name of a recipe, such as lora"
        raise ConfigError(message, where=document.where(("recipe",)), key="recipe")
    return recipe


def _recipe_schema(document: Document) -> type[RunConfig]:
    schema: type[RunConfig] = load_recipe(_recipe(document), where=document.where(("recipe",))).Config
    return schema


def dump_yaml(config: BaseModel, *, ascii_only: bool = False) -> str:
    """A config with all its defaults, as YAML that `load` reads back to the same config.

    Args:
        ascii_only: write other letters as escapes, for a stream that has none.
    """
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=not ascii_only, width=110)
