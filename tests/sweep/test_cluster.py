"""A sweep on three nodes, one of which is taken away, comes to what the local queue comes to."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunekit import cluster as clusters
from tunekit.cluster import ClusterWorker, Node, Nodes
from tunekit.errors import DeviceError, MissingPackageError, OutputError
from tunekit.jobs import Job, Queue
from tunekit.sweep.engine import Sweep

pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[2]


class FakeRay(ModuleType):
    """A cluster of one node, which says what it is told to."""

    def __init__(self, **told: Any) -> None:
        super().__init__("ray")
        self.told = told

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "0123456789abcdef", "Alive": True}, {"NodeID": "gone", "Alive": False}]

    def remote(self, function: Callable[..., dict[str, Any]]) -> Any:
        ray = self

        class Remote:
            def options(self, **_: Any) -> Remote:
                return self

            def remote(self, *arguments: Any) -> dict[str, Any]:
                return {**function(*arguments), **ray.told}

        return Remote()

    def get(self, answer: Any, timeout: float) -> Any:
        if "dies" in self.told:
            raise RuntimeError("a long story\nModuleNotFoundError: No module named 'tunekit'")
        return answer


@pytest.mark.parametrize(
    ("told", "kind", "said"),
    [
        ({"tunekit": "0.0.1"}, DeviceError, r"the node 01234567 \(far\) has tunekit 0\.0\.1, and this one"),
        ({"python": "3.9.0"}, DeviceError, r"has python 3\.9\.0, and this one"),
        ({"sees": False}, OutputError, r"the node 01234567 \(far\) does not see .*runs"),
        ({"dies": True}, DeviceError, "the node 01234567 does not answer: ModuleNotFoundError"),
    ],
)
def test_a_node_that_cannot_be_used_is_named(
    told: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nodes, "on", lambda nodes, node: {})
    with pytest.raises(kind, match=said):
        clusters._look(Nodes(FakeRay(**{"host": "far", **told})), tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    missing = pytest.raises(MissingPackageError, match=r'--cluster needs the package "ray": .*\[cluster\]')
    with missing, clusters.cluster("auto", tmp_path):
        pass


def test_a_job_goes_to_a_card_that_is_large_enough(tmp_path: Path) -> None:
    gib = 2**30
    nodes = Nodes(ModuleType("ray"))
    nodes.found = {
        "a": Node("a", "one", {"cpu": 64 * gib, "cuda:0": 8 * gib}, 8),
        "b": Node("b", "two", {"cpu": 64 * gib, "cuda:0": 24 * gib, "cuda:1": 24 * gib}, 8),
        "c": Node("c", "three", {"cpu": 64 * gib}, 8),
    }
    assert nodes.devices == ["a/cpu", "a/cuda:0", "b/cpu", "b/cuda:0", "b/cuda:1", "c/cpu"]
    worker = ClusterWorker.on(nodes, Queue.of(tmp_path))

    def placed(**fields: Any) -> str | None:
        return worker._place(Job(id=1, config="", cwd="", run="/1", **fields), [])

    assert placed(device_bytes=6 * gib) == "a/cuda:0"
    assert placed(device_bytes=10 * gib) == "b/cuda:0"
    assert placed(device_bytes=99 * gib) == "b/cuda:0"  # its own message says what it lacks
    assert placed(device="cpu", device_bytes=gib) == "a/cpu"
    assert placed() is None  # what it needs is asked for first
    assert placed(device_bytes=gib, processes=2) == "b/cuda:0,b/cuda:1"
    assert worker._plan_options("b/cuda:1") == ["--budget", "24576 MiB"]
    job = Job(id=1, config="", cwd="", run="/1", on="b/cuda:1")
    assert worker._environment(job) == {"CUDA_VISIBLE_DEVICES": "1"}


def command(job: Job) -> list[str]:
    return [sys.executable, "-S", "-E", "steps.py", *job.overrides]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster")
def test_three_nodes_of_which_one_is_removed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = here / "s.yaml"
    path.write_text(
        "config: curve.yaml\nmetric: {name: val_loss, goal: min}\nstop: {asha: {grace: 2, factor: 2}}\n"
        "over: {rank: [6, 7, 4, 5, 9, 2, 8, 3]}\n"
    )
    local = Sweep.open(path, ["runs=local"], say=lambda line: None)
    from tunekit.worker import Worker

    local.run(Worker(local.queue, ["cpu"], 2, local.name, say=lambda line: None, command=command))

    machine = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [machine.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=machine.address, log_to_driver=False)
    lines: list[str] = []
    try:
        with clusters.cluster("auto", "runs") as nodes:
            assert len(nodes.devices) == 3
            sweep = Sweep.open(path, ["pause=0.5"], say=lambda line: None)
            worker = ClusterWorker.on(nodes, sweep.queue, 1, sweep.name)
            worker.command, worker.say = command, lines.append
            doomed = others[0].node_id[:8]

            def remove() -> None:
                while not any("begins" in line and doomed in line for line in list(lines)):
                    time.sleep(0.05)
                time.sleep(1)
                machine.remove_node(others[0])

            thread = threading.Thread(target=remove, daemon=True)
            thread.start()
            sweep.run(worker)
            thread.join(30)
    finally:
        ray.shutdown()
        machine.shutdown()
    assert any("the machine that it ran on is gone" in line for line in lines), lines
    assert [(t.values, t.state, t.value) for t in sweep.trials] == [
        (t.values, t.state, t.value) for t in local.trials
    ]
    for trial in sweep.trials:
        steps = [int(step) for step in Path(trial.folder, "made").read_text().split()]
        assert steps == list(range(1, len(steps) + 1))  # nothing twice
