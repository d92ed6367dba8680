"""The lora recipe as people start it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tunekit.artifacts import Artifact, RunFolder
from tunekit.errors import (
    ChainError,
    ConfigError,
    DataError,
    DeviceError,
    NonFiniteError,
    OutputError,
    ResumeError,
)

RunHere = Callable[..., Path]
Configured = Callable[..., Path]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


def with_train(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**tree, "train": {**tree["train"], **changes}}


def quick(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Six steps of a config."""
    kept = {k: v for k, v in tree["train"].items() if k not in ("validate_every", "warmup_steps")}
    return {**tree, "train": {**kept, "max_steps": 6, "checkpoint_every": 4}, "preview": {}, **changes}


# accelerate launch, once through


def test_golden_losses(straight: Path, check_golden: Callable[[str, Path], None]) -> None:
    check_golden("lora", straight)
    written = rows(straight)
    assert [row["step"] for row in written] == list(range(25))
    values = {row["step"]: row["val_loss"] for row in written if "val_loss" in row}
    assert list(values) == [0, 8, 16, 24]
    assert values[24] < values[0]


def test_run_folder(straight: Path, lora_tree: dict[str, Any]) -> None:
    resolved = yaml.safe_load((straight / "config.yaml").read_text())
    assert resolved["train"]["max_steps"] == 24
    assert resolved["train"]["betas"] == [0.9, 0.999]  # defaults are written out
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "step-000020",
        "step-000024",
    ]
    assert sorted(path.name for path in (straight / "previews").iterdir()) == [
        "step-000000",
        "step-000012",
        "step-000024",
    ]
    with Image.open(straight / "previews" / "step-000012" / "00-a-disc.png") as picture:
        assert picture.size == (32, 32)
    assert sorted(path.name for path in (straight / "adapter").iterdir()) == [
        "README.md",
        "artifact.json",
        "pytorch_lora_weights.safetensors",
        "run.kohya.safetensors",
    ]
    assert (straight / "report.html").stat().st_size > 1000
    with safe_open(straight / "adapter" / "run.kohya.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["ss_steps"], said["ss_learning_rate"]) == ("24", str(resolved["train"]["lr"]))
    assert said["ss_num_train_images"].isdigit() and said["ss_resolution"] == "(32, 32)"
    assert str(straight) not in str(said) and "disc" not in str(said)  # neither paths nor captions
    assert json.loads((straight / "report.json").read_text())["version"] == 1
    leftovers = [path for path in straight.rglob(".*") if path.name != ".lock"]
    assert leftovers == []


def test_artifact(straight: Path) -> None:
    artifact = RunFolder(straight).final()
    assert artifact.format == "adapter"
    assert artifact.family == "sd15"
    assert artifact.base == "tiny"
    (step,) = artifact.lineage
    assert step.kind == "train"
    assert step.metrics["steps"] == 24
    assert step.metrics["val_loss"] == rows(straight)[-1]["val_loss"]
    assert step.metrics["val_loss_first"] == rows(straight)[0]["val_loss"]
    assert step.metrics["parameters"] == sum(tensor.numel() for tensor in adapter(straight).values())
    assert step.settings["train"]["lr"] == 0.002


def test_two_processes_and_another_micro_batch_learn_the_same(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Configured,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Through `tunekit run --processes 2`."""
    config = configured(tmp_path, {**lora_tree, "memory": {"device": "cpu", "micro_batch": 1}})
    command = [sys.executable, "-m", "tunekit", "run", str(config), "--processes", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 24/24") == 1  # the main process speaks alone
    split = tmp_path / "runs" / "run"
    worst = {
        name: max(
            abs(one[name] - other[name])
            for one, other in zip(rows(straight), rows(split), strict=True)
            if name in one
        )
        for name in ("loss", "val_loss", "grad_norm")
    }
    print("largest difference of one process and two:", worst)
    assert max(worst.values()) < 1e-5
    for name, tensor in adapter(straight).items():
        # Adam makes a full step out of a gradient that is zero to rounding, so single elements may differ.
        assert float((adapter(split)[name] - tensor).abs().mean()) < 1e-5


def test_two_processes_sum_the_gradients_of_float32_masters(
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """A bf16 adapter is outside of DDP: its gradients are summed in float32 by the loop itself."""
    tree = {**lora_tree, "preview": {}, "memory": {"device": "cpu", "precision": "bf16", "micro_batch": 1}}
    tree["train"] = {**lora_tree["train"], "max_steps": 8, "validate_every": None}
    alone = run_here(configured(tmp_path / "alone", tree))
    config = configured(tmp_path / "both", tree)
    command = [sys.executable, "-m", "tunekit", "run", str(config), "--processes", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    both = tmp_path / "both" / "runs" / "run"
    pairs = [(a, b) for a, b in zip(rows(alone), rows(both), strict=True) if "loss" in a]
    worst = {name: max(abs(a[name] - b[name]) for a, b in pairs) for name in ("loss", "grad_norm")}
    print("largest difference of one process and two:", worst)
    assert worst["loss"] < 1e-4
    assert worst["grad_norm"] < 1e-3


# Once more in the same folder


def test_a_finished_run_is_left_alone(
    straight: Path, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    config = straight.parent.parent / "run.yaml"
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name not in _REWRITTEN}
    run_here(config)
    assert "training is finished (24 steps)" in capsys.readouterr().out
    assert {
        path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name not in _REWRITTEN
    } == before


_REWRITTEN = {"config.yaml", "report.html", "report.json", ".lock", "run"}


def test_a_changed_config_is_refused(straight: Path, run_here: RunHere) -> None:
    config = straight.parent.parent / "run.yaml"
    resolved = (straight / "config.yaml").read_text()
    with pytest.raises(ResumeError) as error:
        run_here(config, "train.lr=0.01", "adapter.rank=8", "memory.micro_batch=1")
    assert "train.lr: 0.002 then, 0.01 now" in str(error.value)
    assert "adapter.rank: 4 then, 8 now" in str(error.value)
    assert "micro_batch" not in str(error.value)
    assert (straight / "config.yaml").read_text() == resolved


def test_changed_pictures_are_refused(
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    make_pictures: Callable[..., Path],
) -> None:
    make_pictures(tmp_path / "p", 5)
    tree = quick(lora_tree, data={"path": str(tmp_path / "p"), "resolution": 32})
    config = configured(tmp_path, tree)
    run = run_here(config)
    (run / "adapter").rename(tmp_path / "gone")  # the checkpoint remembers too
    (tmp_path / "p" / "00.txt").write_text("another caption")
    with pytest.raises(ResumeError, match=r"data \(its pictures or captions\)"):
        run_here(config)


def test_a_constant_schedule_is_prolonged(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    tree = quick(lora_tree)
    tree["train"]["schedule"] = "constant"
    whole = run_here(configured(tmp_path / "whole", tree), "train.max_steps=9")
    config = configured(tmp_path / "parts", tree)
    run_here(config)
    parts = run_here(config, "train.max_steps=9")
    losses = [[row["loss"] for row in rows(run)[1:]] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert all(torch.equal(adapter(parts)[name], tensor) for name, tensor in adapter(whole).items())
    assert Artifact.load(parts / "adapter").lineage[0].metrics["steps"] == 9


# Other ways to train


def test_all_weights(
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    check_golden: Callable[[str, Path], None],
) -> None:
    """`adapter: null` saves a pipeline that plain diffusers loads."""
    from diffusers import StableDiffusionPipeline

    from tunekit import families

    tree = quick(lora_tree, adapter=None)
    tree["train"] |= {"schedule": "linear", "lr": 0.0005}
    run = run_here(configured(tmp_path, tree), "memory.gradient_checkpointing=true")
    check_golden("all_weights", run)
    artifact = RunFolder(run).final()
    assert (artifact.format, artifact.base) == ("torch", None)
    trained = StableDiffusionPipeline.from_pretrained(run / "model")
    base = families.get("sd15").tiny()
    moved = [
        name
        for name, tensor in base.unet.state_dict().items()
        if not torch.equal(tensor, trained.unet.state_dict()[name])
    ]
    assert set(moved) == {name for name, _ in base.unet.named_parameters()}
    for part in ("vae", "text_encoder"):
        for name, tensor in getattr(base, part).state_dict().items():
            assert torch.equal(tensor, getattr(trained, part).state_dict()[name])
    picture = trained("a disc", height=32, width=32, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)


@pytest.mark.parametrize(
    "options", [["memory.precision=bf16"], ["train.optimizer=adamw8bit", "adapter.dropout=0.1"]]
)
def test_other_precision_and_optimizer(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path, options: list[str]
) -> None:
    if "train.optimizer=adamw8bit" in options:
        pytest.importorskip("bitsandbytes")
    run = run_here(configured(tmp_path, quick(lora_tree)), *options)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter(run).values())


def test_the_chain_follows(
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured(tmp_path, quick(lora_tree, optimize=["merge"]))
    run = run_here(config)
    final = RunFolder(run).final()
    assert [step.kind for step in final.lineage] == ["train", "merge"]
    assert final.path is not None
    assert final.path.name.startswith("01-merge-")
    report = json.loads((run / "report.json").read_text())
    assert report["final"] == final.path.name
    capsys.readouterr()
    run_here(config)
    assert "01 merge: already there" in capsys.readouterr().out


def test_previews_are_scored(
    straight: Path,
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tiny_clip: Path,
    tmp_path: Path,
) -> None:
    from tunekit.diffusion.judges import Judges

    preview = {"prompts": ["a disc", "a square"], "steps": 2, "every": 4, "clip_model": str(tiny_clip)}
    run = run_here(configured(tmp_path, quick(lora_tree, preview=preview)))
    scored = {row["step"]: row["clip"] for row in rows(run) if "clip" in row}
    assert list(scored) == [0, 4, 6]
    pictures = sorted((run / "previews/step-000006").iterdir())
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(path))) for path in pictures]) / 255
    found = Judges.of_previews(str(tiny_clip)).scores(pixels.permute(0, 3, 1, 2), preview["prompts"])
    assert scored[6] == pytest.approx(sum(found) / 2, abs=5e-3)  # files have 8 bits
    assert Artifact.load(run / "adapter").lineage[-1].metrics["clip"] == scored[6]
    first = next(row for row in rows(run) if "loss" in row)
    assert first["loss"] == next(row for row in rows(straight) if "loss" in row)["loss"]  # learns the same


# What goes wrong is said before anything starts


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.path=/no/such/place"], DataError, "/no/such/place: no such folder"),
        (["optimize=[verify, merge]"], ChainError, r"optimize\[0\] \(verify\)"),
        (["optimize=[{merge: {x: 1}}]"], ChainError, r"optimize\[0\] \(merge\).*unknown key"),
        (["preview.clip_model=/no"], ConfigError, r"preview\.clip_model finds no CLIP at /no: there is no"),
        (["memory.precision=fp16"], DeviceError, r"memory\.precision=fp16 needs a GPU"),
    ],
)
def test_nothing_is_half_started(
    lora_tree: dict[str, Any],
    configured: Configured,
    run_here: RunHere,
    tmp_path: Path,
    overrides: list[str],
    error: type[Exception],
    message: str,
) -> None:
    config = configured(tmp_path, lora_tree)
    with pytest.raises(error, match=message):
        run_here(config, *overrides)
    assert not (tmp_path / "runs").exists()


def test_unwritable_runs(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    config = configured(tmp_path, lora_tree)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OutputError, match=r"runs/run cannot be made: .*runs is not a folder"):
        run_here(config)


def test_diverging_training_stops(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    tree = quick(lora_tree)
    tree["adapter"] = {"rank": 4, "alpha": 1e6}
    tree["train"] |= {"lr": 100, "max_grad_norm": None, "checkpoint_every": 1, "schedule": "constant"}
    with pytest.raises(
        NonFiniteError, match=r"step [2-5]: the loss is (nan|inf).*samples: (square|wide)/"
    ) as error:
        run_here(configured(tmp_path, tree))
    assert "is good" in str(error.value)
    assert not (tmp_path / "runs" / "run" / "adapter").exists()


def test_config_for_another_recipe(
    dreambooth_tree: dict[str, Any], configured: Configured, environment: dict[str, str], tmp_path: Path
) -> None:
    config = configured(tmp_path, dreambooth_tree)
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "lora.py"
    done = subprocess.run(
        [sys.executable, str(recipe), "--config", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
