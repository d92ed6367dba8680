"""Runs with a memory budget: planned, measured, and planned again when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import launch, planning
from tunekit.config import load
from tunekit.errors import DoesNotFit, OutOfMemory, ResumeError
from tunekit.families.sd15 import SD15
from tunekit.registry import load_recipe

Tree = dict[str, Any]


@pytest.fixture
def again() -> Callable[..., Path]:
    """`again(config, *overrides)` runs a recipe as its file does, with new plans where it asks for them."""

    def run(config: Path, *overrides: str) -> Path:
        loaded = load(config, overrides)
        recipe = load_recipe(loaded.config.recipe)
        while not launch._done(recipe.main, loaded):
            pass
        return Path(loaded.config.run_dir)

    return run


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def plan_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return found


def planned(tree: Tree, **memory: Any) -> Tree:
    return {**tree, "memory": {"device": "cpu", "budget": "auto", **memory}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_measured_stands_beside_what_was_predicted(
    run_here: Callable[..., Path], configured: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    tree = {
        "recipe": "lora",
        "model": {"family": "sd15", "source": "builtin/emoji-64"},
        "data": {"path": "builtin/pictures/style", "resolution": 64},
        "adapter": {"rank": 8, "alpha": 8},
        "train": {"max_steps": 3, "lr": 0.001, "batch_size": 4},
        "preview": {"prompts": ["red apple"], "steps": 3},
    }
    run = run_here(configured(tmp_path, planned(tree, precision=precision)))
    phases = plan_of(run)["phases"]
    for name in ("encode", "first_step", "step", "preview"):
        phase = phases[name]
        print(f"{name}: {phase['peak_allocated_bytes']:,} predicted, {phase['measured']}, {phase['error']}")
        assert phase["measured"]["peak_allocated_bytes"] > 0
        # In a preview of 64 px the sampler's own few tensors show.
        assert abs(phase["error"]["allocated"]) < (0.03 if name == "preview" else 0.01)
    report = (run / "report.html").read_text()
    assert "allocated: predicted" in report
    assert "<td>first step</td>" in report


def test_dreambooth_is_planned_with_its_class_pictures(
    run_here: Callable[..., Path], configured: Callable[..., Path], dreambooth_tree: Tree, tmp_path: Path
) -> None:
    """Its captions, and the prompt of the class pictures, by text encoders that visit layer by layer."""
    run = run_here(configured(tmp_path, planned(dreambooth_tree, encode_by_layer=True)))
    plan = plan_of(run)
    assert plan["class_batch"] == 4
    assert plan["memory"]["encode_by_layer"]
    assert plan["phases"]["class_pictures"]["measured"]["peak_allocated_bytes"] > 0
    print(plan["phases"]["class_pictures"]["error"])


@pytest.mark.parametrize("when", ["the first step", "a step", "the preview"])
def test_memory_that_runs_out_is_planned_again_and_nothing_is_learned_otherwise(
    again: Callable[..., Path],
    run_here: Callable[..., Path],
    configured: Callable[..., Path],
    lora_tree: Tree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    tree = planned(lora_tree, on_oom="replan")
    straight = run_here(configured(tmp_path / "straight", tree))
    calls = [0]
    name, last = {"the first step": ("denoise", 1), "a step": ("denoise", 12), "the preview": ("decode", 2)}[
        when
    ]
    whole = getattr(SD15, name)

    def short(self: SD15, *args: Any) -> Any:
        calls[0] += name == "decode" or torch.is_grad_enabled()
        if calls[0] == last:
            calls[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, *args)

    monkeypatch.setattr(SD15, name, short)
    run = again(configured(tmp_path / "short", tree))
    said = capsys.readouterr().out
    assert "memory ran out" in said
    assert "plans again, for less memory" in said
    plan = plan_of(run)
    assert len(plan["ran_out"]) == 1
    assert plan["budget_bytes"] == plan["ran_out"][0]["budget_bytes"]
    assert plan["device_bytes"] <= plan["budget_bytes"]
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)


def test_without_replan_it_stops_after_a_checkpoint(
    again: Callable[..., Path],
    configured: Callable[..., Path],
    lora_tree: Tree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, denoise = [0], SD15.denoise

    def short(self: SD15, *args: Any) -> Any:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 8:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")
        return denoise(self, *args)

    monkeypatch.setattr(SD15, "denoise", short)
    config = configured(tmp_path, {**lora_tree, "memory": {"device": "cpu", "micro_batch": 3}})
    with pytest.raises(OutOfMemory, match=r"memory ran out after step 3 of 24 .*goes on from step-000003"):
        again(config)
    assert not (tmp_path / "runs" / "run" / "plan.json").exists()


@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_a_run_that_was_begun_keeps_what_changes_what_is_learned(
    run_here: Callable[..., Path], configured: Callable[..., Path], lora_tree: Tree, tmp_path: Path, base: str
) -> None:
    """On a card with more memory a new plan would leave the base as it is; the begun one is packed."""
    tree = planned(lora_tree, base_precision=base)
    tree["train"] = {**lora_tree["train"], "schedule": "constant", "max_steps": 6, "warmup_steps": 0}
    tree["train"]["validate_every"] = None
    tree["preview"] = {}
    config = configured(tmp_path, tree)
    run = run_here(config)
    assert plan_of(run)["base_precision"] == base
    loaded = load(config, ["memory.base_precision=null", "train.max_steps=9"])
    settled, plan = planning.settle(loaded.config)
    assert plan is not None
    assert settled.memory.base_precision == base
    run_here(config, "memory.base_precision=null", "train.max_steps=9")
    with pytest.raises(ResumeError, match=r"memory\.base_precision"):
        run_here(config, "memory.base_precision=nf4", "train.max_steps=12")


def test_what_does_not_fit_stops_before_anything_is_loaded(
    run_here: Callable[..., Path],
    configured: Callable[..., Path],
    lora_tree: Tree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SD15, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(DoesNotFit, match="are missing"):
        run_here(configured(tmp_path, planned(lora_tree, budget="1 MiB")))
