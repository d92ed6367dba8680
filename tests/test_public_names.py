"""What `import tunekit` offers."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tunekit
from tunekit.errors import ArtifactError, ConfigError, TunekitError

NAMES = {
    "Artifact",
    "Pass",
    "__version__",
    "generate",
    "load",
    "open_artifact",
    "open_runtime",
    "plan",
    "run",
}


def test_the_list() -> None:
    assert set(tunekit.__all__) == NAMES
    assert len(tunekit.__all__) == len(NAMES)
    assert set(dir(tunekit)) >= NAMES
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        tunekit.genrate  # noqa: B018


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_each_is_there_and_documented(name: str) -> None:
    found = getattr(tunekit, name)
    assert inspect.getdoc(found)
    assert vars(tunekit)[name] is found  # asked for once
    assert getattr(__import__("tunekit", fromlist=[name]), name) is found
    assert found.__module__ == tunekit._HOMES[name]


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse(Path(tunekit.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunekit.")
        for alias in node.names
    }
    assert seen == tunekit._HOMES


def test_importing_it_imports_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import tunekit; tunekit.__version__; dir(tunekit);"
        "new = set(sys.modules) - before - {'tunekit'};"
        "new = [name for name in new if name.partition('.')[0] not in sys.stdlib_module_names];"
        "sys.exit(f'imports {new}' if new else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_need_no_torch_import_none() -> None:
    light = sorted(NAMES - {"open_runtime"})
    code = f"import sys; from tunekit import {', '.join(light)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_example_in_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(tunekit)
    assert len(example.examples) > 5
    said: list[str] = []
    runner = doctest.DocTestRunner()
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


def test_plan_takes_what_is_loaded() -> None:
    loaded = tunekit.load("tiny/lora")
    with pytest.raises(ConfigError, match="no effect on a config that is loaded"):
        tunekit.plan(loaded, "train.lr=1", device="rtx-3060")
    with pytest.raises(TunekitError, match="trains nothing"):
        tunekit.plan("sd15/optimize", device="rtx-3060")


@pytest.mark.parametrize(("code", "kind"), [(1, "TunekitError"), (2, "TunekitError"), (130, "Interrupted")])
def test_a_run_that_fails_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunekit.launch.launch", lambda *_, **__: code)
    with pytest.raises(TunekitError) as caught:
        tunekit.run("tiny/lora")
    assert (type(caught.value).__name__, caught.value.exit_code) == (kind, code)
    assert caught.value.where == "runs/tiny-lora"


def test_mistakes_are_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.launch.launch", lambda *_, **__: pytest.fail("launched"))
    with pytest.raises(ConfigError, match="unknown key"):
        tunekit.run("tiny/lora", "train.lrr=1")
    with pytest.raises(ArtifactError, match="there is no"):
        tunekit.run("tiny/lora", "model.source=tinny")
    monkeypatch.setattr("tunekit.runtime.open_runtime", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(TypeError, match="takes no step"):
        tunekit.generate("tiny", "x", family="sd15", step=2)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"generate\(\): steps: must be at most 1000"):
        tunekit.generate("tiny", "x", family="sd15", steps=5000)
