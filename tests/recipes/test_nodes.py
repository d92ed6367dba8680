"""One training on several machines: groups of processes on this one, with folders of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunekit import ranks
from tunekit.launch import Place

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def small_tree(lora_tree: dict[str, Any]) -> dict[str, Any]:
    """Twelve steps with what may depend on how many processes there are: two shapes, validation, dropout."""
    train = {**lora_tree["train"], "max_steps": 12, "checkpoint_every": 3, "validate_every": 6}
    adapter = {**lora_tree["adapter"], "dropout": 0.1}
    return {**lora_tree, "train": {**train, "schedule": "constant"}, "adapter": adapter}


@pytest.fixture(scope="session")
def alone(
    tmp_path_factory: pytest.TempPathFactory,
    small_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
) -> Path:
    """The run of one process that was never stopped."""
    config = configured(tmp_path_factory.mktemp("alone"), small_tree)
    command = [sys.executable, "-m", "tunekit", "run", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "run"


class Machine:
    """One that takes part: a process group in a folder of its own."""

    def __init__(self, folder: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.out, self.errors = folder / "out", folder / "errors"
        with self.out.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={"GLOO_SOCKET_IFNAME": "lo", **environment},
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(timeout=seconds)

    @property
    def said(self) -> str:
        return self.out.read_text() + self.errors.read_text()


def machines(
    folder: Path, config: Path, environment: dict[str, str], *overrides: str, processes: int = 1
) -> list[Machine]:
    """Two launchers that share the pictures and nothing else."""
    port = free_port()
    return [
        Machine(
            folder / name,
            [
                *(sys.executable, "-m", "tunekit", "run", str(config), f"runs={folder}/{name}/runs"),
                *("--processes", str(processes), *overrides),
            ],
            {
                **environment,
                ranks.DRIVEN: str(Place(index * processes, 2 * processes, "127.0.0.1", port)),
                ranks.NODE: name,
            },
        )
        for index, name in enumerate(("first", "second"))
    ]


def assert_equal(run: Path, alone: Path) -> None:
    """The same losses as in one process, and the same adapter, up to the order in which sums are made."""
    keys = ("step", "loss", "val_loss", "lr")
    rows, known = (
        [
            {key: row[key] for key in keys if key in row}
            for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (run, alone)
    )
    assert [set(row) for row in rows] == [set(row) for row in known]
    worst = max(
        abs(row[key] - other[key]) / max(abs(other[key]), 1e-12)
        for row, other in zip(rows, known, strict=True)
        for key in row
    )
    print(f"{len(rows)} steps, largest relative difference {worst:.1e}")
    assert worst < 1e-5
    name = "adapter/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(run / name), load_file(alone / name)
    assert all((ours[key] - theirs[key]).abs().max() < 1e-5 for key in theirs)


def test_one_then_two_then_four_processes_are_one_run(
    alone: Path,
    small_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """The batch is 4 throughout: 1 x 3 + 1, 2 x 2, 4 x 1."""
    config = configured(tmp_path, small_tree)
    for count, steps in ((1, 5), (2, 8), (4, 12)):
        command = [sys.executable, "-m", "tunekit", "run", str(config), f"train.max_steps={steps}"]
        command += ["--processes", str(count)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (alone / "metrics.jsonl").read_text().splitlines()]
    ours = [json.loads(row) for row in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in ours] == [row["step"] for row in rows]
    worst = max(abs(one["loss"] / other["loss"] - 1) for one, other in zip(ours[1:], rows[1:], strict=True))
    print(f"largest relative difference {worst:.1e}")
    assert worst < 1e-5


def test_one_of_two_machines_is_killed_and_the_run_goes_on_elsewhere(
    alone: Path,
    small_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Then with two processes on each of two, of which the second has seen nothing of the run before."""
    config = configured(tmp_path, small_tree)
    first, second = machines(tmp_path, config, environment)
    run = tmp_path / "first" / "runs" / "run"
    until = time.monotonic() + 200
    while time.monotonic() < until and not list((run / "checkpoints").glob("step-*")):
        assert first.process.poll() is None, first.said
        time.sleep(0.01)
    for process in children(second.process.pid):
        os.kill(process, signal.SIGKILL)
    os.kill(second.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    code = first.end(60)
    seconds = time.monotonic() - killed
    # A slow machine says first what takes long.
    lines = first.errors.read_text().partition("error: ")[2].splitlines()
    print(f"ended {seconds:.1f} s after the other machine was killed: {lines}")
    assert code == 1
    assert lines[0] == "rank 1 on second has gone: killed, or the machine is lost"
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert lines[1].startswith(f"the last checkpoint is {newest}; give the same command again")
    assert len(lines) == 2
    assert seconds < 20
    second.process.wait()
    assert not (tmp_path / "second" / "runs" / "run").exists()  # the cache alone is there
    assert list((tmp_path / "second" / "runs" / ".cache").rglob("*.safetensors"))

    again = tmp_path / "again"
    again.mkdir()
    (again / "first").mkdir()
    (tmp_path / "first" / "runs").rename(again / "first" / "runs")
    group = machines(again, config, environment, processes=2)
    codes = [machine.end() for machine in group]
    assert codes == [0, 0], [machine.said for machine in group]
    assert "continues after step" in group[0].said
    assert "cache of encoded pictures: it is on 2 disks, each of which gets all of it" in group[0].said
    assert_equal(again / "first" / "runs" / "run", alone)
    assert not (again / "second" / "runs" / "run").exists()


def children(parent: int) -> list[int]:
    """Processes below one."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(
                parent
            ):
                found += [int(folder.name), *children(int(folder.name))]
        except OSError:
            continue
    return found


def test_class_pictures_are_complete_on_both_machines(
    dreambooth_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    tree = {**dreambooth_tree, "train": {**dreambooth_tree["train"], "max_steps": 2}}
    config = configured(tmp_path, tree)
    group = machines(tmp_path, config, environment)
    assert [machine.end() for machine in group] == [0, 0], [machine.said for machine in group]
    assert "folder of class pictures: it is on 2 disks" in group[0].said
    drawn = [
        {file.name: file.read_bytes() for file in (tmp_path / name / "runs").rglob("class-*/*.png")}
        for name in ("first", "second")
    ]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1]


def under(launcher: str, rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of one machine before the recipe, and what its environment has beside."""
    if launcher == "torchrun":
        words = ["torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
        return [*words, "--master-addr=127.0.0.1", f"--master-port={port}"], {}
    if launcher == "accelerate":
        words = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=2", f"--machine_rank={rank}"]
        words += ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
        return [*words, "--rdzv_backend=static", "--mixed_precision=no", "--dynamo_backend=no"], {}
    told = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "MASTER_PORT": str(port),
    }
    return [], told


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "srun"])
def test_started_by_others(
    launcher: str,
    alone: Path,
    small_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """srun itself is not here: its variables are."""
    config, port, group = configured(tmp_path, small_tree), free_port(), []
    for rank, name in enumerate(("first", "second")):
        words, told = under(launcher, rank, port)
        recipe = [str(ROOT / "recipes" / "lora.py"), "--config", str(config), f"runs={tmp_path}/{name}/runs"]
        command = [sys.executable, *(["-m", *words] if words else []), *recipe]
        group.append(Machine(tmp_path / name, command, {**environment, **told, "HF_HOME": str(tmp_path)}))
    assert [machine.end() for machine in group] == [0, 0], [machine.said for machine in group]
    assert_equal(tmp_path / "first" / "runs" / "run", alone)


def test_a_machine_without_the_pictures_ends_both_at_once(
    small_tree: dict[str, Any], configured: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    config, port, group = configured(tmp_path, small_tree), free_port(), []
    for rank, name in enumerate(("first", "second")):
        words, _ = under("torchrun", rank, port)
        recipe = [str(ROOT / "recipes" / "lora.py"), "--config", str(config), f"runs={tmp_path}/{name}/runs"]
        there = [] if rank == 0 else [f"data.path={tmp_path}/nothing"]
        command = [sys.executable, "-m", *words, *recipe, *there]
        group.append(Machine(tmp_path / name, command, {**environment, ranks.NODE: name}))
    assert all(machine.end(60) for machine in group)
    errors = [re.findall(r"(?m)^error: .*", machine.said) for machine in group]
    assert len(errors[0]) == len(errors[1]) == 1, [machine.said for machine in group]
    assert errors[0][0].startswith("error: rank 1 on second: ")
    assert f"{tmp_path}/nothing" in group[0].said
    assert not errors[1][0].startswith("error: rank 1")


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster")
def test_two_nodes_of_a_cluster_of_which_one_is_removed(
    alone: Path,
    small_tree: dict[str, Any],
    configured: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command goes on with a node that was not there before."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    config = configured(tmp_path, small_tree)
    run = tmp_path / "runs" / "run"
    machine = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = machine.add_node(num_cpus=1)
    command = [sys.executable, "-m", "tunekit", "run", str(config), "--nodes", "2"]
    command += ["--cluster", machine.address]
    environment = {**environment, "GLOO_SOCKET_IFNAME": "lo"}
    try:
        too_many = subprocess.run(
            [*command, "--nodes", "3"], env=environment, capture_output=True, text=True, check=False
        )
        assert too_many.returncode == 2
        assert "--nodes 3, and the cluster has 2: " in too_many.stderr

        def remove() -> None:
            until = time.monotonic() + 200
            while time.monotonic() < until and not list((run / "checkpoints").glob("step-*")):
                time.sleep(0.05)
            machine.remove_node(other, allow_graceful=False)

        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        lost = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        thread.join(60)
        print(lost.stderr)
        assert lost.returncode == 1, lost.stderr
        name = other.node_id[:8]
        # On one machine what Ray has started there is told to end, and tells the others.
        assert re.search(rf"error: (rank 1 on {name} .* has gone: killed|lost the node {name})", lost.stderr)
        machine.add_node(num_cpus=1)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "continues after step" in done.stdout
    finally:
        machine.shutdown()
    assert_equal(run, alone)
