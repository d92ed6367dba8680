"""Kill the real command at random steps, start it again, and compare the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def steps_written(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def start(config: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "lora.py"), "--config", str(config)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_after(
    config: Path, run: Path, environment: dict[str, str], lines: int, number: int
) -> tuple[int, str]:
    """Start the command, send it a signal once metrics.jsonl has so many lines; its exit code and output."""
    process = start(config, environment)
    deadline = time.monotonic() + 120
    # A resumed life first cuts the file back, so "has lines" alone would hit it before its first step.
    stamp = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0
    while process.poll() is None and time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and file.stat().st_mtime_ns != stamp and steps_written(run) >= lines:
            break
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def finish(config: Path, environment: dict[str, str]) -> str:
    process = start(config, environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def assert_same(run: Path, straight: Path, story: str) -> None:
    name = "adapter/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(run / name), load_file(straight / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), story
    keys = ("step", "loss", "grad_norm", "lr", "val_loss")
    read = [
        [
            {k: row[k] for k in keys if k in row}
            for row in map(json.loads, (r / "metrics.jsonl").read_text().splitlines())
        ]
        for r in (run, straight)
    ]
    assert read[0] == read[1], story


def test_one_resume_after_sigkill(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    config, run = configured(tmp_path, lora_tree), tmp_path / "runs" / "run"
    lines = random.randint(7, 22)
    code, output = stop_after(config, run, environment, lines, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert not (run / "adapter").exists()
    output = finish(config, environment)
    assert "continues after step" in output
    assert_same(run, straight, f"killed after {lines} lines")


def test_two_resumes_after_sigkill_and_sigterm(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    config, run = configured(tmp_path, lora_tree), tmp_path / "runs" / "run"
    first, second = sorted(random.sample(range(3, 19), 2))
    story = f"killed after {first} lines, told to stop after {second}"
    code, output = stop_after(config, run, environment, first, signal.SIGKILL)
    assert code == -signal.SIGKILL, story + output
    code, output = stop_after(config, run, environment, second, signal.SIGTERM)
    assert code == 143, story + output
    assert "stopped by SIGTERM after step" in output
    assert "the same command again" in output
    assert "Traceback" not in output
    stopped = int(output.split("after step ")[-1].split()[0])
    assert (run / "checkpoints" / f"step-{stopped:06d}" / "state.json").is_file()
    output = finish(config, environment)
    assert f"continues after step {stopped} of 24" in output
    assert_same(run, straight, story)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="asks the Linux kernel")
def test_a_launcher_that_dies_takes_the_training_with_it(
    lora_tree: dict[str, Any], configured: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    """SIGTERM to `accelerate launch` ends it at once; the recipe left behind checkpoints and ends too."""
    tree = {
        **lora_tree,
        "preview": {},
        "train": {**lora_tree["train"], "max_steps": 5000, "checkpoint_every": 5000},
    }
    config, run = configured(tmp_path, tree), tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--cpu"]
    command += [str(ROOT / "recipes" / "lora.py"), "--config", str(config)]
    log = (tmp_path / "log").open("w")
    launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while steps_written(run) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.wait(timeout=30)
    while not list((run / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    log.close()
    assert list((run / "checkpoints").glob("step-*")), (tmp_path / "log").read_text()
    after = steps_written(run)
    time.sleep(1)
    assert steps_written(run) == after
