"""What is decided once for all processes of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunekit.errors import DoesNotFit
from tunekit.training.run import Processes

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

SETTLE = """
import json, sys
from dataclasses import replace
from tunekit import hardware, planning
from tunekit.config import load
from tunekit.errors import TunekitError
from tunekit.training.run import Processes

config, *free = sys.argv[1:]
group = Processes.of("cpu")
own = hardware.probe("cpu")
hardware.probe = lambda asked="auto": replace(own, free_bytes=int(free[group.rank]))
try:
    settled, plan = planning.settle(load(config).config, group)
    print(json.dumps([settled.train.optimizer, settled.memory.model_dump(mode="json")]))
except TunekitError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint]))
"""


def processes(script: str, count: int, *arguments: Any, cache: Path) -> list[Any]:
    """What the last line of each process's output says, as JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(count):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(cache),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-c", script, *map(str, arguments)]
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    found = []
    for process in running:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "all.yaml"
    path.write_text(
        f"recipe: lora\nmodel: {{family: sd15, source: tiny}}\nruns: {tmp_path}/runs\n"
        "data: {path: pictures, resolution: 64}\nadapter: null\n"
        "train: {max_steps: 2, lr: 1.0e-3, batch_size: 2}\nmemory: {device: cpu, budget: auto}\n"
    )
    return path


def test_ranks_four_mib_apart_plan_as_one(config: Path, tmp_path: Path) -> None:
    """Each used to plan from its own card, and two cards chose two optimizers: the weights drifted apart."""
    rich, poor = 22 * MIB, 18 * MIB
    config.write_text(config.read_text().replace("batch_size: 2", "batch_size: 4"))  # so that each has two

    def settled(*free: int) -> list[Any]:
        return processes(
            SETTLE, 2, config, *(2 * one for one in free), cache=tmp_path
        )  # they share a machine

    alike, together = [settled(free, free)[0] for free in (rich, poor)], settled(rich, poor)
    blocks = [one[1]["gradient_checkpointing"] for one in (*alike, *together)]
    print(f"checkpointed blocks of equals: {blocks[:2]}; together: {blocks[2:]}")
    assert alike[0][1] != alike[1][1], "the two would have chosen the same anyway"
    assert together[0] == together[1]
    assert together[0][1] == alike[1][1]


REFUSE = """
import json
from tunekit.errors import DoesNotFit, TunekitError
from tunekit.training.run import Processes

group = Processes.of("cpu")

def refuse():
    raise DoesNotFit("too much", hint="take less")

try:
    group.decide(refuse)
except TunekitError as error:
    print(json.dumps([type(error).__name__, error.message, error.hint, group.rank, group.gather(group.rank)]))
"""


def test_what_the_first_refuses_fails_on_all_with_its_hint(tmp_path: Path) -> None:
    found = processes(REFUSE, 2, cache=tmp_path)
    assert [one[:3] for one in found] == [["DoesNotFit", "too much", "take less"]] * 2
    assert [one[3:] for one in found] == [[0, [0, 1]], [1, [0, 1]]]


def test_one_process_decides_for_itself() -> None:
    def refuse() -> int:
        raise DoesNotFit("too much", hint="take less")

    group = Processes()
    assert group.gather(3) == [3]
    assert group.decide(lambda: 5) == 5
    with pytest.raises(DoesNotFit, match="too much"):
        group.decide(refuse)


APART = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tunekit import ranks
from tunekit.data.shares import share_of
from tunekit.training.checkpoint import Checkpoints
from tunekit.training.run import Processes, load_everywhere

folder = Path(sys.argv[1])
company = ranks.meet()
group = Processes.of("cpu")
accelerator = Accelerator(cpu=True)
one = share_of(folder / "one", accelerator)
own = share_of(folder / str(group.rank), accelerator)
found = []
for kept in (folder / "one", folder / str(group.rank)):  # on a shared disk; where the first alone sees it
    checkpoints = Checkpoints(kept, {"run": "this"})
    found.append(load_everywhere(checkpoints, accelerator) is None)
    if group.rank == 0:
        values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0, dtype=torch.bfloat16)}
        optimizer = {"state": {0: {"step": torch.tensor(3.0), "q": torch.tensor([1], dtype=torch.uint8)}},
                     "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
        state = {"step": 4, "seconds": 1.5, "metrics": {"x": 2.0}, "recent": [1.0], "scaler": None}
        checkpoints.save(values, optimizer, state)
    accelerator.wait_for_everyone()
    saved = load_everywhere(checkpoints, accelerator)
    found.append([saved.step, str(saved.trainable), str(saved.optimizer), saved.state["metrics"]])
left = sorted(str(path.relative_to(folder)) for path in folder.rglob(".seen*"))
print(json.dumps([[one.index, one.count, one.folders], [own.index, own.count, own.folders], found, left,
                  company.kept, [member.node for member in company.members]]))
"""


def test_two_that_share_a_disk_or_have_one_each(tmp_path: Path) -> None:
    """They split work on the shared disk; each does all on its own, and the first sends what it kept."""
    first, second = processes(APART, 2, tmp_path / "work", cache=tmp_path)
    assert first[:2] == [[0, 2, 1], [0, 1, 2]]
    assert second[:2] == [[1, 2, 1], [0, 1, 2]]
    assert first[2] == second[2]
    assert first[2][::2] == [True, True]
    assert "bfloat16" in first[2][1][1] and "uint8" in first[2][1][2]
    assert first[2][1] == first[2][3]
    assert first[3] == second[3] == []
    assert first[4] == second[4] and first[4].endswith("0/step-000004")
    assert len({*first[5], *second[5]}) == 1
    assert not list((tmp_path / "work" / "1").iterdir())
