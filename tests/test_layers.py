"""The shape of the house: who may import whom, and who may import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.registry import PASSES, recipe_names, recipe_path
from tunekit.resources import PACKAGE

# Each imports only from those below. Names on one line are siblings and do not know each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"workspace"},
    {"planning"},
    {"passes"},
    {"training"},
    {"memory", "data", "runtime"},
    {"adapters", "report", "doctor", "structures"},
    {"families"},
    {"diffusion", "layers", "launch", "graphs"},
    {"config"},
    {"hardware", "optimizers", "artifacts", "yamlfile"},
    {"units", "registry", "quiet"},
    {"resources"},
    {"errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
WITHOUT_TORCH = [
    "cli",
    "workspace",
    "config",
    "report",
    "artifacts",
    "hardware",
    "optimizers",
    "launch",
    "planning",
    "memory.plan",
    *(f"passes.{name}" for name in PASSES.names()),
]


def layer(module: str) -> str:
    """The part of the house a dotted name belongs to; "" for tunekit itself."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> list[tuple[int, str]]:
    """Every module of tunekit that a file imports, also inside functions, but not for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            if node.module == "tunekit":
                found += [(node.lineno, f"tunekit.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return [(line, name) for line, name in found if name.split(".")[0] in {"tunekit", "recipes"}]


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_imports_only_go_down(path: Path):
    own = layer("tunekit." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    if own == "__init__":  # names are imported when they are asked for: see test_public_names.py
        assert imports(path) == []
        return
    assert own in RANK, f"tunekit/{own} has no place in LAYERS"
    wrong = []
    for line, name in imports(path):
        other = layer(name)
        if name.startswith("recipes") or (other in RANK and other != own and RANK[other] <= RANK[own]):
            wrong.append(f"{path}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str):
    code = (
        f"import sys, tunekit.{module};"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'onnx'} & set(sys.modules);"
        "sys.exit(f'imports {heavy} at the top' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_say_what_they_take_without_torch(name: str):
    code = (
        "import sys; from tunekit.registry import load_recipe;"
        f"load_recipe({name!r}).Config.model_json_schema();"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert ast.get_docstring(ast.parse(recipe_path(name).read_text(encoding="utf-8")))


def test_families_are_compared_only_inside_families():
    from tunekit.registry import FAMILIES

    names = set(FAMILIES.names())
    wrong = []
    for path in MODULES:
        if layer("tunekit." + path.relative_to(PACKAGE).as_posix().replace("/", ".")) == "families":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if names & {value for value in constants if isinstance(value, str)}:
                    wrong.append(f"{path}:{node.lineno}")
    assert not wrong
