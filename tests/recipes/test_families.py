"""Every family that runs, through the real recipes: from pictures to an ONNX model with a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunekit import families
from tunekit.artifacts import Artifact, RunFolder
from tunekit.families import Frame
from tunekit.runtime import open_runtime

RunHere = Callable[..., Path]
Configured = Callable[..., Path]

FAMILIES = families.runnable()
PIPELINES = sorted({families.get(name).facts.pipeline_class: name for name in FAMILIES}.values())
"""One family of each class of pipelines, for what takes long."""
PRUNED = {families.get(name).facts.denoiser_name: name for name in reversed(FAMILIES)}.values()
"""One family for each kind of denoiser: a pruned one is traced anew, and passes have tests of their own."""
FEWER = [{"prune": {"ratio": 0.2, "samples": 8}}, {"heal": {"max_steps": 3, "batch_size": 2}}]
CHAIN = [
    "export_onnx",
    {"verify": {"max_relative_error": 1e-4, "steps": 2, "pictures": 2}},
    {"quantize": {"scheme": "int8"}},
    {"verify": {"against": "first", "steps": 2, "pictures": 2}},
]

CUT = ("memory.micro_batch=1", "memory.gradient_checkpointing=true")


def tree(lora_tree: dict[str, Any], family: str, **changes: Any) -> dict[str, Any]:
    """A short run of one family."""
    return {
        **lora_tree,
        "model": {"family": family, "source": "tiny"},
        "train": {"max_steps": 6, "lr": 0.002, "batch_size": 4, "validate_every": 3, "checkpoint_every": 3},
        "preview": {"prompts": ["a disc"], "steps": 2},
        **changes,
    }


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.each_family
@pytest.mark.parametrize("family", PIPELINES)
def test_from_pictures_to_onnx_with_a_report(
    family: str, lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    chain = ["merge", *(FEWER if family in PRUNED else []), *CHAIN]
    run = run_here(configured(tmp_path, tree(lora_tree, family, optimize=chain)))
    final = RunFolder(run).final()
    kinds = [next(iter(step)) if isinstance(step, dict) else step for step in chain]
    assert [step.kind for step in final.lineage] == ["train", *kinds]
    assert final.format == "onnx"
    assert final.family == family
    exported = next(step for step in final.lineage if step.kind == "export_onnx")
    errors = {row["component"]: row["relative_error"] for row in exported.details["components"]}
    print(f"{family}: {errors}")
    assert max(errors.values()) < 1e-4
    report = json.loads((run / "report.json").read_text())
    assert final.model_path and report["final"] == final.model_path.name  # the folder that has the model
    assert (run / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step-000000", "step-000006"]
    assert all(tensor.isfinite().all() for tensor in adapter(run).values())
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(run).items() if "lora_B" in name)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd15"])
def test_micro_batches_and_a_resume_change_nothing(
    family: str, lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    config = configured(tmp_path, tree(lora_tree, family, preview={}))
    straight = adapter(run_here(config, "name=straight", "train.lr=5e-4"))
    split = adapter(run_here(config, "name=split", *CUT, "train.lr=5e-4"))
    largest = max(float((split[key] - straight[key]).abs().max()) for key in straight)
    print(f"{family}: micro-batches of 1, checkpointed: largest difference of a weight {largest:.2g}")
    assert largest < 1e-5
    run_here(config, "name=resumed", "train.max_steps=3", "train.lr=5e-4")
    run = run_here(config, "name=resumed", "train.lr=5e-4")
    assert all(torch.equal(adapter(run)[key], straight[key]) for key in straight)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd15"])
def test_dreambooth_of_all_weights(
    family: str, dreambooth_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    """Class pictures are drawn by the base, and the whole pipeline is written."""
    changed = {**dreambooth_tree, "model": {"family": family, "source": "tiny"}, "adapter": None}
    run = run_here(configured(tmp_path, changed), "train.max_steps=2", "train.lr=1e-4")
    assert len(list(next(run.glob("class-*")).iterdir())) == 5
    artifact = Artifact.load(run / "model")
    assert families.detect(artifact.source) == family
    runtime = open_runtime(artifact, device="cpu")
    assert runtime.sampling.height == 32
    base = families.get(family).tiny()
    own = runtime.family.denoiser(runtime.pipeline).state_dict()
    moved = [
        key for key, value in runtime.family.denoiser(base).state_dict().items() if not value.equal(own[key])
    ]
    assert len(moved) > 0.9 * len(own)


def test_what_sdxl_is_told_comes_from_each_picture(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path, monkeypatch: Any
) -> None:
    """`time_ids` are the original size, the crop and the size of the picture, row by row."""
    from tunekit.families.sdxl import SDXL

    told: set[tuple[float, ...]] = set()
    real = SDXL.conditioning

    def noted(self: SDXL, encoded: Any, frame: torch.Tensor, guidance: float | None = None) -> Any:
        told.update(tuple(row) for row in frame.tolist())
        return real(self, encoded, frame, guidance)

    monkeypatch.setattr(SDXL, "conditioning", noted)
    run_here(configured(tmp_path, tree(lora_tree, "sdxl", preview={})))
    print(sorted(told))
    assert (40.0, 40.0, 0.0, 0.0, 32.0, 32.0) in told
    wide = [row for row in told if row[:2] == (36.0, 64.0)]
    assert wide
    assert all(row[4] < row[5] for row in wide)
    assert Frame.whole(64, 64).row.tolist() not in [list(row) for row in told]


def test_a_wrong_family_is_refused_by_name(
    lora_tree: dict[str, Any], configured: Configured, run_here: RunHere, tmp_path: Path
) -> None:
    from tunekit.errors import ModelError

    folder = tmp_path / "sdxl"
    family = families.get("sdxl")
    family.save(family.tiny(), folder)
    config = configured(tmp_path, tree(lora_tree, "sd15", model={"family": "sd15", "source": str(folder)}))
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline, which is not Stable Diffusion 1"):
        run_here(config)
    assert not (tmp_path / "runs" / "run" / "adapter").exists()
