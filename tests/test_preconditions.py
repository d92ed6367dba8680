"""What a run refuses, `check` refuses too: before anything is loaded or written, and all of it at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunekit import preconditions, workspace
from tunekit.artifacts import Artifact
from tunekit.config import load
from tunekit.errors import TunekitError
from tunekit.registry import recipe_path
from tunekit.resources import resolve_path

CONFIG: dict[str, Any] = {
    "recipe": "lora",
    "model": {"family": "sd15", "source": "tiny"},
    "data": {"path": "builtin/pictures/subject", "resolution": 32, "caption_column": None},
    "train": {"max_steps": 1, "lr": 1e-3},
    "memory": {"device": "cpu"},
}
DREAMBOOTH = CONFIG | {
    "recipe": "dreambooth",
    "data": {"path": "builtin/pictures/subject", "instance_prompt": "sks", "resolution": 32},
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(DREAMBOOTH), encoding="utf-8")
    return tmp_path


def problems(*overrides: str) -> list[tuple[str, str]]:
    """Key and message of all that `check` finds."""
    return [(row.key, row.message) for row in workspace.check("mine.yaml", overrides).problems]


def test_nothing_is_wrong_with_what_runs(desk: Path):
    assert problems() == []
    found = preconditions.look(load("mine.yaml"))
    found.check()
    assert found.scan is not None
    assert (found.facts["pictures"], found.facts["passes"]) == (len(found.scan.samples), "none")
    assert list(desk.iterdir()) == [desk / "mine.yaml"]


def test_a_distilled_base_is_named_before_it_is_trained(desk: Path):
    """By what its configurations say, or by its name where they are not here."""
    from tunekit import families

    family = families.get("flux")
    pipeline = family.tiny()
    family.save(pipeline, desk / "dev")
    config = desk / "dev" / "transformer" / "config.json"
    assert said_of_the_base("model.source=dev") == []
    config.write_text(config.read_text().replace('"guidance_embeds": true', '"guidance_embeds": false'))
    for source in ("dev", "black-forest-labs/FLUX.1-schnell"):
        (note,) = said_of_the_base(f"model.source={source}")
        assert note.startswith(source) and "black-forest-labs/FLUX.1-dev" in note
    assert said_of_the_base("model.source=black-forest-labs/FLUX.1-dev") == []


def said_of_the_base(*overrides: str) -> list[str]:
    """What `check` and a run say of the base beforehand."""
    loaded = load("mine.yaml", ["model.family=flux", *overrides])
    return [line for line in preconditions.look(loaded).notes if "distilled" in line]


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("memory.device=cuda:77", "memory.device", '"cuda:77" is not there'),
        ("memory.precision=fp16", "memory.precision", "needs a GPU"),
        ("adapter.targets=[to_q, no_such]", "adapter.targets", '"no_such" names no linear'),
        (f"name={'n' * 240}", "name", "150 bytes"),
        ("runs=mine.yaml/runs", "runs", "mine.yaml is not a folder"),
        (f"runs={'/'.join(['n' * 300] * 2)}", "runs", "too long"),
        ("data.cache=mine.yaml", "data.cache", "mine.yaml is not a folder"),
        ("model.source=nothing/here/at/all", "model.source", "nothing/here/at/all"),
        ("optimize=[no_such]", "optimize[0]", "there is no pass 'no_such'"),
        ("data.path=nowhere", "data.path", "no such folder"),
        ("data.path=builtin/nothing", "data.path", "builtin/nothing"),
    ],
)
def test_what_a_run_would_find_out_later(desk: Path, override: str, key: str, words: str):
    ((found, message),) = problems(override)
    assert found == key and words in message


@pytest.mark.parametrize(
    ("package", "override", "key"),
    [
        ("bitsandbytes", "train.optimizer=adamw8bit", "train.optimizer"),
        ("bitsandbytes", "memory.base_precision=nf4", "memory.base_precision"),
        ("tensorboard", "train.trackers=[tensorboard]", "train.trackers"),
        ("wandb", "train.trackers=[wandb]", "train.trackers"),
    ],
)
def test_packages_that_are_missing(
    desk: Path, monkeypatch: pytest.MonkeyPatch, package: str, override: str, key: str
):
    monkeypatch.setitem(sys.modules, package, None)
    ((found, message),) = problems(override)
    assert found == key and f'"{package}"' in message and "install" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(desk: Path):
    (desk / "shut").mkdir(mode=0o500)
    assert problems("runs=shut/runs") == [
        ("runs", "shut/runs cannot be written: no permission to write to shut")
    ]


def test_an_adapter_without_a_base_is_not_merged(desk: Path):
    (desk / "adapter").mkdir()
    (desk / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    Artifact(desk / "adapter", desk / "adapter", "adapter", "sd15", "adapter").write()
    config = {"recipe": "optimize", "model": {"family": "sd15", "source": "adapter"}, "optimize": ["merge"]}
    (desk / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    ((key, message),) = problems()
    assert key == "optimize[0]" and "needs the base of the adapter" in message
    config["optimize"] = [{"merge": {"base": "tiny"}}]
    (desk / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert problems() == []


def test_more_processes_than_work(desk: Path):
    found = preconditions.look(load("mine.yaml", ["train.batch_size=2"]), processes=3, pictures=False)
    assert [error.key for error in found.errors] == ["train.batch_size"]
    assert found.scan is None


def test_all_of_it_at_once_and_the_same_from_the_recipe(desk: Path):
    """The recipe itself is asked, as `accelerate launch` starts it: nothing is encoded or written before."""
    overrides = [
        "memory.device=cuda:77",
        "adapter.targets=[no_such]",
        "optimize=[verify, no_such]",
        "data.path=no",
    ]
    found = preconditions.look(load("mine.yaml", overrides))
    assert [error.key or error.parts[0].key for error in found.errors] == [
        *("optimize[1]", "memory.device", "adapter.targets", "data.path")
    ]
    with pytest.raises(TunekitError) as raised:
        found.check()
    assert len(raised.value.parts) == 4
    command = [sys.executable, str(recipe_path("dreambooth")), "--config", "mine.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in raised.value.parts:
        assert part.message in done.stderr
    assert list(desk.iterdir()) == [desk / "mine.yaml"]


def notes(*overrides: str) -> str:
    return "\n".join(workspace.check("mine.yaml", overrides).notes)


def test_what_a_run_reads(desk: Path, tiny_source: Path):
    (desk / "photos").mkdir()
    (desk / "clip").mkdir()
    given = ["data.path=photos", "preview={prompts: [a], clip_model: clip}", "data.cache=photos"]
    chain = "optimize=[merge, {verify: {max_clip_drop: 0.1, clip_model: clip}}]"
    found = preconditions.reads(load("mine.yaml", [*given, f"model.source={tiny_source}", chain]))
    assert found == {
        "config": desk / "mine.yaml",
        "data.path": desk / "photos",
        "model.source": tiny_source,
        "preview.clip_model": desk / "clip",
        "optimize.1.verify.clip_model": desk / "clip",
    }
    assert set(preconditions.reads(load("mine.yaml"))) == {"config"}  # the rest comes with tunekit
    assert preconditions.reads(load("mine.yaml"), desk.parent) == {"config": desk / "mine.yaml"}


def test_what_is_not_used_is_noted_and_no_problem(desk: Path):
    (desk / "photos").mkdir()
    picture = next(resolve_path("builtin/pictures/subject").glob("*.png"))
    (desk / "photos" / "a.png").write_bytes(picture.read_bytes())
    (desk / "photos" / "lost.txt").write_text("of a picture that was deleted")
    assert "1 used, 1 ignored" in notes("data.path=photos")
    assert problems("data.path=photos") == []


def test_options_without_effect_on_a_model_that_is_here_are_noted(desk: Path, tiny_source: Path):
    assert "revision" not in notes(f"model.source={tiny_source}")
    assert "model.revision=main has no effect" in notes(f"model.source={tiny_source}", "model.revision=main")


def test_prompts_that_are_cut_are_noted(desk: Path):
    long = " ".join(["a long way to the sea"] * 20)
    text = notes(
        f"data.instance_prompt={long}", f"preview.prompts=['{long}']", "model.source=builtin/emoji-64"
    )
    assert "1 of 1 prompts and captions is longer than the 32 tokens" in text


def test_a_resolution_that_would_be_rounded_is_refused_unless_a_run_has_it(desk: Path):
    words = ("data.resolution=72", "model.source=builtin/emoji-64")
    (row,) = workspace.check("mine.yaml", words).problems
    assert (row.place, row.key, row.hint) == (
        "command line",
        "data.resolution",
        "set data.resolution=64 or 80",
    )
    assert "72 is not a multiple of 16, which builtin/emoji-64 needs" in row.message
    (desk / "runs" / "mine" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert problems(*words) == []
