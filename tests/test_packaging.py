"""The wheel holds what the checkout holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tunekit import install, resources
from tunekit.config.yaml import config_names
from tunekit.registry import FAMILIES, PASSES, recipe_names

ROOT = resources.PACKAGE.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout and unpacked somewhere else."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "tunekit", *arguments]
    return subprocess.run(
        command, cwd=installed, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_wheel_has_recipes_configs_and_assets(installed: Path):
    found = json.loads(run(installed, "ls", "--json"))
    assert list(found["recipes"]) == recipe_names()
    assert list(found["configs"]) == config_names()
    assert list(found["sweeps"]) == resources.sweep_names() == ["rank"]
    assert list(found["families"]) == FAMILIES.names()
    assert list(found["passes"]) == PASSES.names()
    assert (installed / "tunekit" / "_recipes" / "lora.py").is_file()
    packed = {path.relative_to(installed / "tunekit") for path in (installed / "tunekit").rglob("*.*")}
    tracked = {path.relative_to(resources.PACKAGE) for path in resources.PACKAGE.rglob("*.*")}
    assert not {path for path in tracked - packed if "__pycache__" not in path.parts}


def test_the_wheel_reads_its_own_configs(installed: Path):
    assert "path: x" in run(installed, "show", "sd15/lora", "data.path=x")


def test_the_wheel_sweeps_by_name(installed: Path):
    assert "4 trials; runs/rank/sweep.json" in run(installed, "sweep", "rank", "--dry-run")


def test_constraints_lie_within_the_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for name in extras if name != "optimum" for line in extras[name]),
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    missing = []
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name not in pins:
            missing.append(name)
        else:
            assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"
    assert project["name"] == install.NAME
    # onnxruntime-gpu needs a GPU to be tested; trackio wants an older Pillow than the one that is pinned.
    assert set(missing) == {install.NAME, "onnxruntime-gpu", "trackio"}


def test_ranges_admit_the_set_that_optimum_needs():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    older = {
        "diffusers": "0.39.0",
        "transformers": "4.57.6",
        "huggingface_hub": "0.36.0",
        "optimum": "2.1.0",
        "optimum-onnx": "0.1.0",
    }
    lines = [*project["dependencies"], *project["optional-dependencies"]["optimum"]]
    for requirement in map(Requirement, lines):
        version = older.get(requirement.name)
        assert version is None or requirement.specifier.contains(version), requirement
