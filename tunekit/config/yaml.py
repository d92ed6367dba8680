"""YAML that remembers the line of every value: `extends:`, dotted overrides, duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tunekit.errors import ConfigError, did_you_mean
from tunekit.resources import configs_dir, expand

REQUIRED = "???"
COMMAND_LINE = "command line"
Key = tuple[str | int, ...]
"""Way to a value through mappings and lists: ("data", "path"), ("optimize", 0, "prune")."""

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_DIGITS = 1_000_000, 20, 10_000, 100
"""What a config file holds at most; the largest that comes with tunekit has 3 kB, 6 levels and 100 values."""

_TAG = "tag:yaml.org,2002:"
_WORDS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
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
    _Loader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


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
        name = re.sub(r"\[(\d+)\]", r".\1", name)  # as messages write it: optimize[1].prune
        parts = name.split(".")
        if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts) or len(parts) > MAX_DEPTH:
            raise ConfigError(
                f'"{_printable(text)}" is not an override',
                where=COMMAND_LINE,
                hint="write it as key.subkey=value; one with blanks in it as a whole in quotes",
            )
        where = f"{COMMAND_LINE}: {_printable(text)}"
        if not text.isprintable() and re.search("[\ud800-\udfff]", text):
            raise ConfigError("not UTF-8 text", where=where, hint="give files and folders other names")
        *sections, last = parts
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
        value = _parse_override(raw, self.path, key)
        target[step] = value.tree
        self.drop_places(key)
        self.places |= {key: COMMAND_LINE} | value.places


def _printable(text: str) -> str:
    """Text of the command line as a message can show it."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _parse_override(text: str, path: Path, key: Key) -> Document:
    """The value of an override: YAML, in which `#` begins no comment and `{prune:{ratio:0.3}}` is understood.

    Raises:
        ConfigError: bad syntax, or text behind a list or section.
    """
    value = parse(_spaced(text), path, start=key, fixed=COMMAND_LINE)
    rest = re.search(r"(^|\s)#", text)
    if rest is None or text.lstrip()[:1] in {"'", '"', "|", ">"}:
        return value
    if isinstance(value.tree, list | dict):
        raise ConfigError(
            f"what stands behind # is not read: {_printable(text[rest.start() :].strip())}",
            where=COMMAND_LINE,
            hint="put text that holds # into quotes",
        )
    if _CONTROL.search(text):
        raise ConfigError("text with a control character", where=COMMAND_LINE)
    return Document(path, text.strip(), {key: COMMAND_LINE})


def _spaced(text: str) -> str:
    """`{prune:{ratio:0.3}}` with the blanks behind the colons that YAML asks for; quoted text stays."""
    made, brackets, quote, at_key = "", "", "", False
    for index, letter in enumerate(text):
        made += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and made[:-1].rstrip()[-1:] in set("[{,:"):
            quote = letter
        elif letter in "[{":
            brackets += letter
        elif letter in "]}":
            brackets = brackets[:-1]
        elif letter == ":" and at_key and text[index + 1 : index + 2].strip():
            made += " "
        at_key = brackets[-1:] == "{" and (letter in "{," or (at_key and letter != ":"))
    return made


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
        ConfigError: bad syntax, keys given twice, text that no key can take, or more than a config can hold.
    """
    reader = _Reader(text, path, fixed)
    tree = reader.read(start)
    if reader.twice:
        problems = [reader.twice[line] for line in sorted(reader.twice)]
        listed = "\n".join(f"{found.where}: {found.key}: {found.message}" for found in problems)
        raise ConfigError(listed, parts=problems)
    return Document(path, tree, reader.places)


class _Reader:
    """One YAML text on its way to plain values.

    A file of a few bytes may stand for gigabytes, or for brackets without end, so that depth and values are
    counted before anything is built of them.
    """

    def __init__(self, text: str, path: Path, fixed: str | None) -> None:
        self.text, self.path, self.fixed = text.replace(REQUIRED, _STAND_IN), path, fixed
        self.places: dict[Key, str] = {}
        self.twice: dict[tuple[int, int], ConfigError] = {}
        self.values = 0
        self.open: list[yaml.Node] = []

    def read(self, start: Key) -> Any:
        """The value of the text; None where there is none."""
        if broken := re.search("[\ud800-\udfff]", self.text):
            self.refuse("not UTF-8 text", self.text.count("\n", 0, broken.start()))
        loader = None
        try:
            self.look()
            loader = _Loader(self.text)
            node = loader.get_single_node()
            return None if node is None else self.convert(loader, node, start)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            lines = self.text.splitlines()
            near = range(max(0, mark.line - 1), mark.line + 1) if mark else ()
            for line in near:
                if line < len(lines) and re.match(r" *\t", lines[line]):
                    self.refuse("the line is indented with a tab; YAML takes spaces alone", line)
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            hint = "put text that holds : # [ ] { } or begins with * & ! % @ into quotes"
            if self.fixed:
                hint += ", and an override with blanks in it as a whole"
            self.refuse(f"not valid YAML: {problem}", mark.line if mark else None, hint)
        finally:
            if loader is not None:
                loader.dispose()

    def refuse(self, message: str, line: int | None = None, hint: str | None = None) -> NoReturn:
        """Raises with the place of a line, counted from 0."""
        where = self.fixed or (shown(self.path) if line is None else f"{shown(self.path)}:{line + 1}")
        raise ConfigError(message, where=where, hint=hint)

    def place(self, node: yaml.Node) -> str:
        return self.fixed or f"{shown(self.path)}:{node.start_mark.line + 1}"

    def look(self) -> None:
        """Counts depth and values: the reader of nodes, which is C and calls itself, must not meet more."""
        depth = values = 0
        for event in yaml.parse(self.text, _Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            values += isinstance(event, yaml.NodeEvent)
            line = event.start_mark.line if event.start_mark else 0
            if depth > MAX_DEPTH:
                self.refuse(f"nested more than {MAX_DEPTH} deep", line)
            if values > MAX_VALUES:
                self.refuse(f"more than {MAX_VALUES} keys and values", line)

    def enter(self, node: yaml.Node) -> None:
        """Called before a node is looked into: aliases may make it part of itself, or of very much."""
        line = node.start_mark.line
        self.values += 1
        if any(node is other for other in self.open):
            self.refuse("an alias (*) here leads back to what it is in", line)
        if self.values > MAX_VALUES or len(self.open) > MAX_DEPTH:
            what = f"{MAX_VALUES} keys and values" if self.values > MAX_VALUES else f"{MAX_DEPTH} levels"
            self.refuse(f"its aliases (*) make more than {what} of it", line)

    def convert(self, loader: Any, node: yaml.Node, key: Key) -> Any:
        """The plain value of a node; notes the places of all that is in it."""
        self.enter(node)
        self.places.setdefault(key, self.place(node))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(loader, node)
        wanted = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != f"{_TAG}{wanted}":
            self.refuse(f"unknown tag {_written_tag(node)}", node.start_mark.line)
        self.open.append(node)
        try:
            if wanted == "seq":
                return [self.convert(loader, item, (*key, index)) for index, item in enumerate(node.value)]
            result = {}
            for name, (key_node, value_node) in self.pairs(node, key).items():
                child = (*key, name)
                self.places[child] = self.place(key_node)
                result[name] = self.convert(loader, value_node, child)
            return result
        finally:
            self.open.pop()

    def pairs(self, node: yaml.Node, key: Key) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The keys of a mapping, behind those of the sections that it merges (`<<`) and does not give."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse("a key is text, not a list or a section", key_node.start_mark.line)
            name = self.checked(key_node)
            if key_node.tag == f"{_TAG}merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            elif name in own:
                message = f"given twice, first at {self.place(own[name][0])}"
                found = ConfigError(message, where=self.place(key_node), key=dotted((*key, name)))
                self.twice[key_node.start_mark.line, key_node.start_mark.column] = found
            else:
                own[name] = (key_node, value_node)
        for base in merged:
            if not isinstance(base, yaml.MappingNode):
                self.refuse("<<: takes a section, or a list of sections", base.start_mark.line)
            self.enter(base)
            self.open.append(base)
            own = self.pairs(base, key) | own
            self.open.pop()
        return own

    def scalar(self, loader: Any, node: yaml.ScalarNode) -> Any:
        """Text, a number, true, false or null; a tag (`!!int`) may only say what the text is anyway."""
        text, kind = self.checked(node), node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        is_as = loader.resolve(yaml.ScalarNode, node.value, (True, False)).removeprefix(_TAG)
        if kind not in _WORDS or (is_as != kind and (kind, is_as) != ("float", "int")):
            unknown = f"unknown tag {_written_tag(node)}"
            what = f'"{text[:40]}" is not {_WORDS[kind]}' if kind in _WORDS else unknown
            self.refuse(what, node.start_mark.line)
        if kind in {"int", "float"} and len(text) > MAX_DIGITS:
            self.refuse(f"a number of more than {MAX_DIGITS} digits", node.start_mark.line)
        return loader.construct_object(node)

    def checked(self, node: yaml.ScalarNode) -> str:
        """The text of a node, of which nothing would move a terminal's cursor or end a path."""
        text = str(node.value).replace(_STAND_IN, REQUIRED)
        if found := _CONTROL.search(text):
            self.refuse(f"text with the control character U+{ord(found[0]):04X}", node.start_mark.line)
        return text


def _written_tag(node: yaml.Node) -> str:
    """A tag as one writes it."""
    return str(node.tag).replace(_TAG, "!!")


def shown(path: Path) -> str:
    """A path as messages show it: relative to here where it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError, RuntimeError):  # elsewhere, or links in a circle
        return str(path)


def config_names() -> list[str]:
    """The ready-made configs, as `read` takes them: "sd15/lora"; those of accelerate are none."""
    root = configs_dir()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("accelerate/"))


def find_config(path_or_name: str | Path) -> Path:
    """A config file: a path, or a name under the ready-made configs ("sd15/lora").

    Raises:
        ConfigError: when there is none.
    """
    text = str(path_or_name)
    for path in (expand(text), configs_dir() / text, configs_dir() / f"{text}.yaml"):
        if _is_file(path):
            return path
    hint = "give the path of a YAML file, or a name that `tunekit ls` shows"
    try:
        if expand(text).exists():
            raise ConfigError("is a folder or a device, not a config file", where=_printable(text), hint=hint)
        folder = Path(text).parent
        near = [str(folder / item.name) for item in folder.glob("*.yaml")]
    except (OSError, ValueError):  # too long for a path, or not one
        near = []
    nearest = did_you_mean(text, [*near, *config_names()])
    raise ConfigError(
        f'there is no config "{_printable(text)}"' + (f"; {nearest}" if nearest else ""), hint=hint
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"larger than {MAX_BYTES} bytes, which no config is", where=shown(path))
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text ({error.reason} at byte {error.start})",
            where=shown(path),
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=shown(path)) from error
    document = parse(text, path)
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
    places = (path.parent / expand(parent), configs_dir() / parent, configs_dir() / f"{parent}.yaml")
    base = next((candidate for candidate in places if _is_file(candidate)), None)
    if base is None:
        raise ConfigError(
            f'extends: there is no "{parent}"',
            where=where,
            hint="the path is relative to this file",
            key="extends",
        )
    if len(children) == MAX_DEPTH:
        raise ConfigError("extends: too many files, one above the other", where=where, key="extends")
    if base.resolve() in {item.resolve() for item in (*children, path)}:
        raise ConfigError(f'extends: "{parent}" leads back to this file', where=where, key="extends")
    return document.lay_over(_read_file(base, (*children, path)))
