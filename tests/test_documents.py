"""What the documents tell a reader to write or to type works: every block of YAML and Python, every line of a
shell block, and the commands in the headers of configs, recipes and scripts.

README's own config is run, on the tiny model and in few steps; that run is what the lines after it read. A
command line runs through the real command, in a folder with what a reader brings (mine.yaml, photos/). Two
things are not done: other recipes, and trials of sweeps, are not launched, once all the checks before have
passed, and a plan of another family than sd15 would take a minute, so that one of sd15 is made in its place.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tunekit import cli, hardware, planning, workspace
from tunekit.artifacts import open_artifact
from tunekit.config import REQUIRED, Loaded, find_config, load
from tunekit.leases import Filled
from tunekit.memory.plan import Plan
from tunekit.passes.base import Context, run_chain
from tunekit.resources import PACKAGE, resolve_path
from tunekit.units import parse_bytes

ROOT = PACKAGE.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(\$ )?((\./)?scripts/\w|(\.venv/bin/)?(tunekit|git|pip|python|py|accelerate|source) )")
SHELLS = {"bash", "sh", "shell", "console", "powershell"}
ACTIVATE = ("source", ".venv/Scripts/Activate.ps1")
"""Bring `tunekit` onto the path of a shell."""


# Reading the documents --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Code of a document: fenced, in the language that it names, or indented, in none."""

    document: str
    line: int
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        """Whether a reader would type it: it says so, or there is a command in it."""
        return self.language in SHELLS or any(COMMAND.match(line) for line in self.text.splitlines())

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """The place and words of each command, without its comment; `a && b` are two."""
        for number, line in enumerate(self.text.splitlines(), start=self.line):
            for part in line.removeprefix("$ ").split(" && "):
                if words := shlex.split(part.replace("\\", "/"), comments=True):  # PowerShell's paths
                    yield f"{self.document}:{number}", words


def blocks(document: str, text: str) -> Iterator[Block]:
    """The code of a document, by line."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        start = index
        if fence := re.match(r"(```+)\s*(\w*)", lines[index]):
            index = lines.index(fence[1], start + 1)
            yield Block(document, start + 2, fence[2] or "text", "\n".join(lines[start + 1 : index]))
        elif lines[index].startswith("    ") and not lines[index - 1].strip():
            while index < len(lines) and (lines[index].startswith("    ") or not lines[index].strip()):
                index += 1
            yield Block(document, start + 1, "", "\n".join(line[4:] for line in lines[start:index]).rstrip())
            continue
        index += 1


def header(document: str, text: str) -> Iterator[Block]:
    """The commands that stand in the comment or docstring at the head of a config, recipe or script."""
    lines = text.splitlines()
    if lines[0].startswith('"""') or (lines[1:2] and lines[1].startswith('"""')):
        ends = [number for number, line in enumerate(lines) if line.endswith('"""') and number > 1]
        lines = lines[: ends[0]]
    else:
        lines = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for number, line in enumerate(lines, start=1):
        if told := re.match(r"(?:#   +|(?!#) *)(\S.*)", line):
            command = re.split(r" {4,}", told[1])[0]
            if COMMAND.match(command):
                yield Block(document, number, "sh", command)


HEADED = [
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "sweeps").glob("*.yaml")),
    *sorted((ROOT / "recipes").glob("*.py")),
    *sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file()),
]
BLOCKS = [
    block
    for read, paths in ((blocks, DOCUMENTS), (header, HEADED))
    for path in paths
    for block in read(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
]
YAMLS = [block for block in BLOCKS if block.language in {"yaml", "yml"}]
PYTHONS = [block for block in BLOCKS if block.language in {"python", "py"}]
LINES = [line for block in BLOCKS if block.is_shell for line in block.commands()]


def lines_of(program: str) -> list[Any]:
    """The lines that begin with a program, as parameters of a test."""
    return [
        pytest.param(words, id=f"{place} {shlex.join(words)}")
        for place, words in LINES
        if words[0].removeprefix("./").startswith(program)
    ]


def test_blocks_are_found() -> None:
    """None of the tests below passes because it has nothing to test."""
    text = """\
Text.

    tunekit ls    # all of it
    $ ls && pwd

```yaml
a: 1
```

- a list
    tunekit nothing

    tunekit/        a folder

```
tunekit prints
```
"""
    found = list(blocks("x.md", text))
    assert [(block.line, block.language, block.is_shell) for block in found] == [
        (3, "", True),
        (7, "yaml", False),
        (13, "", False),
        (16, "text", True),
    ]
    assert list(found[0].commands()) == [
        ("x.md:3", ["tunekit", "ls"]),
        ("x.md:4", ["ls"]),
        ("x.md:4", ["pwd"]),
    ]
    assert {words[1] for _, words in LINES if words[0] == "tunekit"} >= {
        *("plan", "run", "cp", "check", "generate", "bench"),
    }
    assert YAMLS and PYTHONS and lines_of("scripts/") and lines_of("pip") and lines_of("accelerate")


def test_every_line_is_of_a_kind_that_is_tested() -> None:
    untested = [("git", "clone"), ("cd", "tunekit")]
    kinds = ("tunekit", "pip", "scripts/", "python", "py", "accelerate", *ACTIVATE)
    others = [
        (place, words)
        for place, words in LINES
        if not words[0].removeprefix("./").removeprefix(".venv/bin/").startswith(kinds)
        and tuple(words[:2]) not in untested
    ]
    assert others == []


# YAML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [pytest.param(it, id=f"{it.document}:{it.line}") for it in YAMLS])
def test_yaml(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(block.text, encoding="utf-8")
    if "recipe" in yaml.safe_load(block.text.replace(REQUIRED, "given")):
        workspace.ready(load(file, stand_in="given"))


# The shell --------------------------------------------------------------------------------------------------


SHORT = {
    "prune": {"samples": 8},
    "heal": {"max_steps": 2, "batch_size": 2},
    "quantize": {"samples": 8},
    "verify": {"pictures": 1, "steps": 2},
    "benchmark": {"repeats": 1, "memory": False},
}
"""Of the README's chain, so that the tiny model is soon through it."""


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has, or has after the lines before: pictures, and the run of the README's own config.

    It is that of the tiny model, small and short, and everything else as README has it.
    """
    folder = tmp_path_factory.mktemp("brought")
    (folder / "photos").mkdir()
    for path in resolve_path("builtin/pictures/style").iterdir():
        if path.suffix == ".png":
            with Image.open(path) as picture:  # as large as photos are
                picture.convert("RGB").resize((512, 512)).save(folder / "photos" / f"{path.stem}.jpg")
        else:
            (folder / "photos" / path.name).write_bytes(path.read_bytes())
    text = next(block.text for block in YAMLS if block.document == "README.md")
    tree = yaml.safe_load(text)
    tree["model"] = {"family": tree["model"]["family"], "source": "tiny"}
    tree["data"]["resolution"] = 32
    tree["train"] |= {"max_steps": 2, "batch_size": 2}
    tree["memory"]["device"] = "cpu"
    steps = [{step: {}} if isinstance(step, str) else step for step in tree["optimize"]]
    tree["optimize"] = [
        {kind: {**settings, **SHORT.get(kind, {})}} for step in steps for kind, settings in step.items()
    ]
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "-m", "tunekit", "run", "mine.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def desk(brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with what a reader brings; the working directory of this test."""
    probe = hardware.probe  # with one GPU, `--processes 2` is refused for a reason
    monkeypatch.setattr(hardware, "probe", lambda name="auto": probe("cpu" if name == "auto" else name))
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs", ROOT / "recipes", ROOT / "sweeps", brought / "photos", brought / "runs"):
        (tmp_path / path.name).symlink_to(path)
    mine = workspace.copy("sd15/lora", "mine.yaml")
    mine.write_text(mine.read_text(encoding="utf-8").replace(REQUIRED, "photos"), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", lines_of("tunekit"))
def test_tunekit(
    words: list[str],
    desk: Path,
    tiny_sources: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[Path] = []

    def launch(recipe: Path, config: Path, *_: object, **__: object) -> int:
        launched.append(recipe)
        return 0

    planned = planning.plan_config

    def plan(loaded: Loaded, *, device: str | None, budget: str | None, **options: Any) -> list[Plan]:
        if loaded.config.model.family == "sd15" and device not in (None, "all"):
            return planned(loaded, device=device, budget=budget, **options)
        if device not in (None, "all", *planning.HERE):
            hardware.find(device)
        if budget is not None:
            parse_bytes(budget)
        return planned(load("sd15/lora", stand_in="given"), device="rtx-3060")

    monkeypatch.setattr("tunekit.launch.launch", launch)
    monkeypatch.setattr("tunekit.nodes.run_on", lambda config, *_, **__: launch(find_config(config), config))
    monkeypatch.setattr("tunekit.sweep.engine.Sweep.run", lambda sweep, worker: None)
    monkeypatch.setattr("tunekit.worker.Worker.work", lambda worker, **options: None)
    monkeypatch.setattr(planning, "plan_config", plan)
    monkeypatch.setattr("tunekit.leases.fill", lambda peers, config, overrides, folder, **_: Filled(folder))
    monkeypatch.setattr("tunekit.cli.encoding._here", lambda *_: [])
    monkeypatch.setattr("tunekit.cli.encoding._on_cluster", lambda *_: [])
    _, command, *arguments = words
    if "model.source=runs/lora" in arguments:  # of another family in each config
        family = load(arguments[0], stand_in="given").config.model.family
        arguments[arguments.index("model.source=runs/lora")] = f"model.source={tiny_sources(family)}"
    if command == "cp":
        (desk / arguments[1]).unlink(missing_ok=True)
    elif command == "compare":
        arguments += ["--steps", "1", "--out", str(desk / "compare")]
    elif command == "bench":
        arguments += ["--steps", "1", "--repeats", "1", "--no-memory"]
    expanded = [name for word in arguments for name in sorted(glob.glob(word)) or [word]]
    with pytest.raises(SystemExit) as done:
        cli.app([command, *expanded], prog_name="tunekit")
    assert done.value.code in (None, 0)
    if command == "run":
        assert launched and all(path.is_file() for path in launched)
    for option in ("--out", "--picture"):
        if option in arguments:
            assert (desk / arguments[arguments.index(option) + 1]).exists()


@cache
def help_of(script: Path) -> str:
    asked = [sys.executable, str(script), "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", [*lines_of("scripts/"), *lines_of("py"), *lines_of(".venv/bin/python")])
def test_scripts(words: list[str]) -> None:
    """A script is there, starts, and knows the options; what it passes on as overrides is right together."""
    if Path(words[0]).name in {"python", "py", "python3"}:
        words = words[1:]
    name, *arguments = words
    script = ROOT / name
    known = script.read_text(encoding="utf-8")
    if script.suffix == ".py":
        known = help_of(script)
    else:
        assert os.access(script, os.X_OK)
    for option in arguments:
        assert not option.startswith("-") or option.partition("=")[0] in known
    if "quickstart" in (script.name, *arguments[:1]):
        overrides = [word for word in arguments if re.match(r"\w+\.\w+=", word)]
        workspace.ready(load("quickstart", overrides))


@pytest.mark.parametrize("words", lines_of("accelerate"))
def test_accelerate(words: list[str], desk: Path) -> None:
    """A recipe that is started without the command is given a config of its own kind."""
    assert words[1] == "launch"
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    told = dict(zip(words[2:at:2], words[3:at:2], strict=True))
    assert Path(told.get("--config_file", words[at])).is_file()
    recipe, flag, config, *overrides = words[at:]
    assert Path(recipe).is_file() and flag == "--config"
    assert (
        load(config, [word for word in overrides if word != "..."], stand_in="x").config.recipe
        == Path(recipe).stem
    )


@pytest.mark.parametrize("words", lines_of("pip"))
def test_pip_installs_extras_that_there_are(words: list[str]) -> None:
    if "torch" in words:
        return
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"\[(.+?)\]", " ".join(words))
    assert named
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


# Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [pytest.param(it, id=f"{it.document}:{it.line}") for it in PYTHONS])
def test_python(block: Block, tmp_path: Path, tiny_source: Path) -> None:
    """A block runs; one that is a pass works in a chain, and may stand before those that are there."""
    file = tmp_path / "block.py"
    file.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("block", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "PASS"):
        return
    step = module.PASS()
    source = open_artifact(tiny_source, family="sd15")
    made = run_chain([step], source, Context(tmp_path / "run", device="cpu", say=lambda line: None))
    assert made.lineage[-1].metrics and made.hash != source.hash
    assert step.summary() in block.text
