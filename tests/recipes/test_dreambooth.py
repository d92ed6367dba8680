"""The dreambooth recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunekit.artifacts import RunFolder

RunHere = Callable[..., Path]
Configured = Callable[..., Path]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_golden_losses(
    dreambooth_tree: dict[str, Any],
    configured: Configured,
    environment: dict[str, str],
    tmp_path: Path,
    check_golden: Callable[[str, Path], None],
) -> None:
    """Through `tunekit run`: class pictures, two draws of each crop and flip, DoRA."""
    config = configured(tmp_path, dreambooth_tree)
    command = [sys.executable, "-m", "tunekit", "run", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    check_golden("dreambooth", run)
    (folder,) = run.glob("class-*")
    assert sorted(path.name for path in folder.iterdir()) == [f"drawn-{i:04d}.png" for i in range(5)]
    artifact = RunFolder(run).final()
    assert artifact.format == "adapter"
    assert artifact.lineage[0].metrics["steps"] == 12


def test_prior_preservation_is_in_the_loss(
    dreambooth_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    """The first loss is instance + weight * prior, and each part is what it is alone."""
    tree = {**dreambooth_tree, "train": {**dreambooth_tree["train"], "max_steps": 1}}

    def first_loss(name: str, *overrides: str) -> float:
        return losses(run_here(configured(tmp_path / name, tree), *overrides))[0]

    half, none, whole = (first_loss(f"w{w}", f"data.prior_weight={w}") for w in (0.5, 0.0, 1.0))
    assert half == pytest.approx((none + whole) / 2, rel=1e-5)
    assert whole > none > 0


def test_without_class_pictures(
    dreambooth_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    data = {
        key: value for key, value in dreambooth_tree["data"].items() if not key.startswith(("class", "prior"))
    }
    run = run_here(configured(tmp_path, {**dreambooth_tree, "data": data}), "train.max_steps=2")
    assert len(losses(run)) == 2
    assert not list(run.glob("class-*"))


def test_all_weights_with_8_bit_optimizer_and_previews(
    dreambooth_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    tree = {
        **dreambooth_tree,
        "adapter": None,
        "preview": {"prompts": ["a sks disc"], "steps": 2},
        "memory": {"device": "cpu", "gradient_checkpointing": True, "micro_batch": 1},
    }
    run = run_here(
        configured(tmp_path, tree), "train.max_steps=3", "train.optimizer=adamw8bit", "train.lr=1e-4"
    )
    assert (run / "model" / "model_index.json").is_file()
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step-000000", "step-000003"]
    weights = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in weights.values())
