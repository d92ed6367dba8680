"""Adapters that are kept while a run trains: the best, those by step, and what a run starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import load
from tunekit.errors import AdapterError, ArtifactError, ConfigError, ResumeError
from tunekit.training import evaluation

RunHere = Callable[..., Path]
Configured = Callable[..., Path]


@pytest.fixture
def tree(lora_tree: dict[str, Any]) -> dict[str, Any]:
    """Twelve steps, judged at five of them."""
    train = {
        "max_steps": 12,
        "lr": 0.002,
        "batch_size": 4,
        "validate_every": 3,
        "save_every": 5,
        "checkpoint_every": 6,
        "schedule": "cosine",
    }
    return {**lora_tree, "train": train, "preview": {"prompts": ["a disc"], "steps": 1}}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def values(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def test_the_best_is_kept_and_becomes_the_result(
    tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = iter([0.5, 0.4, 0.2, 0.3, 0.35, 0.3])
    monkeypatch.setattr(evaluation, "validation", lambda *arguments: lambda model: {"val_loss": next(judged)})
    config, best = configured(tmp_path, tree), 6
    run = run_here(config)
    losses = values(run)
    assert losses == {0: 0.5, 3: 0.4, 6: 0.2, 9: 0.3, 12: 0.35}
    kept = sorted(path.name for path in (run / "adapters").iterdir())
    assert kept == ["best", "last", "step-000005", "step-000010"]
    assert {path.name for path in (run / "previews").iterdir()} == {
        f"step-{step:06d}" for step in (0, 5, 10, 12)
    }
    assert same(run / "adapter", run / "adapters" / "best")
    assert not same(run / "adapter", run / "adapters" / "last")
    for name, step in (("best", best), ("last", 12), ("step-000005", 5), ("step-000010", 10)):
        artifact = open_artifact(run / "adapters" / name)
        assert (artifact.format, artifact.base, artifact.lineage[-1].details["step"]) == (
            "adapter",
            "tiny",
            step,
        )
        assert (run / "adapters" / name / "run.kohya.safetensors").is_file()
    made = Artifact.load(run / "adapter").lineage[-1]
    assert made.details["step"] == 12 and made.details["taken"] == best and made.details["final"] == "best"
    assert made.metrics["val_loss"] == made.metrics["best_val_loss"] == losses[best]
    assert made.metrics["last_val_loss"] == losses[12]
    out = capsys.readouterr().out
    assert "9 pictures (2 more held out), batch 4, 12 steps = 5.3 epochs, writes to" in out
    assert f"best: step {best}, val_loss {losses[best]:.5f}" in out
    assert f"the best, of step {best} (train.final)" in out

    # Another choice needs no training.
    run_here(config, "train.final=last")
    assert same(run / "adapter", run / "adapters" / "last")
    assert Artifact.load(run / "adapter").lineage[-1].metrics["val_loss"] == losses[12]
    assert "training is finished (12 steps)" in capsys.readouterr().out

    with pytest.raises(ArtifactError, match="a checkpoint is a state to continue training from") as error:
        open_artifact(run / "checkpoints" / "step-000012")
    assert f"{run / 'adapters' / 'best'}" in str(error.value)

    # More steps, under a schedule that falls to zero.
    run_here(config, "train.max_steps=15")
    assert (
        "train.max_steps was 12 and is 15: steps that were made keep their learning rates"
        in capsys.readouterr().out
    )
    assert sorted(values(run)) == [0, 3, 6, 9, 12, 15]
    with pytest.raises(ResumeError, match=r"train\.max_steps: 15 then, 12 now"):
        run_here(config)


def test_it_ends_by_itself_and_the_report_shows_where_the_best_was(
    tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = iter([0.5, 0.2, 0.3, 0.35, 0.3])
    monkeypatch.setattr(evaluation, "validation", lambda *arguments: lambda model: {"val_loss": next(judged)})
    overrides = ["train.early_stop=2", "train.save_every=null", "train.keep_best=val_loss"]
    run = run_here(configured(tmp_path, tree), *overrides)
    out = capsys.readouterr().out
    assert "ends by itself after step 9 of 12: no lower val_loss since step 3" in out
    made = Artifact.load(run / "adapter").lineage[-1]
    assert (made.details["step"], made.details["taken"]) == (9, 3)
    assert [path.name for path in sorted((run / "previews").iterdir())] == ["step-000000", "step-000009"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ">lowest: 0.2000 (step 3)</text>" in page and "<circle" in page
    assert "Lowest on held-out pictures: 0.2000 at step 3; 0.3500 at step 9" in page
    assert "ended by itself after step 9 of 12: 2 measurements in a row were not lower" in page
    # The same command again has nothing to do; more patience goes on.
    run_here(configured(tmp_path, tree), *overrides)
    assert "training is finished (by itself after 9 of 12 steps, no lower val_loss" in capsys.readouterr().out
    run_here(configured(tmp_path, tree), *overrides[1:])
    assert "continues after step 9 of 12" in capsys.readouterr().out
    assert Artifact.load(run / "adapter").lineage[-1].details["step"] == 12


def test_of_all_weights_the_best_become_the_model(
    tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judged(*values: float) -> None:
        found = iter(values)
        monkeypatch.setattr(
            evaluation, "validation", lambda *arguments: lambda model: {"val_loss": next(found)}
        )

    whole = {**tree, "adapter": None, "preview": {}}
    whole["train"] = {**tree["train"], "max_steps": 6, "save_every": None, "schedule": "constant"}
    config, name = configured(tmp_path, whole), "model/unet/diffusion_pytorch_model.safetensors"
    judged(0.5, 0.2)
    three = load_file(run_here(config, "name=three", "train.max_steps=3") / name)
    judged(0.5, 0.2, 0.3)
    run = run_here(config, "train.keep_best=val_loss")
    best = load_file(run / name)
    assert best.keys() == three.keys() and all(torch.equal(best[key], three[key]) for key in best)
    made = Artifact.load(run / "model").lineage[-1]
    assert (made.details["step"], made.details["taken"], made.details["final"]) == (6, 3, "best")
    assert (made.metrics["val_loss"], made.metrics["last_val_loss"]) == (0.2, 0.3)
    assert "the best, of step 3 (train.final)" in capsys.readouterr().out
    run_here(config, "train.keep_best=val_loss", "train.final=last")
    assert "stays the best, of step 3" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "three" / "best").exists()  # as ever where nothing is said


def test_kept_adapters_of_bf16_are_the_float32_ones(
    tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    run = run_here(configured(tmp_path, tree), "memory.precision=bf16", "train.save_every=12")
    assert same(run / "adapters" / "step-000012", run / "adapters" / "last")
    assert all(tensor.dtype == torch.float32 for tensor in tensors(run / "adapters" / "best").values())
    fine = [tensor for tensor in tensors(run / "adapters" / "best").values() if not same_in_bf16(tensor)]
    assert fine


def same_in_bf16(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, tensor.to(torch.bfloat16).float())


def test_without_validation_the_last_is_the_result(
    tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    train = {
        key: value for key, value in tree["train"].items() if key not in ("validate_every", "save_every")
    }
    run = run_here(configured(tmp_path, {**tree, "train": train, "preview": {}}), "train.max_steps=2")
    assert not (run / "adapters").exists()
    assert Artifact.load(run / "adapter").lineage[-1].details["step"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["train.final=best", "train.keep_best=false"], "train.final: there is no best without a choice"),
        (["train.save_every=20"], "train.save_every: has no effect: training ends before, at step 12"),
        (["adapter=null"], "train.save_every: keeps adapters, and all weights are trained"),
        (
            ["data.validation=null", "train.validate_every=null", "train.keep_best=true"],
            "nothing to choose by",
        ),
    ],
)
def test_what_cannot_be_kept_is_said(
    tree: dict[str, Any], configured: Configured, tmp_path: Path, override: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(configured(tmp_path, tree), override)
    assert message in str(error.value)


def test_a_run_starts_from_an_adapter(
    tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    short = {**tree, "train": {"max_steps": 2, "lr": 0.002, "batch_size": 4}, "preview": {}}
    config = configured(tmp_path, short)
    first = run_here(config)
    nothing = ["train.max_steps=1", "train.lr=1e-12", "train.weight_decay=0"]
    kohya = first / "adapter" / "run.kohya.safetensors"
    for name, source in {"run": first, "folder": first / "adapter", "file": kohya}.items():
        run = run_here(config, f"name=from-{name}", f"adapter.init={source}", *nothing)
        a, b = tensors(run / "adapter"), tensors(first / "adapter")
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6
    # The strength is kept where alpha is another one.
    run = run_here(config, "name=stronger", f"adapter.init={first}", "adapter.alpha=4", *nothing)
    a = tensors(run / "adapter")  # which have alpha within them
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in b)
    given, taken = load_file(kohya), load_file(run / "adapter" / "stronger.kohya.safetensors")
    ups = [key for key in given if key.endswith("lora_up.weight")]
    assert ups and all(torch.allclose(taken[key], 2 * given[key], atol=1e-6) for key in ups)
    # What it starts from belongs to the run.
    shutil.copytree(first / "adapter", tmp_path / "copy")
    again = ["name=from-run", *nothing]
    run_here(config, f"adapter.init={tmp_path / 'copy'}", *again)
    with pytest.raises(ResumeError, match=r"adapter\.init \(its weights\)"):
        run_here(config, *again)
    for override, message in {
        "adapter.rank=8": "lora of rank 4 .* and this run makes a lora of rank 8",
        "adapter.kind=dora": "is a lora of rank 4 .* and this run makes a dora",
        "adapter.targets=[to_q]": "it adapts .* modules and this run .* only one of them has",
    }.items():
        with pytest.raises(AdapterError, match=message):
            run_here(config, "name=other", f"adapter.init={first}", override)
    with pytest.raises(AdapterError, match="no such file or folder"):
        run_here(config, "name=other", "adapter.init=nowhere")
