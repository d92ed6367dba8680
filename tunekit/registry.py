"""A folder is the registry: its files are the names, and packages add more through entry points."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from tunekit.errors import ConfigError, did_you_mean
from tunekit.resources import PACKAGE, recipes_dir

T = TypeVar("T")


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=group)}


class Registry(Generic[T]):
    """The modules of a package inside tunekit, each of which sets one attribute.

    Names are file stems and are listed without importing anything; `get` imports just the one module.

    Args:
        package: dotted name, "tunekit.passes".
        attribute: what each module sets, "PASS".
        group: entry-point group for plug-ins; an entry point names the object itself.
        skip: stems that are no members even if they set it.
    """

    def __init__(self, package: str, attribute: str, group: str, skip: tuple[str, ...] = ()) -> None:
        self.package = package
        self.attribute = attribute
        self.group = group
        self.skip = skip

    @property
    def noun(self) -> str:
        """What a member is called in messages: "pass", "family"."""
        return self.attribute.lower()

    @cached_property
    def _builtin(self) -> list[str]:
        folder = PACKAGE.joinpath(*self.package.split(".")[1:])
        sets_it = re.compile(rf"^{self.attribute}\b", re.MULTILINE)  # helpers in the same folder do not
        return sorted(
            path.stem
            for path in folder.glob("*.py")
            if path.stem not in self.skip and sets_it.search(path.read_text(encoding="utf-8"))
        )

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted({*self._builtin, *_entry_points(self.group)})

    def get(self, name: str, *, where: str | None = None) -> T:
        """Imports one member.

        Raises:
            ConfigError: when there is none of that name.
        """
        if name in self._builtin:
            return cast(T, getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute))
        if name in _entry_points(self.group):
            return cast(T, _entry_points(self.group)[name].load())
        names = self.names()
        hint = did_you_mean(name, names)
        raise ConfigError(
            f'there is no {self.noun} "{name}"' + (f"; {hint}" if hint else ""),
            where=where,
            hint=f"known: {', '.join(names)}",
        )

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its member; imports them all."""
        for name in self.names():
            yield name, self.get(name)


FAMILIES: Registry[Any] = Registry("tunekit.families", "FAMILY", "tunekit.families")
PASSES: Registry[Any] = Registry("tunekit.passes", "PASS", "tunekit.passes")


def recipe_names() -> list[str]:
    """The recipes that come with tunekit, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.py") if not path.stem.startswith("_"))


def recipe_path(name_or_path: str, *, where: str | None = None) -> Path:
    """The file of a recipe: a name out of `recipe_names()`, or a path ending in .py.

    Raises:
        ConfigError: when there is no such recipe.
    """
    text = str(name_or_path)
    if text.endswith(".py"):
        path = Path(text).expanduser()
        if path.is_file():
            return path.resolve()
        raise ConfigError(f'the recipe file "{text}" does not exist', where=where, key="recipe")
    if text in recipe_names():
        return recipes_dir() / f"{text}.py"
    hint = did_you_mean(text, recipe_names())
    raise ConfigError(
        f'there is no recipe "{text}"' + (f"; {hint}" if hint else ""),
        where=where,
        hint=f"known: {', '.join(recipe_names())}, or the path of a recipe file (.py)",
        key="recipe",
    )


def load_recipe(name_or_path: str, *, where: str | None = None) -> ModuleType:
    """Imports a recipe, which has `Config` and `main(config, loaded)`.

    One that is named by its path is code that a config brings along: that is said on stderr before.

    Raises:
        ConfigError: when there is no such recipe, or the file is no recipe.
    """
    path = recipe_path(name_or_path, where=where)
    name = f"tunekit_recipe_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f'"{path}" cannot be imported as a recipe', where=where, key="recipe")
    if path.parent != recipes_dir().resolve():
        print(f"{where or path.name}: the recipe {path} is code, and runs from here on", file=sys.stderr)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    missing = [part for part in ("Config", "main") if not hasattr(module, part)]
    if missing:
        del sys.modules[name]
        message = f'"{path}" is no recipe: it does not define {" and ".join(missing)}'
        raise ConfigError(message, where=where, key="recipe")
    return module
