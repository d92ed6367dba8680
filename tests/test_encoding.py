"""`tunekit encode`: what the training finds, who shares it, and what becomes of it when some are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunekit import cli, encoding, leases
from tunekit.config import load
from tunekit.encoding import Encoding, answer
from tunekit.errors import ArtifactError, ConfigError, DataError, DeviceError, OutputError
from tunekit.jobs import locked
from tunekit.leases import Gone, LocalPeer, fill

pytest.importorskip("fcntl")
MakePictures = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pictures: MakePictures) -> Path:
    """A folder with 24 pictures and a config for them; the working directory."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "photos", 24, (40, 40))
    (tmp_path / "mine.yaml").write_text(
        "recipe: lora\nmodel: {family: sd15, source: tiny}\n"
        "data: {path: photos, resolution: 32, validation: 0.25, flip: true}\n"
        "train: {max_steps: 2, lr: 1e-3}\npreview: {prompts: [a fox]}\nmemory: {device: cpu}\n"
    )
    return tmp_path


def single(cache: Path, *overrides: str) -> tuple[dict[str, bytes], list[str]]:
    """Name -> content of the files that a training's own encoding makes in one process; and what it says."""
    from accelerate import Accelerator

    from tunekit import families
    from tunekit.data.cache import Encoder
    from tunekit.data.images import scan_data

    config: Any = load("mine.yaml", overrides).config
    scan, family, said = scan_data(config.data), families.get("sd15"), []
    encoder = Encoder(family, family.tiny(), cache=cache, accelerator=Accelerator(cpu=True), say=said.append)
    encoder.dataset(scan.samples, config.data, seed=config.seed)
    encoder.dataset(scan.held_out, config.data, seed=config.seed, fixed=True)
    encoder.prompts([*config.preview.prompts, ""])
    return contents(cache), said


def contents(cache: Path) -> dict[str, bytes]:
    """Name -> content of all files of a cache, and of all entries of shards; each once."""
    from tunekit.data import store as stores

    found: dict[str, bytes] = {}
    for path in cache.rglob("*.safetensors"):
        found[f"{path.parent.name}/{path.stem}"] = path.read_bytes()
    for path in cache.rglob("*.shard"):
        content = path.read_bytes()
        with path.open("rb") as file:
            rows = stores._index(file.fileno(), len(content))
        assert rows is not None
        for high, low, at, size in rows.tolist():
            name = f"{path.parent.name}/{high:016x}{low:016x}"
            assert name not in found, "encoded twice"
            found[name] = content[at : at + size]
    return found


class Here:
    """A process that is none: answers in this one; dies when it is told to."""

    def __init__(
        self, name: str, *, dies_at: int | None = None, answers: dict[str, Any] | None = None
    ) -> None:
        self.name, self.dies_at, self.told = name, dies_at, answers or {}
        self.share = Encoding()
        self.calls: deque[dict[str, Any]] = deque()
        self.made: list[tuple[int, int]] = []
        self.ended = False

    def ask(self, do: str, *given: Any) -> None:
        self.calls.append({"do": do, "with": json.loads(json.dumps(given))})

    def poll(self) -> dict[str, Any] | None:
        if not self.calls:
            return None
        call = self.calls.popleft()
        if call["do"] == "encode":
            if self.dies_at is not None and len(self.made) == self.dies_at:
                raise Gone("it was killed")
            self.made.append((call["with"][0], call["with"][1]))
        if call["do"] in self.told:
            return json.loads(json.dumps(self.told[call["do"]]))
        return json.loads(json.dumps(answer(self.share, call)))

    def end(self) -> None:
        self.ended = True


def test_what_is_encoded_ahead_is_what_the_training_makes(here: Path) -> None:
    expected, said = single(here / "alone")
    assert said[0] == "encoding 36 pictures"
    filled = fill([Here("cpu")], "mine.yaml", [], here / "runs" / ".cache", say=said.append)
    assert contents(here / "runs" / ".cache") == expected
    latents = [name for name in expected if name.startswith("latents")]
    picture, caption = filled.works["picture"], filled.works["caption"]
    assert (picture.count, picture.encoded, picture.found) == (24, 42, 0) and len(latents) == 42
    assert (caption.count, caption.encoded) == (26, 26)
    assert not list(here.rglob("*.part")) and not list((here / "runs" / ".cache").rglob("*.safetensors"))
    again, said = single(here / "runs" / ".cache")
    assert again == expected and said == []
    filled = fill([Here("cpu")], "mine.yaml", [], here / "runs" / ".cache", say=said.append)
    assert filled.encoded == 0 and filled.works["picture"].found == 42
    assert str(filled).startswith("24 pictures: 0 encoded, 42 were there; 26 captions: 0 encoded, 26")


def test_class_pictures_that_are_there_are_encoded_too(here: Path, make_pictures: MakePictures) -> None:
    make_pictures(here / "robots", 3, (40, 40), captions=False, seed=1)
    make_pictures(here / "class", 2, (48, 40), captions=False, seed=2)
    (here / "dream.yaml").write_text(
        "recipe: dreambooth\nmodel: {family: sd15, source: tiny}\n"
        "data: {path: robots, resolution: 32, instance_prompt: a sks robot, class_prompt: a robot,\n"
        "       class_path: class, class_pictures: 4}\n"
        "train: {max_steps: 2, lr: 1e-3}\nmemory: {device: cpu}\n"
    )
    lines: list[str] = []
    filled = fill([Here("cpu")], "dream.yaml", [], here / "cache", say=lines.append)
    assert lines == ["2 class pictures are drawn, and encoded, by the training"]
    assert filled.works["picture"].encoded == 5 and filled.works["caption"].encoded == 3


def test_what_a_process_had_that_is_gone_others_encode(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE", 2)
    expected, _ = single(here / "alone")
    lines: list[str] = []
    peers = [Here("a"), Here("b", dies_at=2), Here("c", dies_at=9)]
    filled = fill(peers, "mine.yaml", [], here / "runs" / ".cache", say=lines.append)
    for peer in peers[1:]:
        for work in peer.share._works:
            work.store.close()  # as whoever mends does
    assert contents(here / "runs" / ".cache") == expected
    assert filled.lost["b"] == "it was killed" and peers[1].ended
    assert "b is gone (it was killed); others go on with its part" in lines
    assert filled.encoded == len(expected)


def told(**fields: Any) -> dict[str, Any]:
    return {"value": fields}


OPENED = {"settle": told(precision="fp32"), "open": told(works=[["picture", 99]], sees="1", lines=[])}
MADE = {**OPENED, "encode": told(made=1, there=0, bytes=1), "close": told()}


def test_leases_come_to_all_numbers_once(tmp_path: Path) -> None:
    peers = [Here(name, answers=MADE) for name in "abc"]
    filled = fill(peers, "x.yaml", [], tmp_path)
    assert sorted(start for peer in peers for _, start in peer.made) == [0, 32, 64, 96]
    assert filled.as_json()["processes"] == [
        {"name": peer.name, "encoded": len(peer.made), "lost": None} for peer in peers
    ]
    assert filled.as_json()["pictures"] == {"count": 99, "encoded": 4, "found": 0}


def test_a_lease_that_ends_every_process_is_named(tmp_path: Path) -> None:
    few = {**MADE, "open": told(works=[["picture", 32]], sees="1", lines=[])}
    peers = [Here(name, answers=few, dies_at=0) for name in "abcd"]
    with pytest.raises(DeviceError, match=r"3 processes have ended over numbers 0 to 31; the last: it was k"):
        fill(peers, "x.yaml", [], tmp_path, say=lambda line: None)
    assert all(peer.ended for peer in peers)


@pytest.mark.parametrize(
    ("second", "kind", "said"),
    [
        ({"open": told(works=[["picture", 98]], sees="2", lines=[])}, DeviceError, "b sees other pictures"),
        (
            {"settle": {"error": {"kind": "DataError", "message": "no such folder", "where": None}}},
            DataError,
            "b: no such folder",
        ),
        (
            {"encode": {"error": {"kind": "OutputError", "message": "full", "where": "/x", "hint": "free"}}},
            OutputError,
            "/x: full\nfree",
        ),
    ],
)
def test_what_a_process_says_is_said(
    tmp_path: Path, second: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        fill([Here("a", answers=MADE), Here("b", answers={**MADE, **second})], "x.yaml", [], tmp_path)


def test_one_precision_for_all(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Noting(Here):
        def ask(self, do: str, *given: Any) -> None:
            asked.append((self.name, do, *given))
            super().ask(do, *given)

    lower = {**MADE, "settle": told(precision="bf16")}
    fill([Noting("a", answers=MADE), Noting("b", answers=lower)], "x.yaml", [], tmp_path)
    assert [call for call in asked if call[1] == "open"] == [("a", "open", "bf16"), ("b", "open", "bf16")]


def test_none_is_left_and_two_at_once(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="the process on a is gone: it was killed; none is left"):
        fill([Here("a", answers=MADE, dies_at=1)], "x.yaml", [], tmp_path, say=lambda line: None)
    with locked(tmp_path / leases.LOCK), pytest.raises(ArtifactError, match="another tunekit encode fills"):
        fill([Here("a", answers=MADE)], "x.yaml", [], tmp_path)


def test_a_recipe_without_pictures_has_nothing_to_encode() -> None:
    with pytest.raises(ConfigError, match="trains on no pictures, so there is nothing to encode"):
        encoding.training_config(load("sd15/optimize", stand_in="x"))


class Forked(LocalPeer):
    """A process that has all imported already."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        calls, asked = os.pipe()
        answers, said = os.pipe()
        child = os.fork()
        if not child:
            try:
                encoding.serve(os.fdopen(calls), os.fdopen(said, "w"))
            finally:
                os._exit(1)
        os.close(calls)
        os.close(said)
        self.process: Any = Child(child, os.fdopen(asked, "wb"), os.fdopen(answers, "rb"))
        self._answers = deque()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()


class Child:
    """As `subprocess.Popen` tells of a process."""

    def __init__(self, pid: int, stdin: Any, stdout: Any) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float = 10) -> int | None:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", [Forked, pytest.param(LocalPeer, marks=pytest.mark.slow)])
def test_two_processes_one_of_which_is_killed(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LocalPeer]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(leases, "LEASE", 1)
    monkeypatch.setattr(leases, "AHEAD", 8)
    expected, _ = single(here / "alone")
    other, killed = kind("one"), kind("two")
    poll, answers = killed.poll, []

    def kill() -> dict[str, Any] | None:
        found = poll()
        if found:
            answers.append(found)
            if len(answers) == 4:  # settle, open, and of its first eight pictures two
                os.kill(killed.process.pid, signal.SIGKILL)
        return found

    monkeypatch.setattr(killed, "poll", kill)
    lines: list[str] = []
    filled = fill([other, killed], "mine.yaml", [], here / "runs" / ".cache", say=lines.append)
    assert contents(here / "runs" / ".cache") == expected
    assert "two is gone (it was killed, perhaps because memory ran out); others go on with its part" in lines
    assert list(filled.lost) == ["two"]
    assert any("entries of a process that is gone" in line for line in lines)


def test_the_command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tunekit.cli.encoding._here", lambda *_: [Here("cpu")])
    with pytest.raises(SystemExit):
        cli.app(["encode", "mine.yaml", "data.flip=false", "--json"], prog_name="tunekit")
    said, beside = capsys.readouterr()
    assert json.loads(said)["pictures"] == {"count": 24, "encoded": 24, "found": 0}
    assert f"encodes on cpu, into {here / 'runs' / '.cache'}" in beside.replace("\n", "")
    with pytest.raises(SystemExit):
        cli.app(["encode", "mine.yaml", "data.flip=false"], prog_name="tunekit")
    assert capsys.readouterr().out.startswith("24 pictures: 0 encoded, 24 were there; 26 captions: 0 encoded")


@pytest.mark.slow
def test_a_training_from_shards_is_that_from_files(
    here: Path, tunekit_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    ahead = tunekit_command("encode", "mine.yaml", "runs=ahead", "--processes", "2", cwd=here)
    assert ahead.returncode == 0, ahead.stderr
    losses = {}
    for runs in ("ahead", "alone"):
        done = tunekit_command("run", "mine.yaml", f"runs={runs}", "train.max_steps=6", cwd=here)
        assert done.returncode == 0, done.stderr
        assert ("encoding " in done.stdout) == (runs == "alone")
        lines = (here / runs / "mine" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[runs] = [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows]
    assert losses["ahead"] == losses["alone"] and len(losses["alone"]) == 7
    assert not list((here / "ahead" / ".cache").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster")
def test_three_nodes_of_which_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pictures: MakePictures
) -> None:
    """2,000 pictures come to the very bytes of a single process, whatever a node leaves half-done."""
    import ray
    from ray.cluster_utils import Cluster

    from tunekit import cluster as clusters

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_pictures(tmp_path / "photos", 2000, (32, 32))
    (tmp_path / "mine.yaml").write_text(
        "recipe: lora\nmodel: {family: sd15, source: tiny}\ndata: {path: photos, resolution: 32}\n"
        "train: {max_steps: 2, lr: 1e-3}\npreview: {prompts: [a fox]}\nmemory: {device: cpu}\n"
    )
    cache = tmp_path / "runs" / ".cache"
    machine = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [machine.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=machine.address, log_to_driver=False)
    lines: list[str] = []
    try:
        with clusters.cluster("auto", cache, {tmp_path / "photos": "data.path"}) as nodes:
            peers = clusters.encoders(nodes, "auto")
            doomed = next(peer for peer in peers if peer.name.startswith(others[0].node_id[:8]))
            poll, answers = doomed.poll, []

            def note() -> dict[str, Any] | None:
                found = poll()
                if found:
                    answers.append(found)
                return found

            monkeypatch.setattr(doomed, "poll", note)

            def remove() -> None:
                while len(answers) < 6:
                    time.sleep(0.01)
                machine.remove_node(others[0], allow_graceful=False)

            thread = threading.Thread(target=remove, daemon=True)
            thread.start()
            filled = fill(peers, "mine.yaml", [], cache, say=lines.append)
            thread.join(30)
    finally:
        ray.shutdown()
        machine.shutdown()
    assert list(filled.lost) == [doomed.name], lines
    assert filled.works["picture"].count == 2000 and len(filled.peers) == 3
    found = contents(cache)
    expected, _ = single(tmp_path / "alone")
    assert found == expected
    print(filled, f"{filled.seconds:.1f} s", filled.peers)
