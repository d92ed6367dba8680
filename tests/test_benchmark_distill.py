"""benchmarks/distill.md, by scripts/benchmark_distill.py: it is what distill.json has."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: .venv/bin/python scripts/benchmark_distill.py --table"""
    path = ROOT / "scripts" / "benchmark_distill.py"
    spec = importlib.util.spec_from_file_location("benchmark_distill", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    report = json.loads((ROOT / "benchmarks" / "distill.json").read_text(encoding="utf-8"))
    assert (ROOT / "benchmarks" / "distill.md").read_text(encoding="utf-8") == module.table(report)
    row = {**report["rows"][-1], "adapter": {"rank": 16}}
    assert "EMA 0.9, rank 16: 18 min" in module.training(row)
