"""The model card: what it tells, and what it does not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunekit import card, families
from tunekit.artifacts import Artifact, Step
from tunekit.families.family import FamilyFacts
from tunekit.registry import FAMILIES

SETTINGS: dict[str, Any] = {
    "recipe": "dreambooth", "name": "my-robot", "seed": 3,
    "train": {"lr": 1e-4, "batch_size": 4}, "adapter": {"kind": "lora", "rank": 8, "alpha": 16.0},
    "data": {"instance_prompt": "a photo of `sks` robot", "resolution": 512, "path": "pictures/robots"},
}  # fmt: skip


@pytest.fixture
def facts() -> FamilyFacts:
    """Of the family of most adapters."""
    return families.get("sd15").facts


def make(folder: Path, base: str | None, **changes: Any) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "my-robot.kohya.safetensors").write_bytes(b"x")
    metrics = {"steps": 100, "val_loss_first": 0.5, "val_loss": 0.25}
    step = Step("train", folder.name, SETTINGS, metrics=metrics, details={"step": 100})
    artifact = Artifact(folder, folder, "adapter", "sd15", str(folder), (step,), base=base)
    return dataclasses.replace(artifact, **changes).write()


def test_a_card_tells_how_to_use_an_adapter(tmp_path: Path, facts: FamilyFacts) -> None:
    artifact = card.write(make(tmp_path / "adapter", facts.default_source), facts)
    text = (tmp_path / "adapter" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "creativeml-openrail-m",
        "base_model": facts.default_source,
        "instance_prompt": "a photo of `sks` robot",
        "tags": ["tunekit", "text-to-image", "lora", "diffusers"],
    }
    assert "- Trigger: `` a photo of `sks` robot ``" in body
    assert "my-robot.kohya.safetensors` into `models/loras`" in body
    assert "- rank: 8" in body and "- seed: 3" in body and "0.25, of the untrained model 0.5" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f'from_pretrained("{facts.default_source}")' in code and "load_lora_weights" in code
    assert "robots" not in text  # the folder of pictures is nobody's business
    assert Artifact.load(tmp_path / "adapter").size_bytes == artifact.size_bytes == 1


def test_the_file_for_comfyui_is_named_whatever_its_names_are(tmp_path: Path, facts: FamilyFacts) -> None:
    artifact = make(tmp_path / "adapter", facts.default_source)
    (tmp_path / "adapter" / "my-robot.kohya.safetensors").rename(
        tmp_path / "adapter" / "a.comfyui.safetensors"
    )
    card.write(artifact, facts)
    assert "a.comfyui.safetensors` into `models/loras`" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_card_is_no_part_of_the_model(tmp_path: Path, facts: FamilyFacts) -> None:
    plain = make(tmp_path / "a", "tiny")
    with_card = card.write(make(tmp_path / "b", "tiny"), facts)
    assert plain.hash == with_card.hash == make(tmp_path / "b", "tiny").hash
    (tmp_path / "b" / "README.md").write_text("mine")
    assert Artifact.load(tmp_path / "b").hash == plain.hash


def test_nobodys_folders_are_in_a_card(
    tmp_path: Path, facts: FamilyFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "secret-name"))
    base = tmp_path / "secret-name" / "models" / "mine"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\ntags:\n- a\nlicense: cc-by-4.0\n---\n")
    card.write(make(tmp_path / "adapter", str(base)), facts)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text and "secret-name" not in text and "Base: `.../mine`" in text
    assert re.search(r"^license: cc-by-4.0$", text, re.M) and "base_model" not in text


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("tiny", "random weights"),
        ("somebody/else", "not known here (the usual base of the family is under `creativeml-openrail-m`)"),
        (None, "random weights"),
    ],
)
def test_what_is_not_known_of_a_licence_is_said(
    tmp_path: Path, facts: FamilyFacts, base: str | None, told: str
) -> None:
    text = card.text(make(tmp_path / "adapter", base), facts)
    assert told in text and "license: other" in text


def test_a_step_that_only_looks_has_no_card(tmp_path: Path, facts: FamilyFacts) -> None:
    subject = make(tmp_path / "01-a", "tiny")
    (tmp_path / "02-verify").mkdir()
    looked = dataclasses.replace(subject, path=tmp_path / "02-verify").write()
    card.write(looked, facts)
    assert not (tmp_path / "02-verify" / "README.md").exists()


def test_every_family_names_its_licence() -> None:
    assert [name for name, family in FAMILIES.items() if not family.facts.licence] == []
