"""YAML that remembers the line of every value: `extends:`, dotted overrides, duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunekit.errors import ConfigError, did_you_mean
from tunekit.resources import configs_dir

REQUIRED = "???"
COMMAND_LINE = "command line"
Key = tuple[str | int, ...]
"""Way to a value through mappings and lists: ("data", "path"), ("optimize", 0, "prune")."""

_STAND_IN = "\ue000\ue000\ue000"  # inside { } YAML would read a bare ??? as syntax


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 without its surprises: 1e-4 is a number; dates, `on` and `12:30` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].rpartition(":")[2] in {"null", "merge"}]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def dotted(key: Iterable[str | int]) -> str:
    """("optimize", 0, "prune") -> "optimize[0].prune"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass
class Document:
    """Plain values, and the place ("file:line" or "command line") of each key and list item."""

    path: Path
    tree: Any
    places: dict[Key, str] = field(repr=False)

    def where(self, key: Key = ()) -> str:
        """The place of a value; of the nearest enclosing section where it is absent."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return shown(self.path)

    def drop_places(self, prefix: Key) -> None:
        """Forgets the places of a value that is replaced."""
        self.places = {key: place for key, place in self.places.items() if key[: len(prefix)] != prefix}

    def move(self, former: Key, key: Key) -> None:
        """Puts a value that is given under its former name where it belongs; its place stays.

        Raises:
            ConfigError: it is given under both names.
        """
        *path, last = former
        *target, name = key
        section = self.tree
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            return
        place, there = self.where(former), self.tree
        for part in target:
            there = there.setdefault(part, {}) if isinstance(there, dict) else None
        if not isinstance(there, dict):
            return  # it is no section, which is said when it is validated
        if name in there:
            raise ConfigError(
                f"{dotted(former)}: is the former name of {dotted(key)}, which is set too",
                where=place,
                key=dotted(former),
            )
        there[name] = section.pop(last)
        self.places = {**self.places, key: place}

    def lay_over(self, base: Document) -> Document:
        """This document on top of `base`: mappings merge, everything else replaces."""
        result = Document(self.path, base.tree, dict(base.places))

        def merge(below: Any, above: Any, key: Key) -> Any:
            if isinstance(below, dict) and isinstance(above, dict):
                if key in self.places:
                    result.places[key] = self.places[key]
                merged = {name: merge(below.get(name), value, (*key, name)) for name, value in above.items()}
                return below | merged
            result.drop_places(key)
            result.places |= {k: place for k, place in self.places.items() if k[: len(key)] == key}
            return above

        result.tree = merge(base.tree, self.tree, ())
        return result

    def override(self, text: str) -> None:
        """Applies one `a.b=c`; c is YAML.

        Raises:
            ConfigError: not of that form, or a part of the way is no section.
        """
        name, equals, raw = text.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            raise ConfigError(
                f'"{text}" is not an override', where=COMMAND_LINE, hint="write it as key.subkey=value"
            )
        where = f"{COMMAND_LINE}: {text}"
        *sections, last = name.split(".")
        target: Any = self.tree
        key: Key = ()
        for part in sections:
            step = _step(target, key, part, where)
            key = (*key, step)
            if isinstance(target, dict) and target.get(part) in (None, REQUIRED):
                target[part] = {}
                self.places[key] = COMMAND_LINE
            target = target[step]
        step = _step(target, key, last, where)
        key = (*key, step)
        value = parse(raw, self.path, start=key, fixed=COMMAND_LINE)
        target[step] = value.tree
        self.drop_places(key)
        self.places |= {key: COMMAND_LINE} | value.places


def _step(target: Any, key: Key, part: str, where: str) -> str | int:
    """The next step from `target` (at `key`) towards `part`: a name in a mapping, a position in a list."""
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise ConfigError(f'"{dotted(key)}" is a value, not a section', where=where)
    if not part.isdigit() or int(part) >= len(target):
        message = f'"{dotted(key)}" is a list of {len(target)}, counted from 0; "{part}" is no position in it'
        raise ConfigError(message, where=where)
    return int(part)


def parse(text: str, path: Path, *, start: Key = (), fixed: str | None = None) -> Document:
    """Reads YAML text.

    Args:
        text: the YAML.
        path: the file it is from.
        start: key of the outermost value.
        fixed: place of every value, instead of file and line.

    Raises:
        ConfigError: bad syntax, or keys given twice.
    """
    places: dict[Key, str] = {}
    problems: list[ConfigError] = []
    loader = _Loader(text.replace(REQUIRED, _STAND_IN))

    def place(node: yaml.Node) -> str:
        return fixed or f"{shown(path)}:{node.start_mark.line + 1}"

    def convert(node: yaml.Node, key: Key) -> Any:
        places.setdefault(key, place(node))
        if not isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in {"map", "seq"}:
            raise yaml.constructor.ConstructorError(None, None, f"unknown tag {node.tag}", node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [convert(item, (*key, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            value = loader.construct_object(node)
            return value.replace(_STAND_IN, REQUIRED) if isinstance(value, str) else value
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            child = (*key, str(key_node.value))
            if child in places:
                message = f"given twice, first at {places[child]}"
                problems.append(ConfigError(message, where=place(key_node), key=dotted(child)))
                continue
            places[child] = place(key_node)
            result[str(key_node.value)] = convert(value_node, child)
        return result

    try:
        node = loader.get_single_node()
        tree = None if node is None else convert(node, start)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = fixed or (f"{shown(path)}:{mark.line + 1}" if mark else shown(path))
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "put text that holds : # [ ] { } or begins with * & ! % @ into quotes"
        raise ConfigError(f"not valid YAML: {problem}", where=where, hint=hint) from error
    finally:
        loader.dispose()
    if problems:
        listed = "\n".join(f"{found.where}: {found.key}: {found.message}" for found in problems)
        raise ConfigError(listed, parts=problems)
    return Document(path, tree, places)


def shown(path: Path) -> str:
    """A path as messages show it: relative to here where it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def config_names() -> list[str]:
    """The ready-made configs, as `read` takes them: "sd15/lora"."""
    root = configs_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_config(path_or_name: str | Path) -> Path:
    """A config file: a path, or a name under the ready-made configs ("sd15/lora").

    Raises:
        ConfigError: when there is none.
    """
    text = str(path_or_name)
    for path in (Path(text).expanduser(), configs_dir() / text, configs_dir() / f"{text}.yaml"):
        if path.is_file():
            return path
    folder = Path(text).parent
    near = [str(folder / item.name) for item in folder.glob("*.yaml")]
    hint = did_you_mean(text, [*near, *config_names()])
    raise ConfigError(
        f'there is no config "{text}"' + (f"; {hint}" if hint else ""),
        hint="give the path of a YAML file, or a name that `tunekit ls` shows",
    )


def read(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Reads a config file, what it extends, and the overrides; nothing is validated yet.

    Raises:
        ConfigError: missing, unreadable, bad YAML, bad `extends:` or bad override.
    """
    document = _read_file(find_config(path_or_name), ())
    for text in overrides:
        document.override(text)
    return document


def _read_file(path: Path, children: tuple[Path, ...]) -> Document:
    try:
        document = parse(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text ({error.reason} at byte {error.start})", where=shown(path)
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=shown(path)) from error
    if document.tree is None:
        document.tree = {}
    if not isinstance(document.tree, dict):
        raise ConfigError("a config is a mapping of keys to values", where=f"{shown(path)}:1")
    parent = document.tree.pop("extends", None)
    if parent is None:
        return document
    where = document.where(("extends",))
    document.drop_places(("extends",))
    if not isinstance(parent, str):
        raise ConfigError("extends: takes the path of one config file", where=where, key="extends")
    # A config that was copied out of the ready-made ones still finds what it extends.
    candidates = (path.parent / parent, configs_dir() / parent, configs_dir() / f"{parent}.yaml")
    base = next((candidate for candidate in candidates if candidate.is_file()), None)
    if base is None:
        raise ConfigError(
            f'extends: there is no "{parent}"',
            where=where,
            hint="the path is relative to this file",
            key="extends",
        )
    if base.resolve() in {item.resolve() for item in (*children, path)}:
        raise ConfigError(f'extends: "{parent}" leads back to this file', where=where, key="extends")
    return document.lay_over(_read_file(base, (*children, path)))
