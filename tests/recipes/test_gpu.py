"""The recipes on a GPU: every precision learns, and float32 learns what the CPU does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "lora.json"


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def on_the_gpu(tree: dict[str, Any], **memory: Any) -> dict[str, Any]:
    return {**tree, "memory": {"device": "cuda", **memory}}


@pytest.mark.parametrize(
    ("memory", "tolerance"),
    [
        ({"precision": "fp32"}, 2e-3),
        ({"precision": "fp32", "gradient_checkpointing": True, "micro_batch": 1}, 2e-3),
        ({"precision": "bf16"}, 0.05),
        ({"precision": "fp16"}, 0.05),
    ],
)
def test_golden_losses_of_the_cpu(
    run_here: Callable[..., Path],
    configured: Callable[..., Path],
    lora_tree: dict[str, Any],
    tmp_path: Path,
    memory: dict[str, Any],
    tolerance: float,
) -> None:
    run = run_here(configured(tmp_path, on_the_gpu(lora_tree, **memory)))
    known = [row["loss"] for row in json.loads(GOLDEN.read_text()) if "loss" in row]
    assert losses(run) == pytest.approx(known, rel=tolerance)


def test_a_planned_run(
    run_here: Callable[..., Path],
    configured: Callable[..., Path],
    lora_tree: dict[str, Any],
    tmp_path: Path,
) -> None:
    run = run_here(configured(tmp_path, on_the_gpu(lora_tree, budget="auto")))
    plan = json.loads((run / "plan.json").read_text())
    assert plan["fits"]
    assert plan["device_bytes"] <= plan["budget_bytes"]
