"""Checkpoints on disk, and which configurations may go on from them."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit.config import (
    AdapterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    PreviewConfig,
    TrainConfig,
    TrainingRunConfig,
)
from tunekit.data.images import Sample
from tunekit.errors import ArtifactError, ResumeError
from tunekit.training import checkpoint, pictures
from tunekit.training.checkpoint import (
    BASE,
    CLASS,
    INITIAL,
    MASKS,
    Checkpoints,
    compare_identities,
    identity,
    only_writer,
    weights_hash,
)


class Config(TrainingRunConfig):
    data: DataConfig


def config(**changes: Any) -> Config:
    """A config; `train__lr=1` changes one key of a section."""
    sections: dict[str, Any] = {
        "model": ModelConfig(family="sd15", source="tiny"),
        "adapter": AdapterConfig(rank=4),
        "data": DataConfig(path="photos", resolution=64),
        "train": TrainConfig(max_steps=10, lr=0.001, batch_size=2),
        "memory": MemoryConfig(),
        "objective": ObjectiveConfig(),
        "preview": PreviewConfig(),
    }
    top: dict[str, Any] = {"recipe": "lora", "name": "x", "seed": 0}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            sections[section] = sections[section].model_copy(update={name: value})
        else:
            (sections if key in sections else top)[key] = value
    return Config(**top, **sections)


def sample(content: str = "aa", caption: str = "a fox") -> Sample:
    return Sample("fox.png", caption, 64, 64, content, "photos/fox.png", lambda: b"")


def changed_keys(before: Config, after: Config, *, samples: tuple[Sample, ...] = (sample(),)) -> list[str]:
    try:
        compare_identities(identity(before, [sample()]), identity(after, samples), Path("runs/x"))
    except ResumeError as error:
        return [line.split(":")[0].strip() for line in error.message.splitlines()[1:]]
    return []


def test_what_matters_to_learning_is_named_when_it_changes() -> None:
    usual = config()
    assert changed_keys(usual, usual) == []
    assert changed_keys(usual, config(train__lr=0.002)) == ["train.lr"]
    assert changed_keys(usual, config(seed=1)) == ["seed"]
    assert changed_keys(usual, config(adapter__rank=8, objective__snr_gamma=5.0)) == [
        "adapter.rank",
        "train.snr_gamma",
    ]
    assert "adapter.rank" in changed_keys(usual, config(adapter=None))
    assert changed_keys(usual, config(train__batch_size=4, memory__precision="bf16")) == [
        "memory.precision",
        "train.batch_size",
    ]
    for name, value in {
        "timesteps": "uniform",
        "shift": 3.0,
        "prediction": "v_prediction",
        "zero_terminal_snr": True,
        "noise_offset": 0.1,
        "loss": "huber",
    }.items():
        assert changed_keys(usual, config(**{f"objective__{name}": value})) == [f"objective.{name}"]
    assert changed_keys(
        config(objective__loss="huber"),
        config(objective=ObjectiveConfig(loss="huber", huber_delta=0.5)),
    ) == ["objective.huber_delta"]
    pictures = ["data (its pictures or captions)"]
    assert changed_keys(usual, usual, samples=(sample("bb"),)) == pictures
    assert changed_keys(usual, usual, samples=(sample(caption="a dog"),)) == pictures
    assert changed_keys(usual, usual, samples=()) == pictures


RECORDED = {
    "adapter.alpha": 16.0,
    "adapter.dropout": 0.0,
    "adapter.kind": "lora",
    "adapter.rank": 4,
    "adapter.targets": None,
    "data (its pictures or captions)": "b2d4eab8b8bd2f06038d0bde5ccef3b0",
    "data.buckets": True,
    "data.caption_column": None,
    "data.caption_dropout": 0.1,
    "data.caption_prefix": "",
    "data.crop": "center",
    "data.flip": False,
    "data.image_column": None,
    "data.resolution": 64,
    "data.split": "train",
    "memory.precision": "fp32",
    "model.allow_pickle": False,
    "model.family": "sd15",
    "model.revision": None,
    "model.source": "tiny",
    "model.variant": None,
    "seed": 0,
    "train.batch_size": 2,
    "train.betas": [0.9, 0.999],
    "train.eps": 1e-08,
    "train.lr": 0.001,
    "train.max_grad_norm": 1.0,
    "train.optimizer": "adamw",
    "train.schedule": "constant",
    "train.snr_gamma": None,
    "train.warmup_steps": 0,
    "train.weight_decay": 0.01,
}
"""Of `config()`, as runs wrote it down before there was a section `objective:`."""


def test_runs_from_before_there_was_an_objective_section_go_on() -> None:
    """min-SNR was `train.snr_gamma`, and nothing else of the loss could be chosen."""
    assert identity(config(), [sample()]) == RECORDED
    assert identity(config(objective__snr_gamma=5.0), [sample()]) == {**RECORDED, "train.snr_gamma": 5.0}


def test_what_does_not_matter_may_change() -> None:
    usual = config()
    free = {
        "name": "y",
        "runs": "elsewhere",
        "optimize": ["merge"],
        "data__path": "moved",
        "data__cache": "cache",
        "memory": MemoryConfig(micro_batch=1, gradient_checkpointing=True, device="cpu"),
        "preview": PreviewConfig(prompts=["a fox"], every=5),
        "train": TrainConfig(
            **{
                **usual.train.model_dump(),
                "max_steps": 20,
                "checkpoint_every": 3,
                "log_every": 1,
                "keep_checkpoints": 5,
            }
        ),
    }
    for key, value in free.items():
        assert changed_keys(usual, config(**{key: value})) == [], key


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_can_be_prolonged_and_not_cut(schedule: str) -> None:
    short, long = (config(train__schedule=schedule, train__max_steps=steps) for steps in (10, 20))
    assert changed_keys(short, long) == []
    assert changed_keys(long, short) == ["train.max_steps"]


def test_other_weights_of_the_base_are_refused_where_both_are_known() -> None:
    before, after = (identity(config(), [sample()], {BASE: known}) for known in ("aa" * 16, "bb" * 16))
    with pytest.raises(ResumeError, match=r"model \(its weights\): aaaaaaaa\.\.\. then, bbbbbbbb\.\.\. now"):
        compare_identities(before, after, Path("runs/x"))
    compare_identities(identity(config(), [sample()]), after, Path("runs/x"))  # begun when it was not noted
    compare_identities(before, identity(config(), [sample()], {BASE: None}), Path("runs/x"))


def test_another_adapter_to_start_from_is_refused() -> None:
    plain, started = (identity(config(), [sample()], known) for known in ({}, {INITIAL: "aa"}))
    for one, other in ((plain, started), (started, plain)):
        with pytest.raises(ResumeError, match=r"adapter\.init \(its weights\)"):
            compare_identities(one, other, Path("runs/x"))


def test_runs_from_before_masks_belonged_to_samples_go_on() -> None:
    adapter = AdapterConfig(rank=4, dropout=0.1)
    now = identity(config(adapter=adapter), [sample()])
    assert now[MASKS] == "by sample"
    compare_identities({key: value for key, value in now.items() if key != MASKS}, now, Path("runs/x"))
    assert MASKS not in identity(config(), [sample()])


def test_a_hash_of_weights_is_of_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.kept.cache_dir", lambda: tmp_path / "cache")
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert weights_hash([one]) == weights_hash([two]) == weights_hash([one])
    assert weights_hash([one, two]) != weights_hash([one])
    before = weights_hash([one])
    one.write_bytes(b"WEIGHTS")
    assert weights_hash([one]) != before
    assert weights_hash([]) is None
    monkeypatch.setattr("tunekit.kept.cache_dir", lambda: one / "no folder")
    assert weights_hash([two]) == before


def test_message_says_then_and_now() -> None:
    with pytest.raises(ResumeError) as error:
        compare_identities(
            identity(config(), [sample()]), identity(config(train__lr=0.002), [sample("cc")]), Path("runs/x")
        )
    assert "train.lr: 0.001 then, 0.002 now" in str(error.value)
    assert str(error.value).startswith("runs/x: cannot continue")
    assert "name=..." in str(error.value)


def save(checkpoints: Checkpoints, step: int) -> Path:
    tensors = {"a.weight": torch.full((2, 2), float(step)), "b": torch.arange(3.0)}
    optimizer = {
        "state": {0: {"exp_avg": torch.full((2,), float(step))}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    return checkpoints.save(
        tensors, optimizer, {"step": step, "seconds": 1.5, "metrics": {}, "recent": [], "scaler": None}
    )


def test_newest_whole_checkpoint_is_read_and_old_ones_go(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, {"lr": 1}, keep=2)
    assert made.load() is None
    for step in (5, 10, 15, 20):
        save(made, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]
    (tmp_path / "step-000025").mkdir()  # without state.json: not whole
    saved = made.load()
    assert saved is not None
    assert saved.step == 20
    assert saved.trainable["a.weight"].tolist() == [[20, 20], [20, 20]]
    assert saved.optimizer["state"][0]["exp_avg"].tolist() == [20, 20]
    assert saved.state["seconds"] == 1.5


def test_what_a_task_remembers_is_read_back(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, {})
    state = {"step": 5, "seconds": 1.0, "metrics": {}, "recent": [], "scaler": None}
    folder = made.save({"a": torch.zeros(1)}, {}, state, task={"average": torch.arange(3.0)})
    saved = made.load()
    assert saved is not None and saved.task["average"].tolist() == [0, 1, 2]
    (folder / "task.safetensors").write_bytes(b"cut")
    with pytest.raises(ResumeError, match="damaged"):
        made.load()


def test_a_task_that_remembers_nothing_has_no_file(tmp_path: Path) -> None:
    """As checkpoints were written before tasks could, which are read the same."""
    made = Checkpoints(tmp_path, {})
    assert sorted(path.name for path in save(made, 5).iterdir()) == [
        "optimizer.pt",
        "state.json",
        "trainable.safetensors",
    ]
    saved = made.load()
    assert saved is not None and saved.task == {}


def test_another_identity_is_refused(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, {"train.lr": 1}), 5)
    other = Checkpoints(tmp_path, {"train.lr": 2})
    for read in (other.check, other.load):
        with pytest.raises(ResumeError, match=r"train\.lr: 1 then, 2 now"):
            read()


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "state.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    made = Checkpoints(tmp_path, {})
    file = save(made, 5) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ResumeError, match=r"step-000005: the checkpoint is damaged.*\nremove this folder"):
        made.load()


def test_a_pickle_in_the_optimizer_is_not_run(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, {})

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state": Evil()}, save(made, 5) / "optimizer.pt")
    with pytest.raises(ResumeError, match="damaged"):
        made.load()
    assert not (tmp_path / "ran").exists()


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    made = Checkpoints(tmp_path, {})
    save(made, 5)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f".step-000010.tmp-{dead.pid}"
    leftover.mkdir()
    (leftover / "state.json").write_text(json.dumps({"step": 10}))
    saved = made.load()
    assert saved is not None
    assert saved.step == 5
    assert not leftover.exists()


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LOCK_SECONDS", 0.3)
    said: list[str] = []
    with only_writer(tmp_path / "run", said.append):
        with (
            pytest.raises(ArtifactError, match="another process is writing"),
            only_writer(tmp_path / "run", said.append),
        ):
            pass
        assert said == [f"waiting for another process to leave {tmp_path / 'run'}"]
    with only_writer(tmp_path / "run", said.append):
        pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tunekit.training.checkpoint import only_writer; from pathlib import Path\n"
        "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (tmp_path / ".lock").open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    began = time.monotonic()
    with only_writer(tmp_path):
        assert time.monotonic() - began < 5


def test_class_pictures_are_compared_where_both_runs_know_them() -> None:
    usual = config()

    def of(*contents: str) -> dict[str, Any]:
        known = {CLASS: checkpoint.pictures_hash([sample(content) for content in contents])}
        return identity(usual, [sample()], known)

    before = identity(usual, [sample()])  # as runs of before have it
    compare_identities(before, of("aa"), Path("runs/x"))
    compare_identities(of("aa"), of("aa"), Path("runs/x"))
    with pytest.raises(ResumeError, match=r"data\.class_path \(its pictures\): \w{8}\.\.\. then"):
        compare_identities(of("aa"), of("bb"), Path("runs/x"))


def test_what_changed_about_pictures_is_named(tmp_path: Path) -> None:
    def named(name: str, content: str = "aa", caption: str = "a fox") -> Sample:
        return Sample(name, caption, 64, 64, content, name, lambda: b"")

    before = [named("a.png"), named("b.png"), named("c.png"), named("d.png")]
    now = [named("a.png"), named("b.png", "bb"), named("c.png", caption="a dog"), named("new.png")]
    key = "data (its pictures or captions)"
    assert pictures.changes(tmp_path, {key: now}) == {}  # a run of before
    pictures.keep(tmp_path, {key: before})
    assert pictures.changes(tmp_path, {key: before}) == {}
    found = pictures.changes(tmp_path, {key: now})
    words = "added new.png; removed d.png; other pixels in b.png; another caption of c.png"
    assert found == {key: words}
    usual = config()
    with pytest.raises(ResumeError, match=f"captions\\): {words}"):
        compare_identities(identity(usual, before), identity(usual, now), tmp_path, found)
    many = [named(f"{index:02d}.png") for index in range(30)]
    assert pictures.changes(tmp_path, {key: [*before, *many]})[key].endswith("04.png and 25 more")
    (tmp_path / pictures.NAME).write_text('{"version": 1, "groups": {"x": [1]}}')
    assert pictures.changes(tmp_path, {key: now}) == {}
