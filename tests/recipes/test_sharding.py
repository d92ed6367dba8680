"""Weights split over two processes, through the commands; what is learned so is shown in tests/training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Configured = Callable[..., Path]


def command(config: Path, environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment,
        cwd=config.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def differ(one: Path, other: Path) -> float:
    """The largest difference of a loss, on trained or on held-out pictures."""
    return max(
        abs(a[name] - b[name])
        for a, b in zip(rows(one), rows(other), strict=True)
        for name in ("loss", "val_loss")
        if name in a
    )


@pytest.mark.slow
def test_all_weights_in_two_processes_and_in_one(
    lora_tree: dict[str, Any], configured: Configured, environment: dict[str, str], tmp_path: Path
) -> None:
    """`tunekit run`: previews, validation, the best, checkpoints, plan.json; then on in one process."""
    tree = {**lora_tree, "adapter": None, "memory": {"device": "cpu", "budget": "2 GiB"}}
    steps = {"max_steps": 12, "schedule": "constant", "warmup_steps": 0}  # another length, the same rates
    tree["train"] = {**lora_tree["train"], **steps, "lr": 0.0005, "keep_best": "val_loss"}
    tree["train"].pop("save_every", None)
    run = ("tunekit", "run")
    alone, both = (configured(tmp_path / name, tree) for name in ("alone", "both"))
    command(alone, environment, *run, str(alone))
    split = ("--processes", "2", "memory.sharding=full")
    said = command(both, environment, *run, str(both), *split, "train.max_steps=8")
    assert "weights split over the devices" in said
    here, there = (path.parent / "runs" / "run" for path in (alone, both))
    plan = json.loads((there / "plan.json").read_text())
    assert plan["memory"]["sharding"] == "full" and plan["processes"] == 2
    print({name: phase.get("error") for name, phase in plan["phases"].items()})
    command(both, environment, *run, str(both))
    worst = differ(here, there)
    print(f"losses differ by {worst:.1e}")
    assert worst < 1e-5
    models = [json.loads((path / "model" / "unet" / "config.json").read_text()) for path in (here, there)]
    assert models[0] == models[1]


@pytest.mark.slow
def test_an_adapter_through_accelerate_launch(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Configured,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    config = configured(tmp_path, lora_tree)
    accelerate = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    recipe = ROOT / "recipes" / "lora.py"
    launch = ("accelerate.commands.launch", "--config_file", str(accelerate), "--num_processes", "2")
    command(config, environment, *launch, str(recipe), "--config", str(config))
    worst = differ(straight, tmp_path / "runs" / "run")
    print(f"losses differ by {worst:.1e}")
    assert worst < 1e-5
    made = json.loads((tmp_path / "runs" / "run" / "adapter" / "artifact.json").read_text())
    assert made["lineage"][0]["settings"]["memory"]["sharding"] == "full"
