"""Runs of the real recipes on the tiny model, and golden losses.

TUNEKIT_UPDATE_GOLDEN=1 pytest tests/recipes   records the golden losses anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def mixed_pictures(tmp_path_factory: pytest.TempPathFactory, make_pictures: Callable[..., Path]) -> Path:
    """Eleven captioned pictures of two shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    make_pictures(folder / "square", 7, (40, 40))
    make_pictures(folder / "wide", 4, (64, 36), seed=1)
    return folder


@pytest.fixture(scope="session")
def lora_tree(mixed_pictures: Path) -> dict[str, Any]:
    """A config of the lora recipe with most options in use."""
    return {
        "recipe": "lora",
        "model": {"family": "sd15", "source": "tiny"},
        "data": {"path": str(mixed_pictures), "resolution": 32, "validation": 0.2, "caption_dropout": 0.2},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {
            "max_steps": 24,
            "lr": 0.002,
            "batch_size": 4,
            "schedule": "cosine",
            "warmup_steps": 4,
            "snr_gamma": 5,
            "validate_every": 8,
            "checkpoint_every": 5,
            "log_every": 8,
        },
        "preview": {"prompts": ["a disc"], "every": 12, "steps": 2},
        "memory": {"device": "cpu", "micro_batch": 3},
    }


@pytest.fixture(scope="session")
def dreambooth_tree(
    tmp_path_factory: pytest.TempPathFactory, make_pictures: Callable[..., Path]
) -> dict[str, Any]:
    """A config of the dreambooth recipe."""
    pictures = make_pictures(tmp_path_factory.mktemp("subject"), 3, (48, 40), captions=False)
    return {
        "recipe": "dreambooth",
        "model": {"family": "sd15", "source": "tiny"},
        "data": {
            "path": str(pictures),
            "instance_prompt": "a sks disc",
            "class_prompt": "a disc",
            "class_pictures": 5,
            "class_steps": 3,
            "prior_weight": 0.5,
            "resolution": 32,
            "crop": "random",
            "flip": True,
        },
        "adapter": {"kind": "dora", "rank": 2, "alpha": 2},
        "train": {"max_steps": 12, "lr": 0.002, "batch_size": 2, "checkpoint_every": 5},
        "memory": {"device": "cpu"},
    }


def write_config(folder: Path, tree: dict[str, Any], name: str = "run") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, "runs": str(folder / "runs")}))
    return path


@pytest.fixture(scope="session")
def configured() -> Callable[..., Path]:
    """`configured(folder, tree)` writes a config whose runs go into that folder too."""
    return write_config


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For subprocesses."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@pytest.fixture
def run_here() -> Iterator[Callable[..., Path]]:
    """`run_here(config, "train.lr=1")` runs the recipe in this process and returns the run folder."""
    from accelerate.state import AcceleratorState, GradientState

    from tunekit.config import load
    from tunekit.registry import load_recipe

    def reset() -> None:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)

    def run(config: Path, *overrides: str) -> Path:
        loaded = load(config, overrides)
        try:
            load_recipe(loaded.config.recipe).main(loaded.config, loaded)
        finally:
            reset()
        return Path(loaded.config.run_dir)

    yield run
    reset()


@pytest.fixture(scope="session")
def straight(
    tmp_path_factory: pytest.TempPathFactory, lora_tree: dict[str, Any], environment: dict[str, str]
) -> Path:
    """The run folder of an uninterrupted `accelerate launch recipes/lora.py`."""
    config = write_config(tmp_path_factory.mktemp("straight"), lora_tree)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--cpu"]
    command += [str(ROOT / "recipes" / "lora.py"), "--config", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 24/24" in done.stdout
    return config.parent / "runs" / "run"


@pytest.fixture(scope="session")
def check_golden() -> Callable[[str, Path], None]:
    """`check_golden(name, run)` compares the losses of a run with the recorded ones, to 1e-4."""

    def check(name: str, run: Path) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        keys = ("step", "loss", "val_loss")
        losses = [{key: row[key] for key in keys if key in row} for row in rows]
        file = GOLDEN / f"{name}.json"
        if os.environ.get("TUNEKIT_UPDATE_GOLDEN"):
            lines = ",\n".join(f"  {json.dumps(row)}" for row in losses)
            file.write_text(f"[\n{lines}\n]\n")
        recorded = json.loads(file.read_text())
        assert [set(row) for row in losses] == [set(row) for row in recorded]
        for row, known in zip(losses, recorded, strict=True):
            assert row == pytest.approx(known, rel=1e-4), f"step {known['step']}"

    return check
