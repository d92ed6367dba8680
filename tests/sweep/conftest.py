"""A recipe that trains nothing and takes no time: its curve follows from its keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = '''
"""Writes a curve."""

from tunekit.config import MemoryConfig, RunConfig, Section
from tunekit.launch import run_recipe


class Train(Section):
    lr: float = 1.0
    """How good it is."""
    max_steps: int = 8
    """Steps."""
    validate_every: int | None = 1
    """Steps between figures."""


class Config(RunConfig):
    train: Train = Train()
    """How."""
    rank: int = 4
    """What is reported is lr x rank / step."""
    fails: int = 0
    """The rank that fails while the file `broken` is there."""
    pause: float = 0.0
    """Seconds for each step."""
    figure: str = "val_loss"
    """What it reports."""
    memory: MemoryConfig = MemoryConfig(device="cpu")
    """Where."""


def main(config, loaded):
    import steps

    steps.make(config.name, rank=config.rank, lr=config.train.lr)


if __name__ == "__main__":
    run_recipe(main, Config)
'''
STEPS = """
import json, os, signal, sys, time


def make(name, rank=4, lr=1.0, fails=0, pause=0.0, figure="val_loss", runs="runs"):
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    os.makedirs(f"{runs}/{name}", exist_ok=True)
    open(f"{runs}/{name}/config.yaml", "w").write("recipe: curve")
    if rank == fails and os.path.exists("broken"):
        sys.exit("error: the loss became NaN")
    file = f"{runs}/{name}/metrics.jsonl"
    step = open(file).read().count("\\n") if os.path.exists(file) else 0
    while step < 8:
        step += 1
        time.sleep(pause)
        row = {"step": step, "loss": 1.0, "seconds": float(step), figure: lr * rank / step}
        with open(file, "a") as out, open(f"{runs}/{name}/made", "a") as made:
            out.write(json.dumps(row) + "\\n")
            made.write(f"{step} ")
        if told:
            sys.exit(143)


if __name__ == "__main__":
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    kinds = {"rank": int, "fails": int, "train.lr": float, "pause": float}
    values = {key.split(".")[-1]: kinds.get(key, str)(json.loads(value) if value[0] == '"' else value)
              for key, value in given.items()}
    make(**values)
"""
"""What the recipe does, also without it: a process that imports nothing of tunekit begins at once."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `curve.py`, its config and a sweep over it; the tests run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curve.py").write_text(RECIPE)
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "curve.yaml").write_text("recipe: curve.py\n")
    sys.modules.pop("tunekit_recipe_curve", None)
    return tmp_path


@pytest.fixture
def swept(here: Path) -> Callable[..., Path]:
    """`swept("rank: [1, 2]", "stop: median")` writes a sweep file, with the first text under `over:`."""

    def write(over: str, *lines: str, config: str = "curve.yaml", metric: str = "") -> Path:
        path = here / "s.yaml"
        metric = metric or "{name: val_loss, goal: min}"
        path.write_text(
            "\n".join([f"config: {config}", f"metric: {metric}", *lines, "over:", f"  {over}", ""])
        )
        return path

    return write
