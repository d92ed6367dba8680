"""Paths of modules as a config names them: `up_blocks.-1` is the last of `up_blocks`, `*.attn2` each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from tunekit.errors import did_you_mean


def under(name: str, paths: Iterable[str], names: Collection[str]) -> bool:
    """Whether module `name` is one of `paths` or lies below one; `names` are those of all modules."""
    return any(_lies_under(name, resolve(path, names)) for path in paths)


def resolve(path: str, names: Collection[str]) -> str:
    """Writes a negative index as what it counts to: `up_blocks.-1` is `up_blocks.3` if that is the last."""
    parts: list[str] = []
    for part in path.split("."):
        if part.startswith("-") and part[1:].isdigit():
            siblings = _below(parts, names)
            part = str(max((int(index) for index in siblings if index.isdigit()), default=-1) + 1 + int(part))
        parts.append(part)
    return ".".join(parts)


def unmatched(paths: Iterable[str], names: Collection[str]) -> str | None:
    """What to say of the first path that names no module, with the nearest name; None if all do."""
    for path in paths:
        parts = resolve(path, names).split(".")
        if "*" in path:
            if not any(fnmatchcase(name, ".".join(parts)) for name in names):
                last = parts[-1].strip("*")
                known = {part for name in names for part in name.split(".") if not part.isdigit()}
                return (
                    f'"{path}" matches nothing; {did_you_mean(last, known) or "a * stands for any letters"}'
                )
            continue
        for index, part in enumerate(parts):
            siblings = _below(parts[:index], names)
            if part not in siblings:
                place = f" in {'.'.join(parts[:index])}" if index else ""
                hint = did_you_mean(part, siblings) or f"there are {', '.join(sorted(siblings)) or 'none'}"
                return f'"{path}" names nothing: there is no {part}{place}; {hint}'
    return None


def _lies_under(name: str, path: str) -> bool:
    if "*" in path:
        return fnmatchcase(name, path) or fnmatchcase(name, f"{path}.*")
    return name == path or name.startswith(f"{path}.")


def _below(parts: list[str], names: Collection[str]) -> set[str]:
    """What stands one level below a path."""
    split = (name.split(".") for name in names)
    return {name[len(parts)] for name in split if len(name) > len(parts) and name[: len(parts)] == parts}
