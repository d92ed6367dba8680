"""The shape of the house: who may import whom, and who may import torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunekit.registry import PASSES, recipe_names, recipe_path
from tunekit.resources import PACKAGE

# Each imports only from those to its right; names within { } are siblings and do not know each other.
# CONTRIBUTING.md says the same.
LAYERS = """
    __main__ > cli > workspace > running > planning > passes > training > {memory, data, runtime}
        > {adapters, tasks, report, doctor} > families > {diffusion, layers, launch} > artifacts > config
        > {hardware, optimizers} > {units, registry, quiet} > resources > errors
"""
RANK = {name: rank for rank, names in enumerate(LAYERS.split(">")) for name in re.findall(r"\w+", names)}
REPOSITORY = Path(__file__).parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))
WITHOUT_TORCH = [
    "cli",
    "workspace",
    "report",
    "artifacts",
    "hardware",
    "optimizers",
    "launch",
    "planning",
    "memory.plan",
    *(f"config.{path.stem}" for path in sorted((PACKAGE / "config").glob("[!_]*.py"))),
    *(f"passes.{name}" for name in PASSES.names()),
]


def layer(module: str) -> str:
    """The part of the house a dotted name belongs to; "" for tunekit itself."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> list[tuple[int, str]]:
    """Everything of tunekit that a file imports, also inside functions, but not for type checkers only.

    A package that imports lazily, in `__getattr__`, names for type checkers what that finds: this counts.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_lazy = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test) and not is_lazy
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
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] in {"tunekit", "recipes"}]


def dotted(path: Path) -> str:
    """The name of a module by its file; a package's is that of its folder."""
    parts = ("tunekit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Which modules each module runs when it is imported or called, its own packages' `__init__` apart."""
    files = {dotted(path): path for path in MODULES}
    graph = {}
    for module, path in files.items():
        above = {module[:end] for end in range(len(module)) if module[end] == "."} | {module}
        found = set()
        for _, name in imports(path):
            parts = name.split(".")
            found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        graph[module] = (found & files.keys()) - above
    return graph


def cycles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of modules each of which reaches all others."""
    reached: dict[str, set[str]] = {}
    for start, first in graph.items():
        seen: set[str] = set()
        waiting = list(first)
        while waiting:
            if (module := waiting.pop()) not in seen:
                seen.add(module)
                waiting += graph[module]
        reached[start] = seen
    groups = (tuple(other for other in sorted(reached[one]) if one in reached[other]) for one in graph)
    return sorted({group for group in groups if group})


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


def test_contributing_states_these_layers():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = [block for block in text.split("\n\n") if block.startswith("    ") and " > " in block]
    assert [block.split() for block in blocks] == [LAYERS.split()]
    parts = {layer(f"tunekit.{path.relative_to(PACKAGE).parts[0].removesuffix('.py')}") for path in MODULES}
    assert parts - {"__init__"} == set(RANK)


def test_no_module_is_imported_in_a_circle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": set()}) == [("b", "c")]
    graph = import_graph()
    assert "tunekit.memory.plan" in graph["tunekit.memory.planner"]
    assert "tunekit.config.schema" in graph["tunekit.config"]
    found = cycles(graph)
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} imports, {len(found)} cycles")
    assert found == []


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
