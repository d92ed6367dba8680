from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tunekit import artifacts, kept
from tunekit.artifacts import (
    ADAPTER_FILE,
    Artifact,
    RunFolder,
    Step,
    open_artifact,
    remove_folder,
)
from tunekit.errors import ArtifactError, ModelError

Fill = Callable[..., Path]
Make = Callable[..., Artifact]


@pytest.fixture
def make(fill: Fill) -> Make:
    """`make(folder, **changes)` is an artifact with one file of 100 bytes."""

    def write(folder: Path, **changes: object) -> Artifact:
        fill(folder, weights="w" * 100)
        artifact = Artifact(path=folder, model_path=folder, format="torch", family="sd15", source=str(folder))
        return dataclasses.replace(artifact, **changes).write()  # type: ignore[arg-type]

    return write


def write_adapter(path: Path) -> Path:
    header = {"unet.to_q.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    return path


# Artifacts --------------------------------------------------------------------------------------------------


def test_round_trip(make: Make, tmp_path: Path):
    step = Step(
        "prune",
        "01-prune-00000000",
        {"ratio": 0.3},
        1.5,
        {"size_bytes": 100, "slower": False},
        "abc",
        {"t": [1]},
    )
    written = make(tmp_path / "x", lineage=(step,), base="builtin/emoji-64")
    read = Artifact.load(tmp_path / "x")
    assert read == written
    assert (read.step, read.base, read.source, read.format) == (
        step,
        "builtin/emoji-64",
        str(tmp_path / "x"),
        "torch",
    )
    assert read.hash == written.hash
    assert read.size_bytes == 100


def test_hash_follows_names_and_contents_of_model_files_only(fill: Fill, tmp_path: Path):
    def digest(**files: str) -> str:
        folder = tmp_path / str(time.monotonic_ns())
        fill(folder, **files)
        return Artifact(path=folder, model_path=folder, format="torch", family="", source="").hash

    first = digest(a="1", sub__b="2")
    assert first == digest(sub__b="2", a="1", pictures__p="x", **{"artifact.json": "{}", ".hidden": "x"})
    assert (
        len({first, digest(a="1", sub__c="2"), digest(a="2", sub__b="2"), digest(a="1"), digest(sub__b="2")})
        == 5
    )
    assert digest(a="12", b="3") != digest(a="1", b="23")


def test_a_step_that_changes_nothing_points_at_its_subject(fill: Fill, make: Make, tmp_path: Path):
    subject = make(tmp_path / "run" / "01-a")
    fill(tmp_path / "run" / "02-verify", pictures__p="x")
    looked = dataclasses.replace(subject, path=tmp_path / "run" / "02-verify", recorded_hash=None).write()
    assert json.loads((tmp_path / "run" / "02-verify" / "artifact.json").read_text())["model"] == "../01-a"
    assert (looked.hash, looked.source, looked.size_bytes) == (subject.hash, subject.source, 100)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert Artifact.load(tmp_path / "moved" / "02-verify").source == str(tmp_path / "moved" / "01-a")


def test_a_hub_model_can_be_looked_at_too(tmp_path: Path):
    hub = open_artifact("somebody/some-model")
    (tmp_path / "01-verify").mkdir()
    looked = dataclasses.replace(hub, path=tmp_path / "01-verify", family="sd15").write()
    assert (looked.source, looked.model_path, looked.size_bytes) == ("somebody/some-model", None, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("{}", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 1, "format": "gguf"}', 'unknown format "gguf"'),
        ('{"version": 9}', "written by a newer tunekit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    ],
)
def test_damaged_records(tmp_path: Path, text: str, message: str):
    (tmp_path / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(tmp_path)


def change(folder: Path, *keys: str | int, value: object) -> None:
    """Sets one value in the record of a folder."""
    record = json.loads((folder / "artifact.json").read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "artifact.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("lineage",), {}, "lineage: input should be a valid list"),
        (("lineage", 0, "artifact"), "../../x", r"lineage\[0\].artifact: is no name of a folder"),
        (("lineage", 0, "metrics"), [1], r"lineage\[0\].metrics: "),
        (("lineage", 0, "seconds"), "long", r"lineage\[0\].seconds: "),
        (("lineage", 0, "details"), {"artifacts": [1]}, r"lineage\[0\].details.artifacts: "),
        (("lineage", 0, "pictures"), [{"file": "/etc/passwd", "label": "a"}], "no path inside the folder"),
        (("model",), 5, "model: "),
        (("model",), "a\0b", "model: is no path"),
        (("model",), None, "names neither a model nor a source"),
        (("opened",), {"allow_pickle": "yes"}, "opened.allow_pickle: "),
        (("sampling",), {"steps": "many"}, "sampling.steps: "),
        (("runtime",), {"runtime": "a", "machine": "b", "rows": 0}, "runtime.rows: "),
        (("hash",), 1, "hash: "),
    ],
)
def test_records_of_another_shape(
    make: Make, tmp_path: Path, keys: tuple[str | int, ...], value: object, message: str
) -> None:
    make(tmp_path / "x", lineage=(Step("prune", "x"),))
    change(tmp_path / "x", *keys, value=value)
    with pytest.raises(ArtifactError, match=rf"artifact\.json is damaged \(.*{message}"):
        Artifact.load(tmp_path / "x")


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "artifact.json")
    with pytest.raises(ArtifactError, match="is no regular file"):
        Artifact.load(tmp_path)


def test_what_is_not_finite_is_written_as_null_and_read_from_records_of_before(make: Make, tmp_path: Path):
    step = Step("verify", "x", metrics={"psnr_db": math.nan, "ssim": 0.5}, details={"t": [math.inf]})
    assert make(tmp_path / "x", lineage=(step,)).lineage[0].metrics == {"psnr_db": None, "ssim": 0.5}
    text = (tmp_path / "x" / "artifact.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (tmp_path / "x" / "artifact.json").write_text(text.replace('null,\n        "ssim"', 'NaN, "ssim"'))
    assert "NaN" in (tmp_path / "x" / "artifact.json").read_text()
    assert Artifact.load(tmp_path / "x").lineage[0].metrics["psnr_db"] is None


# Model files are those that were written --------------------------------------------------------------------


def touch(path: Path) -> None:
    """Gives a file another time stamp."""
    os.utime(path, ns=(1, 1))


def flip(path: Path) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    touch(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setattr(kept, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "weights does not hold what was written"),
        (lambda path: path.write_text("w" * 99), "weights has 99 bytes, and 100 were written"),
        (Path.unlink, "weights is missing"),
    ],
)
def test_a_changed_model_is_not_taken_for_what_was_written(
    fill: Fill, make: Make, tmp_path: Path, cache: Path, damage: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "run" / "01-a")
    fill(tmp_path / "run" / "02-b", pictures__p="x")
    subject = Artifact.load(tmp_path / "run" / "01-a")
    dataclasses.replace(subject, path=tmp_path / "run" / "02-b").write()
    damage(tmp_path / "run" / "01-a" / "weights")
    for name in ("01-a", "02-b"):
        with pytest.raises(ArtifactError, match=message):
            open_artifact(tmp_path / "run" / name)
    assert Artifact.load(tmp_path / "run" / "01-a", check=False).family == "sd15"


def test_files_are_read_once_after_they_were_moved(
    make: Make, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By size and time stamp first; what was found right is remembered by these."""
    hashed: list[Path] = []
    plain = artifacts._hash_content
    monkeypatch.setattr(artifacts, "_hash_content", lambda path: hashed.append(path) or plain(path))
    make(tmp_path / "x")
    hashed.clear()
    Artifact.load(tmp_path / "x")
    assert hashed == []
    touch(tmp_path / "x" / "weights")
    for _ in range(3):
        Artifact.load(tmp_path / "x")
    assert len(hashed) == 1
    (tmp_path / "x" / "notes.txt").write_text("mine")
    (tmp_path / "x" / "README.md").write_text("mine")
    Artifact.load(tmp_path / "x")
    Artifact.load(tmp_path / "x").check(thorough=True)
    assert len(hashed) == 2


def test_records_of_before_have_one_hash_for_all_files(make: Make, tmp_path: Path, cache: Path):
    make(tmp_path / "x")
    change(tmp_path / "x", "files", value=None)
    assert Artifact.load(tmp_path / "x").files is None
    touch(tmp_path / "x" / "weights")
    assert Artifact.load(tmp_path / "x").size_bytes == 100
    flip(tmp_path / "x" / "weights")
    os.utime(tmp_path / "x" / "weights", ns=(2, 2))
    with pytest.raises(ArtifactError, match="its files are others"):
        Artifact.load(tmp_path / "x")


def test_where_nothing_can_be_remembered_files_are_read_each_time(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "x")
    monkeypatch.setattr(kept, "cache_dir", lambda: None)
    touch(tmp_path / "x" / "weights")
    assert Artifact.load(tmp_path / "x").size_bytes == 100
    flip(tmp_path / "x" / "weights")
    with pytest.raises(ArtifactError, match="does not hold"):
        Artifact.load(tmp_path / "x")


# Others may see it ------------------------------------------------------------------------------------------


def test_a_record_names_no_home_folder(
    fill: Fill, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "secret-name"
    monkeypatch.setenv("HOME", str(home))
    base = fill(home / "models" / "base", **{"model_index.json": "{}"})
    settings = {
        "model": {"source": str(base), "variant": "fp16"},
        "data": {"path": str(home / "pictures" / "cats"), "validation": "/mnt/other/dogs", "resolution": 64},
    }
    identity = {"model.source": str(base)}
    step = Step("train", "adapter", settings, details={"identity": identity, "note": f"read {base}, all"})
    read = make(tmp_path / "run" / "adapter", format="adapter", base=str(base), lineage=(step,))
    text = (tmp_path / "run" / "adapter" / "artifact.json").read_text()
    assert "secret-name" not in text and "/mnt/other" not in text
    assert read.base == "~/models/base" and read.model_source.path == base
    assert read.lineage[0].settings["data"]["path"] == ".../cats"
    assert read.lineage[0].details["note"] == "read ~/models/base, all"


def test_records_without_their_model(make: Make, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"artifact\.json is missing"):
        Artifact.load(tmp_path)
    subject = make(tmp_path / "01-a")
    (tmp_path / "02-b").mkdir()
    dataclasses.replace(subject, path=tmp_path / "02-b").write()
    remove_folder(tmp_path / "01-a")
    with pytest.raises(ArtifactError, match="the model it points at is gone"):
        Artifact.load(tmp_path / "02-b")


# Run folders and opening ------------------------------------------------------------------------------------


def test_a_run_ends_with_the_last_step_of_its_present_chain(fill: Fill, make: Make, tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    fill(run.path, **{"config.yaml": "recipe: lora"})
    with pytest.raises(ArtifactError, match="has produced nothing yet"):
        open_artifact(run.path)
    make(run.adapter, format="adapter", base="tiny")
    assert open_artifact(run.path).format == "adapter"
    one, two, other = (
        run.pass_folder(*key) for key in [(1, "merge", "0" * 8), (2, "prune", "1" * 8), (2, "prune", "2" * 8)]
    )
    assert two.name == "02-prune-11111111"
    for folder in (one, two, other):
        make(folder)
    run.write_chain([one.name, two.name, "03-heal-33333333"])
    assert run.passes() == [one, two]
    assert open_artifact(run.path).path == two
    assert open_artifact(str(other)).path == other


def test_a_run_that_trained_all_weights(make: Make, tmp_path: Path):
    run = RunFolder(tmp_path)
    make(run.model)
    assert run.trained() == run.model
    assert open_artifact(tmp_path).path == run.model


def test_open_folders_and_files_of_others(fill: Fill, tmp_path: Path):
    torch_folder = fill(tmp_path / "d", **{"model_index.json": "{}"})
    onnx_folder = fill(tmp_path / "o", **{"model_index.json": "{}", "unet__model.onnx": "x"})
    assert open_artifact(torch_folder).format == "torch"
    assert open_artifact(onnx_folder, family="sd15").family == "sd15"
    assert open_artifact(onnx_folder).format == "onnx"
    assert open_artifact(write_adapter(tmp_path / "a" / ADAPTER_FILE).parent).format == "adapter"
    file = write_adapter(tmp_path / "b" / "style.kohya.safetensors")
    assert open_artifact(file).format == "adapter"
    assert open_artifact(file.parent).source == str(file)
    assert open_artifact("tiny", family="sd15").source == "tiny"
    hub = open_artifact("somebody/some-model")
    assert (hub.source, hub.path, hub.format) == ("somebody/some-model", None, "torch")
    assert hub.hash != open_artifact("somebody/other-model").hash


def test_open_nothing(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "runs" / "quickstart", **{"config.yaml": ""})
    with pytest.raises(ArtifactError, match=r'there is no "runs/quikstart"\ndid you mean "runs/quickstart"'):
        open_artifact("runs/quikstart")
    with pytest.raises(ArtifactError, match=r'there is no "\./somebody/model"'):
        open_artifact("./somebody/model")
    with pytest.raises(ArtifactError, match="neither a run, an artifact"):
        open_artifact(fill(tmp_path / "empty"))
    with pytest.raises(ArtifactError, match="not a model file"):
        open_artifact(fill(tmp_path / "f", **{"a.txt": "x"}) / "a.txt")
    with pytest.raises(ModelError, match="bundled under the name"):
        open_artifact("builtin/nothing-like-it")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff\xff\xff\x7f\0\0\0\0{")
    with pytest.raises(ArtifactError, match="truncated"):
        open_artifact(tmp_path / "cut.safetensors")
