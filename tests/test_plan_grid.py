"""benchmarks/plans.md, by scripts/plan_grid.py: it is what plans.json has, and that makes sense."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = json.loads((ROOT / "benchmarks" / "plans.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def grid() -> Any:
    spec = importlib.util.spec_from_file_location("plan_grid", ROOT / "scripts" / "plan_grid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_what_was_planned(grid: Any) -> None:
    """Else: .venv/bin/python scripts/plan_grid.py --table"""
    assert grid.ordered(ROWS) == ROWS
    assert (ROOT / "benchmarks" / "plans.md").read_text(encoding="utf-8") == grid.table(ROWS)


def test_every_plan_fits_and_has_a_time_and_memory_of_the_host(grid: Any) -> None:
    for row in ROWS:
        for plan in (row[name] for name in ("least", "whole") if name in row):
            size = grid.hardware.TABLE[plan["card"]].memory_bytes
            assert 2**30 < plan["device_bytes"] <= size * grid.hardware.SHOWN, row
            assert plan["ram_bytes"] > 2**30, row
            assert plan["relative_step_time"] >= 1, row
        if "whole" in row:
            assert not row["whole"]["approximates"] and row["whole"]["relative_step_time"] <= grid.WHOLE


def test_more_to_compute_needs_no_less(grid: Any) -> None:
    """Where nothing is done to get by with less: larger pictures, and all weights beside a LoRA."""
    needed = {grid.key(row): row["whole"]["device_bytes"] for row in ROWS if "whole" in row}
    phases = {grid.key(row): row["whole"]["peak_phase"] for row in ROWS if "whole" in row}
    for family, kind in {about[:2] for about in needed}:
        sides = [side for side in sorted(grid.SIDES) if (family, kind, side) in needed]
        for smaller, larger in pairwise(sides):
            # Where text encoders decide, pictures do not: only what they leave of the allocator's segments.
            if phases[family, kind, smaller] != "encode":
                assert needed[family, kind, smaller] <= needed[family, kind, larger], (family, kind)
    for (family, kind, side), size in needed.items():
        if kind == "all weights":
            assert size > needed[family, "LoRA", side], (family, side)


@pytest.mark.parametrize("kind", ["LoRA", "all weights"])
def test_a_row_is_planned_from_the_familys_own_config(grid: Any, kind: str) -> None:
    config = grid.config("sd15", kind, 768).config
    assert (config.model.family, config.data.resolution, config.train.batch_size) == ("sd15", 768, 1)
    assert (config.adapter is None) == (kind == "all weights")
    other = grid.config("qwenimage", kind, 512).config
    assert (other.model.family, other.model.source) == ("qwenimage", "Qwen/Qwen-Image")
