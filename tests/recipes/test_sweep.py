"""A trial that a sweep stopped early and later continued is, to the last bit, one that never stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunekit.files import write_json
from tunekit.jobs import Job
from tunekit.sweep import engine
from tunekit.sweep.engine import Sweep
from tunekit.worker import Worker

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[2]


def command(job: Job) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / "lora.py"), "--config", job.config, *job.overrides]


def run(path: Path) -> Sweep:
    # A picture is drawn once the figure that stops it is known; nothing that is learned depends on it.
    sweep = Sweep.open(path, ["preview.every=8"], say=lambda line: None)
    sweep.run(Worker(sweep.queue, ["cpu"], 1, sweep.name, say=lambda line: None, command=command))
    return sweep


def rows(folder: Path) -> list[dict[str, Any]]:
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "loss", "grad_norm", "lr", "val_loss")
    return [{key: row[key] for key in keys if key in row} for row in read]


def test_stopped_and_continued_is_as_if_it_had_never_stopped(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(engine, "TICK", 0.01)
    config = configured(tmp_path, lora_tree)
    text = f"config: {config.name}\nover: {{seed: [1, 0]}}\nmetric: val_loss\n"
    path = tmp_path / "s.yaml"
    path.write_text(text + "stop: {asha: {grace: 8, factor: 2}}\n")
    # The first trial is over, and so good that the second is stopped at its first figure.
    first, second = Sweep.open(path, ["preview.every=8"]).trials
    good = Path(first.folder)
    good.mkdir(parents=True)
    (good / "config.yaml").touch()
    lines = [json.dumps({"step": step, "val_loss": 1e-6}) for step in (8, 16, 24)]
    (good / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sweep = Sweep.open(path, ["preview.every=8"])
    sweep.trials[0].state = "done"
    write_json(sweep.folder / "sweep.json", sweep.record().model_dump(mode="json"))

    sweep = run(path)
    assert [trial.state for trial in sweep.trials] == ["done", "stopped"]
    assert sweep.trials[1].stopped == 8
    stopped = rows(Path(second.folder))
    assert 8 <= stopped[-1]["step"] < 24
    assert sweep.trials[1].value == next(row["val_loss"] for row in stopped if row["step"] == 8)

    path.write_text(text)  # without the rule
    sweep = run(path)
    assert [trial.state for trial in sweep.trials] == ["done", "done"]
    log = Path(second.folder)
    assert rows(log) == rows(straight)
    name = "adapter/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(log / name), load_file(straight / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
