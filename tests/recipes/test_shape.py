"""How recipes look: scripts that can be read aloud, with one loss between them."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import pytest

from tunekit.registry import recipe_names, recipe_path
from tunekit.resources import PACKAGE

LONGEST = {"lora": 90, "dreambooth": 90, "optimize": 110}


def lines(path: Path) -> list[str]:
    """What the lines say, without imports, comments and blank lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    text = path.read_text(encoding="utf-8").splitlines()
    kept = [line.strip() for number, line in enumerate(text, start=1) if number not in skipped]
    return [line for line in kept if line and not line.startswith("#")]


def longest_shared(one: list[str], other: list[str]) -> int:
    """Length of the longest run of lines that stands in both."""
    best, ends = 0, [0] * (len(other) + 1)
    for line in one:
        fresh = [0] * (len(other) + 1)
        for at, known in enumerate(other, start=1):
            if line == known:
                fresh[at] = ends[at - 1] + 1
                best = max(best, fresh[at])
        ends = fresh
    return best


@pytest.mark.parametrize(("one", "other"), list(combinations(recipe_names(), 2)))
def test_recipes_share_no_block_of_ten_lines(one: str, other: str) -> None:
    shared = longest_shared(lines(recipe_path(one)), lines(recipe_path(other)))
    print(f"{one} and {other} share at most {shared} lines in a row")
    assert shared < 10


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_short(name: str) -> None:
    count = len(recipe_path(name).read_text(encoding="utf-8").splitlines())
    print(f"{name}: {count} lines")
    assert count <= LONGEST[name]


def test_one_loss_between_them() -> None:
    """No recipe writes a loss of its own, and the squared error of noise is written once in the package."""
    for name in recipe_names():
        functions = [
            node.name
            for node in ast.walk(ast.parse(recipe_path(name).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        ]
        assert not [function for function in functions if "loss" in function]
    homes = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "objective.loss(" in path.read_text(encoding="utf-8")
    ]
    assert homes == ["tasks.py"]
