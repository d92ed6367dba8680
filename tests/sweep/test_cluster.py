"""A sweep on three nodes, one of which is taken away, comes to what the local queue comes to."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunekit import cluster as clusters
from tunekit.cluster import ClusterWorker, Node, Nodes
from tunekit.errors import DataError, DeviceError, MissingPackageError, OutputError
from tunekit.jobs import Held, Job, Queue
from tunekit.sweep import engine
from tunekit.sweep.engine import Sweep
from tunekit.worker import Process, Worker, submit

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
        ({"ray": "2.1.0"}, DeviceError, r"has ray 2\.1\.0, and this one"),
        ({"torch": None}, DeviceError, "has torch not installed, and this one"),
        (
            {"lacks": ["/photos"]},
            DataError,
            r"01234567 \(far\) does not see /photos \(data\.path\)\nput it on",
        ),
        ({"dies": True}, DeviceError, "the node 01234567 does not answer: ModuleNotFoundError"),
    ],
)
def test_a_node_that_cannot_be_used_is_named(
    told: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nodes, "on", lambda nodes, node: {})
    with pytest.raises(kind, match=said):
        reads = {Path("/photos"): "data.path"}
        clusters._look(Nodes(FakeRay(**{"host": "far", "lacks": [], **told})), tmp_path / "runs", reads)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_node_looks_for_what_jobs_read(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "token").touch()
    places = [str(tmp_path / name) for name in ("there", "not")]
    told = clusters._describe(str(tmp_path), "token", 0, places)
    assert told["lacks"] == places[1:] and told["sees"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.10.0"
            ),
            "the Ray cluster at far:6379 has other versions: .*Ray: 2.1.0 Python: 3.10.0\n"
            "install the same versions",
        ),
        (ConnectionError("\nno answer\nat all"), "there is no Ray cluster at far:6379: no answer$"),
    ],
)
def test_a_cluster_that_cannot_be_joined(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    ray: Any = ModuleType("ray")
    ray.is_initialized, ray.init, ray.shutdown = (lambda: False), init, lambda: None
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(DeviceError, match=said), clusters.cluster("far:6379", tmp_path):
        pass


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


def test_each_node_encodes_on_its_cards_or_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(ModuleType("ray"))
    nodes.found = {
        "a": Node("a", "one", {"cpu": 1, "cuda:0": 1, "cuda:1": 1}, 8),
        "b": Node("b", "two", {"cpu": 1}, 6),
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(clusters, "RemotePeer", lambda nodes, node, name, told: (name, told))

    def names(*given: Any) -> list[Any]:
        found: list[Any] = clusters.encoders(nodes, *given)
        return [name for name, _ in found]

    assert names("auto") == ["a/cuda:0", "a/cuda:1", "b/cpu"]
    assert names("cuda") == ["a/cuda:0", "a/cuda:1"]
    assert names("cuda:1") == ["a/cuda:1"]
    assert names("cpu", 2) == ["a/cpu/1", "a/cpu/2", "b/cpu/1", "b/cpu/2"]
    told: Any = clusters.encoders(nodes, "auto", 2)
    assert told[2][1] == {"CUDA_VISIBLE_DEVICES": "1"}
    assert told[4][1] == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    with pytest.raises(DeviceError, match="no node of the cluster has the device xpu"):
        clusters.encoders(nodes, "xpu")


def command(job: Job) -> list[str]:
    return [sys.executable, "-S", "-E", "steps.py", *job.overrides]


FULL = """
import sys
from tunekit.errors import TunekitError, output_errors
try:
    with output_errors("/scratch/latents"), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"1")
except TunekitError as error:
    sys.exit(f"error: {error}")
"""


class Pretended(ClusterWorker):
    """Nodes that are all this machine; on the one called `full` there is no room on the disk."""

    has_room = False

    def _start(self, held: Held, command: list[str], log: Path) -> Process:
        if held.job.on == "full/cpu" and not self.has_room:
            command = [sys.executable, "-c", FULL]  # the kernel's own answer
        return Worker._start(self, held, command, log)


def pretended(queue: Queue, *names: str, group: str | None = None) -> Pretended:
    ray = FakeRay()
    ray.nodes = lambda: [{"NodeID": name, "Alive": True} for name in names]  # type: ignore[method-assign]
    nodes = Nodes(ray, {name: Node(name, name, {"cpu": 2**36}, 2) for name in names})
    worker = Pretended(queue, [f"{name}/cpu" for name in names], 1, group, nodes=nodes)
    worker.command, worker.say = command, lambda line: None
    return worker


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_on_one_node(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial fails, with the reason; the others go on elsewhere, and the same command continues."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(engine, "TICK", 0.01)
    path = here / "s.yaml"
    path.write_text(
        "config: curve.yaml\nmetric: {name: val_loss, goal: min}\nover: {rank: [1, 2, 3, 4, 5]}\n"
    )
    lines: list[str] = []
    sweep = Sweep.open(path, say=lines.append)
    sweep.run(pretended(sweep.queue, "full", "well", group=sweep.name))
    failed = [trial for trial in sweep.trials if trial.state == "failed"]
    assert [trial.state for trial in sweep.trials].count("done") == 4 and len(failed) == 1
    assert failed[0].note == "/scratch/latents: could not write: no space left on the disk"
    assert f"{failed[0].run}: failed, {failed[0].note}" in lines
    assert sweep.best is not None and sweep.best.value is not None
    steps = {trial.run: Path(trial.folder, "made") for trial in sweep.trials if trial.state == "done"}
    before = {name: file.read_text() for name, file in steps.items()}

    again = Sweep.open(path, say=lambda line: None)
    worker = pretended(again.queue, "full", "well", group=again.name)
    worker.has_room = True
    again.run(worker)
    assert {trial.state for trial in again.trials} == {"done"}
    assert {name: file.read_text() for name, file in steps.items()} == before  # nothing twice


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_worker_waits_for_nodes_that_are_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(clusters, "AWAY", 0.3)
    queue = Queue.of(here / "runs")
    for name in ("a", "b"):
        queue.add(here / "curve.yaml", [f"name={name}"], run=here / "runs" / name, device="cpu")
    worker = pretended(queue, "full")

    def said(line: str) -> None:
        worker.has_room = worker.has_room or "no space" in line

    worker.say = said
    worker.work()
    assert [job.state for job in queue.jobs()] == ["failed", "done"]


def test_a_queue_on_a_cluster(here: Path, monkeypatch: pytest.MonkeyPatch, shell: Callable[..., str]) -> None:
    queue = Queue.of("runs")
    submit(queue, "curve.yaml", ["name=a"])
    asked: list[Any] = []

    @contextmanager
    def pretend(*given: Any) -> Iterator[Nodes]:
        asked.extend(given)
        yield Nodes(FakeRay())

    monkeypatch.setattr(clusters, "cluster", pretend)
    monkeypatch.setattr(ClusterWorker, "on", lambda nodes, queue, at_once: pretended(queue, "well"))
    refused = shell("queue", "start", "--cluster", "auto", "--devices", "cpu", code=2)
    assert "--devices has no effect with --cluster" in refused and not asked
    assert "--devices has no effect" in shell(
        "encode", "curve.yaml", "--cluster", "auto", "--devices", "cpu", code=2
    )
    said = shell("queue", "start", "--cluster", "auto")
    assert "job 1 begins on well/cpu: a" in said and "job 1 (a): done in" in said
    assert asked[:2] == ["auto", Path("runs")]
    assert asked[2] == {here / "curve.yaml": "config of job 1", here / "curve.py": "recipe of job 1"}


def test_a_sweep_tells_a_cluster_what_it_reads(
    here: Path, monkeypatch: pytest.MonkeyPatch, shell: Callable[..., str]
) -> None:
    """So that a node without the pictures is named before a trial begins."""
    (here / "photos").mkdir()
    (here / "s.yaml").write_text("config: tiny/lora\nover: {train.lr: [1.0e-3, 2.0e-3]}\n")
    asked: list[Any] = []

    @contextmanager
    def pretend(address: str, runs: Path, reads: dict[Path, str]) -> Iterator[Nodes]:
        asked.extend(reads.items())
        raise DataError("the node 01234567 (far) does not see it", where="--cluster")
        yield

    monkeypatch.setattr(clusters, "cluster", pretend)
    said = shell("sweep", "s.yaml", "data.path=photos", "--cluster", "auto", code=2)
    assert "the node 01234567 (far) does not see it" in said
    assert (here / "photos", "data.path") in asked and not (here / "runs").exists()


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
