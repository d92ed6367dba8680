"""scripts/benchmark_inference.py: turns, what happens to who fails, and what the tables say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    file = ROOT / "scripts" / "benchmark_inference.py"
    spec = importlib.util.spec_from_file_location("benchmark_inference", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Answering:
    """A contestant whose step takes as long as is said; it fails in what it is told to."""

    def __init__(self, script: Any, name: str, milliseconds: float, fails: str, asked: list[str]) -> None:
        self.script, self.name, self.milliseconds, self.fails, self.asked = (
            script, name, milliseconds, fails, asked,
        )  # fmt: skip

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        what = request["do"]
        self.asked.append(f"{self.name} {what}")
        if what == self.fails:
            raise self.script.Failed(f"no {what} here")
        if what == "draw":
            np.save(request["out"], np.full((len(request["prompts"]), 2, 2, 3), self.milliseconds / 1000))
        count = request.get("calls")
        values = [self.milliseconds] * count if count else 10 * self.milliseconds
        return {"cpu_ms": values, "wall_ms": values}

    def close(self) -> None:
        self.asked.append(f"{self.name} close")


@pytest.fixture
def everyone(script: Any, tmp_path: Path) -> Any:
    """Three contestants, one of which has no pictures and one no steps."""

    def made(asked: list[str]) -> list[Any]:
        found = []
        for name, took, fails in (
            (script.BASELINE, 100.0, ""),
            ("fast", 20.0, "draw"),
            ("absent", 1.0, "step"),
            ("near", 50.0, ""),
        ):
            side = script.Side(name, {"kind": "tunekit"}, sys.executable, None, tmp_path / f"{name}.json")
            if side.file.is_file():
                side.found = json.loads(side.file.read_text())
                side.found.pop("missing", None)
            side.found |= {"title": f"{name}!", "size_bytes": 1_500_000, "made": "x"}
            side.worker = Answering(script, name, took, fails, asked)
            found.append(side)
        return found

    return made


def test_each_has_its_turn_and_who_fails_is_a_line(script: Any, everyone: Any) -> None:
    asked: list[str] = []
    sides = everyone(asked)
    script.measure("emoji", sides, 2, 1.0)
    steps = [one for one in asked if one.endswith("step")]
    first = f"{script.BASELINE} step"
    assert steps == [first, "fast step", "absent step", "near step", "fast step", "near step", first]
    rows = {row["name"]: row for row in script.rows({side.name: side.found for side in sides})}
    assert rows["absent"] == {"name": "absent", "missing": "no step here"}
    assert rows["fast"]["missing"] == "no draw here"
    near = rows["near"]
    assert (near["step_cpu_ms"], near["step_faster"], near["picture_faster_wall"]) == (50.0, 2.0, 2.0)
    assert near["psnr_db"] == pytest.approx(26.0, abs=0.1) and near["rounds"] == 2
    assert "psnr_db" not in rows[script.BASELINE] and rows[script.BASELINE]["step_faster"] == 1.0
    # Again, with a round more: only that is measured, and who failed is tried once more.
    asked.clear()
    script.measure("emoji", everyone(asked), 3, 1.0)
    assert [one for one in asked if one.endswith("step")] == ["absent step", "near step", first, "fast step"]


def test_tables_say_what_was_measured_and_what_was_not(script: Any) -> None:
    row = {
        "name": "fast", "title": "ONNX Runtime", "size_bytes": 2_000_000, "rounds": 3,
        "step_cpu_ms": 1234.5, "step_wall_ms": 9.0, "step_faster": 4.0, "step_faster_wall": 3.5,
    }  # fmt: skip
    pictured = {
        **row, "picture_cpu_ms": 40.0, "picture_wall_ms": 41.0, "picture_faster": 15.2,
        "picture_faster_wall": 15.0, "psnr_db": 30.04, "psnr_db_worst": 28.0,
    }  # fmt: skip
    machine = {"date": "2026-11-26", "device": "a processor", "threads": 1}
    models = {
        "one": {
            "title": "One",
            "machine": machine,
            "rows": [row, {"name": "peer", "missing": "not installed"}],
        },
        "two": {"title": "Two", "machine": machine, "rows": [pictured]},
    }
    text = script.markdown({"models": models})
    assert "| fast | ONNX Runtime | 1,234.5 ms | 4.00 x (3.50) | 2.0 MB |" in text
    assert "| 40.0 ms | 15.20 x (15.00) | 30.0 (28.0) dB | 2.0 MB |" in text
    assert "- peer: not installed" in text and "device a processor" in text


def test_a_process_answers_and_its_failure_is_told(script: Any, tmp_path: Path) -> None:
    worker = script.Worker({"kind": "cyllama", "folder": "x"}, sys.executable, None, tmp_path / "log")
    try:
        with pytest.raises(script.Failed, match="ValueError: unknown request dance"):
            worker.ask(60, do="dance")
        with pytest.raises(script.Failed, match=r"single_file|cyllama|KeyError"):
            worker.ask(60, do="make")
    finally:
        worker.close()
    with pytest.raises(script.Failed, match=r"has ended|process ended"):
        worker = script.Worker({"kind": "nobody", "folder": "x"}, sys.executable, None, tmp_path / "log")
        worker.ask(60, do="open")
    worker.close()


def test_the_page_is_what_was_measured(script: Any) -> None:
    """Else: scripts/benchmark_inference.py writes both."""
    record = ROOT / "benchmarks" / "inference.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    assert record.with_suffix(".md").read_text(encoding="utf-8") == script.markdown(content)


def test_contestants_have_names_of_their_own(script: Any) -> None:
    for name, model in script.MODELS.items():
        found = script.contestants(model, name, {"distilled": "runs/x"})
        assert next(iter(found)) == script.BASELINE
        kinds = {told["kind"] for told in found.values()}
        assert kinds >= {"tunekit", "optimum", "optimum_intel", "nncf"}
        assert ("distilled" in found) == model.pictures
