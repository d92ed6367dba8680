"""Runs side by side: what is found out about them, what is drawn, and what the page holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tunekit import cli, families, runtime, workspace
from tunekit.adapters import add_adapter, load_adapter, remove_adapter, save_adapter
from tunekit.artifacts import Artifact, RunFolder, Step, write_json, write_text
from tunekit.comparison import thumbnails
from tunekit.config import AdapterConfig, SamplingConfig
from tunekit.errors import ArtifactError, ConfigError

FAMILY = families.get("sd15")
BASE = FAMILY.tiny()
SAMPLING = SamplingConfig(steps=2, guidance=2.0, height=32, width=32)
CONFIG: dict[str, Any] = {
    "recipe": "lora",
    "name": "low",
    "model": {"family": "sd15", "source": "tiny"},
    "data": {"path": "photos", "validation": 0.2},
    "train": {"max_steps": 4, "lr": 0.001, "early_stop": None},
    "preview": {"prompts": ["a <red> fox"], "seed": 7},
    "optimize": ["merge", {"verify": {"min_psnr_db": 30}}, {"verify": {"against": "first"}}],
}


def adapter(folder: Path, step: int, seed: int) -> None:
    """An adapter with random weights, as a training leaves it."""
    remove_adapter(BASE, FAMILY)  # that of the call before
    denoiser, config = FAMILY.denoiser(BASE), AdapterConfig(rank=2, alpha=2)
    parameters = add_adapter(denoiser, config, FAMILY.facts.lora_targets)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    save_adapter(folder, denoiser, FAMILY, config, name="run", title="run", base_source="tiny")
    metrics: dict[str, Any] = {"loss": 0.25, "parameters": 1000}
    train = Step("train", folder.name, seconds=8.0, metrics=metrics, details={"step": 4, "taken": step})
    Artifact(folder, folder, "adapter", "sd15", str(folder), (train,), base="tiny", sampling=SAMPLING).write()


def make_run(path: Path, seed: int, **changed: Any) -> RunFolder:
    run = RunFolder(path)
    for step in (2, 4):
        adapter(run.adapters / f"step-{step:06d}", step, seed + step)
    shutil.copytree(run.adapters / "step-000002", run.adapter)
    tree = {**CONFIG, "name": path.name, **changed}
    write_text(run.config, yaml.safe_dump(tree, sort_keys=False))
    losses = {0: 0.9, 2: 0.1 + seed / 1000, 4: 0.3}
    rows = [{"step": 0, "val_loss": losses[0]}]
    rows += [{"step": n, "loss": 1 / n, "seconds": 2.0 * n} for n in range(1, 5)]
    for row in rows[1:]:
        row.update({"val_loss": losses[row["step"]]} if row["step"] in losses else {})
    write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    step_phase = {"peak_allocated_bytes": 1, "peak_reserved_bytes": 2}
    measured = {"peak_allocated_bytes": 2**20, "peak_reserved_bytes": 2**21}
    write_json(
        run.path / "plan.json",
        {
            "device": "cpu",
            "budget_bytes": 2**30,
            "device_bytes": 2**22,
            "peak_phase": "step",
            "phases": {"step": {**step_phase, "measured": measured}},
        },
    )
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, low and high, and the adapter of another program. Only to be read."""
    root = tmp_path_factory.mktemp("compared")
    make_run(root / "low", 10)
    train = {**CONFIG["train"], "lr": 0.002}
    del train["early_stop"]  # as in a run from before there was the key
    chain = ["merge", {"prune": {"ratio": 0.2}}, {"verify": {"min_psnr_db": 28}}]
    make_run(root / "high", 20, train=train, optimize=chain)
    adapter(root / "made", 1, 99)
    shutil.copy(root / "made" / "run.kohya.safetensors", root / "theirs.safetensors")
    return root


def test_steps_and_strengths_are_drawn_by_all_and_stand_in_one_page(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [str(runs / name) for name in ("low", "high", "theirs.safetensors")]
    options: dict[str, Any] = {"strengths": (0.0, 0.5, 1.0), "seeds": (7, 8), "checkpoints": True}
    found = workspace.compare(named, out=tmp_path, device="cpu", **options)
    assert found == json.loads((tmp_path / "compare.json").read_text())

    # What is known of the runs.
    low, high, theirs = found["runs"]
    assert [low["name"], high["name"], theirs["name"]] == ["low", "high", "theirs"]
    assert (low["steps"], low["taken"], low["best_step"], low["best_val_loss"]) == (4, 2, 2, 0.11)
    assert (low["seconds_per_step"], low["peak_bytes"], low["planned_bytes"]) == (2.0, 2**21, 2**22)
    assert found["differs"] == {
        "train.lr": {"low": "0.001", "high": "0.002"},
        "optimize": {"low": "merge > verify > verify", "high": "merge > prune > verify"},
        "optimize.verify.min_psnr_db": {"low": "30", "high": "28"},
        "optimize.verify#2.against": {"low": "first", "high": "-"},
        "optimize.prune.ratio": {"low": "-", "high": "0.2"},
    }

    # Each of five adapters, at three strengths, with two seeds.
    cells = {(c["run"], c["step"], c["strength"], c["seed"]): c["file"] for c in found["pictures"]}
    assert len(cells) == len(found["pictures"]) == 5 * 3 * 2
    bases = {file for (*_, strength, seed), file in cells.items() if strength == 0 and seed == 7}
    assert len(bases) == 1  # at no strength all are the base, which is drawn once
    assert len(set(cells.values())) == 5 * 2 * 2 + 2
    for source, key in (
        (runs / "high" / "adapters" / "step-000004", ("high", 4, 1.0, 8)),
        (runs / "made", ("theirs", None, 1.0, 8)),
    ):
        (drawn,) = workspace.generate(Artifact.load(source), "a <red> fox", seeds=8, device="cpu")
        with Image.open(tmp_path / str(cells[key])) as picture:
            apart = torch.tensor(list(picture.tobytes())).sub(torch.tensor(list(drawn.tobytes()))).abs()
        assert int(apart.max()) <= 1, source  # to rounding, in another batch

    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in page and "default-src 'none'" in page and "a &lt;red&gt; fox (seed 7)" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count('<img loading="lazy"') == 5 * 3 * 2
    assert page.count("<svg") == 2 and page.count("<circle") == 2  # the lowest of both
    assert "lowest 0.1100 at step 2" in page and "step 2, the result" in page
    assert "2.0 MiB" in page and "train.early_stop" not in page and "All other keys are alike" in page
    sheets = sorted(tmp_path.glob("sheet-*.png"))
    assert [path.name for path in sheets] == found["sheets"] and len(sheets) == 2
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 3 * 32 and sheet.height > 5 * 32

    # Again: nothing is opened, for every picture is there; one that is damaged is drawn anew.
    def refused(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a model was opened")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "open_runtime", refused)
        assert workspace.compare(named, out=tmp_path, device="cpu", **options) == found
        (tmp_path / str(cells["low", 4, 0.5, 7])).write_bytes(b"\x89PNG")
        with pytest.raises(AssertionError, match="a model was opened"):
            workspace.compare(named, out=tmp_path, device="cpu", **options)


def test_an_adapter_comes_off_a_base_as_if_it_had_never_been_on(runs: Path) -> None:
    pipeline = FAMILY.tiny()
    before = {name: value.clone() for name, value in FAMILY.denoiser(pipeline).state_dict().items()}
    for source in (runs / "made", runs / "theirs.safetensors"):
        load_adapter(pipeline, FAMILY, source)
        assert FAMILY.denoiser(pipeline).state_dict().keys() != before.keys()
        assert remove_adapter(pipeline, FAMILY)
        after = FAMILY.denoiser(pipeline).state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_without_adapters_yet_there_are_facts_and_no_pictures(runs: Path, tmp_path: Path) -> None:
    young = shutil.copytree(runs / "low", tmp_path / "young")
    for name in ("adapter", "adapters"):
        shutil.rmtree(young / name)
    said: list[str] = []
    found = workspace.compare(
        [str(young), str(runs / "low")], out=tmp_path / "out", draws=False, say=said.append
    )
    assert [run["finished"] for run in found["runs"]] == [False, True] and found["pictures"] == []
    assert said == [f"{young}: no pictures of it: this run has produced nothing yet"]
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "not finished" in page and "Nothing but their names" in page


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["low"], {}, "low alone has nothing to be compared with"),
        (["gone", "low"], {}, 'there is no ".*gone"'),
        (
            ["theirs.safetensors", "made"],
            {"prompts": ("a",)},
            "does not say .* and none of the others is a run",
        ),
        (
            ["made", "made/run.kohya.safetensors"],
            {"checkpoints": True},
            "--checkpoints: there are no adapters",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    runs: Path, tmp_path: Path, names: list[str], options: dict[str, Any], message: str
) -> None:
    if "checkpoints" in options:
        options = {**options, "base": str(runs / "low")}
    with pytest.raises((ArtifactError, ConfigError), match=message):
        workspace.compare([str(runs / name) for name in names], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0,x"], '--seeds: "x" is no seed'),
        (["--strengths", "0.5,much"], '--strengths: "much" is no strength of an adapter'),
    ],
)
def test_options_that_are_wrong_are_named(runs: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.app(["compare", str(runs / "low"), str(runs / "high"), *options], standalone_mode=False)
    assert message in str(error.value)


def test_thumbnails_of_many_pictures_are_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "noise.png"
    Image.effect_noise((700, 500), 60).convert("RGB").save(picture)
    monkeypatch.setattr(thumbnails, "SAMPLES", 1)
    made = thumbnails.thumbnail(picture, 256)
    assert made is not None and made[1:] == (256, 183) and made[0].startswith("data:image/")
    few = thumbnails.side_for([picture] * 3)
    monkeypatch.setattr(thumbnails, "BUDGET", 500 * len(made[0]))
    assert (few, thumbnails.side_for([picture] * 500)) == (768, 256)
    assert thumbnails.thumbnail(tmp_path / "gone.png", 256) is None
