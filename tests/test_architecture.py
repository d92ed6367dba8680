"""The shape of the house: who may import whom, and who may import torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunekit.registry import FAMILIES, PASSES, recipe_names, recipe_path
from tunekit.resources import PACKAGE

# Each imports only from those to its right; names within { } are siblings and do not know each other.
# CONTRIBUTING.md says the same.
LAYERS = """
    __main__ > cli > {sweep, nodes} > cluster > {worker, leases} > workspace
        > {explain, running, comparison, encoding} > preconditions > planning > passes > training
        > {memory, data, runtime} > {adapters, tasks, report, doctor, card} > families
        > {diffusion, layers, launch, networks} > artifacts > config
        > {hardware, optimizers, progress, jobs, ranks}
        > {units, registry, quiet, kept, records, provenance} > resources > files > errors > install
"""
RANK = {name: rank for rank, names in enumerate(LAYERS.split(">")) for name in re.findall(r"\w+", names)}
REPOSITORY = Path(__file__).parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))
WITHOUT_TORCH = [
    "cli",
    "workspace",
    "explain",
    "report",
    "artifacts",
    "hardware",
    "optimizers",
    "launch",
    "nodes",
    "ranks",
    "planning",
    "preconditions",
    "worker",
    "leases",
    "encoding",
    "cluster",
    "sweep.engine",
    "memory.plan",
    *(f"config.{path.stem}" for path in sorted((PACKAGE / "config").glob("[!_]*.py"))),
    *(f"passes.{name}" for name in PASSES.names()),
]


def layer(module: str) -> str:
    """The part of the house a dotted name belongs to; "" for tunekit itself."""
    return [*module.split("."), ""][1]


def imports(path: Path) -> list[tuple[int, str]]:
    """Everything of tunekit that a file imports, also inside functions, but not for type checkers only.

    A package that imports lazily, in `__getattr__`, names for type checkers what that finds: this counts. Not
    so for tunekit itself, whose names stand above all others and are imported by nobody here.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_lazy = path.parent != PACKAGE and any(
        isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body
    )
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


# A family's name is known inside families/ alone -----------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What tells families apart.

    Attributes:
        names: "sdxl".
        others: titles, classes of pipelines, names of bases: whatever else belongs to some families only.
        classes: of the families themselves.
    """

    names: frozenset[str]
    others: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()

    @classmethod
    def of_all(cls) -> Known:
        """Of every family that is there, also those that are planned only."""
        found = [family for _, family in FAMILIES.items()]
        others = set()
        for facts in (family.facts for family in found):
            others |= {facts.title, facts.base_title, facts.ss_base_model_version, *facts.pipeline_classes}
            others |= {facts.modelspec_architecture, facts.default_source}
        classes = frozenset(type(family).__name__ for family in found)
        return cls(frozenset(FAMILIES.names()), frozenset(others - {""}), classes)

    def is_part(self, text: str) -> bool:
        """Whether a text can tell one name from another by a piece of it."""
        return len(text) > 1 and text not in WORDS and any(text in name for name in self.names)


WORDS = {"image"}
"""Pieces of a family's name that mean something else."""
PIECES = {"startswith", "endswith", "removeprefix", "removesuffix", "find", "index", "count", "partition"}
PIECES |= {"rpartition", "split", "match", "fullmatch", "search", "compile", "fnmatch", "replace"}
"""Functions that compare a text with a part of another."""


def told_apart(source: str, known: Known) -> list[tuple[int, str]]:
    """Where a module tells families apart: (line, what it says).

    A text that is a family's name has no other use than to be compared, be it by ==, in, match, a table or
    its `get`; so each of them counts that is no docstring. A piece of a name counts in a comparison and in
    what compares pieces. So do the modules and classes of the families.
    """
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if isinstance(parents.get(node), ast.Expr):
                continue  # a docstring
            whole = text in known.names or text in known.others or text in known.classes
            if whole or (known.is_part(text) and _compares_pieces(node, parents)):
                found.append((node.lineno, text))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                path = f"{module}.{alias.name}" if module else alias.name
                parts = path.split(".")
                inside = parts[:2] == ["tunekit", "families"]
                if inside and (known.names & set(parts[2:]) or parts[-1] in known.classes):
                    found.append((node.lineno, path))
        elif isinstance(node, ast.Attribute) and node.attr in known.names | known.classes:
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.keyword) and node.arg in known.names:
            found.append((node.value.lineno, node.arg))  # dict(sdxl=...)
    return sorted(found)


def _compares_pieces(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a text stands in a comparison, or is given to a function that compares pieces."""
    while (above := parents.get(node)) is not None and not isinstance(above, ast.stmt):
        if isinstance(above, ast.Compare | ast.pattern):
            return True
        if isinstance(above, ast.Call):
            name = getattr(above.func, "attr", getattr(above.func, "id", ""))
            return name in PIECES and node is not above.func
        if not isinstance(above, ast.Tuple | ast.List | ast.Set | ast.BoolOp):
            return False
        node = above
    return False


PRETENDED = Known(
    frozenset({"sd15", "sdxl", "flux"}),
    frozenset({"Stable Diffusion XL", "FluxPipeline"}),
    frozenset({"SDXL"}),
)


@pytest.mark.parametrize(
    "code",
    [
        'name == "sdxl"',
        '"sdxl" != family.name',
        'name in ("sd15", "sdxl")',
        'name not in {"flux"}',
        'name is "flux"',
        'SPECIAL = frozenset(["flux"])',
        'match name:\n    case "sdxl":\n        pass',
        'match name:\n    case "sd15" | "sdxl":\n        pass',
        'match name:\n    case "sd" | "other":\n        pass',
        'match config:\n    case {"family": "flux"}:\n        pass',
        'name.startswith("sd")',
        'name.startswith(("fl", "other"))',
        'name.endswith("xl")',
        'name.removesuffix("xl") != name',
        'name[:2] == "sd"',
        '"xl" in name',
        'not "xl" in name',
        're.match("flu", name)',
        'fnmatch(name, "sdxl")',
        'steps = {"sdxl": 40, "sd15": 30}[name]',
        'table["sdxl"]',
        'table.get("sdxl")',
        'table.setdefault("flux", 1)',
        "dict(sdxl=40).get(name, 30)",
        'getattr(settings, "sdxl")',
        "settings.sdxl",
        'families.get("sd15") is family',
        'def steps(family="sdxl"):\n    pass',
        'CODES = ["sdxl"]',
        'family.facts.title == "Stable Diffusion XL"',
        'type(pipeline).__name__ == "FluxPipeline"',
        'type(family).__name__ == "SDXL"',
        "isinstance(family, sdxl.SDXL)",
        "from tunekit.families.sdxl import SDXL",
        "from tunekit.families import sdxl",
        "import tunekit.families.flux",
        'if x:\n    value = 1 if name == "sdxl" else 2',
    ],
)
def test_a_comparison_of_families_is_found(code: str):
    assert told_apart(code, PRETENDED), code


@pytest.mark.parametrize(
    "code",
    [
        '"""Works for sdxl."""',
        'def f():\n    """sdxl"""',
        'class A:\n    x: int = 1\n    """sdxl"""',
        'hint = "such as sdxl or flux"',
        'print(f"the family {name} is no sdxl of mine")',
        "name == other",
        "name in families.runnable()",
        "families.get(name).facts.sampling",
        "from tunekit.families import get, sizes_of",
        "from tunekit.families.family import Family",
        'name == "s"',
        'name.startswith("")',
        'name.startswith("FlowMatch")',
        'key == "unet"',
        'say("sd")',
        'extra = {"sd": 1}',
        "sdxl = 5",
    ],
)
def test_what_compares_no_families_is_left_alone(code: str):
    assert told_apart(code, PRETENDED) == []


def test_families_are_told_apart_only_inside_families():
    known = Known.of_all()
    assert {"sd15", "sd2", "sdxl", "sd3", "flux"} <= known.names and "SDXL" in known.classes
    inside = PACKAGE / "families"
    files = [path for path in MODULES if not path.is_relative_to(inside)]
    files += sorted((REPOSITORY / "recipes").rglob("*.py"))
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {text}"
        for path in files
        for line, text in told_apart(path.read_text(encoding="utf-8"), known)
    ]
    assert wrong == []
    within = [told_apart(path.read_text(encoding="utf-8"), known) for path in inside.glob("*.py")]
    assert sum(map(len, within)) > 30  # the families themselves
