"""Benchmark: in turns, with equal means, and honest about what is slower."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ChainError, ConfigError
from tunekit.passes.base import Context, check_chain, parse_chain
from tunekit.passes.benchmark import MEASURED, Benchmark, Settings, compare, percentile, ratios


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny pipeline with a denoiser of about 90 MB."""
    from diffusers import UNet2DConditionModel

    family = families.get("sd15")
    pipeline = family.tiny()
    config = {**pipeline.unet.config, "block_out_channels": (192, 384)}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    folder = tmp_path_factory.mktemp("larger") / "model"
    family.save(pipeline, folder)
    return open_artifact(folder, family="sd15")


@pytest.fixture(scope="module")
def result(tiny_source: Path, larger: Artifact) -> dict[str, Any]:
    threads = torch.get_num_threads()
    result = compare(
        [open_artifact(tiny_source, family="sd15"), larger],
        Settings(sampling=SamplingConfig(steps=2), repeats=3, threads=1, device="cpu"),
    )
    assert gc.isenabled()
    assert torch.get_num_threads() == threads
    return result


def test_figures_of_every_artifact(result: dict[str, Any], larger: Artifact) -> None:
    json.dumps(result)
    assert result["version"] == 1
    assert result["settings"]["threads"] == 1
    for row in result["artifacts"]:
        assert {metric.name for metric in MEASURED} <= set(row)
        assert 0 < row["denoiser_ms_p50"] <= row["denoiser_ms_p95"]
        assert row["denoiser_ms_p50"] < row["picture_ms_p50"] <= row["picture_ms_p95"]
        assert len(row["rounds_ms"]) == 3
    assert result["artifacts"][1]["size_bytes"] == larger.size_bytes


def test_what_is_slower_is_called_slower(result: dict[str, Any]) -> None:
    first, second = result["artifacts"]
    assert "speedup" not in first
    assert second["slower"] is True
    assert second["speedup"] < 0.9
    assert second["size_ratio"] > 10
    turned = ratios(first, second)
    assert turned["slower"] is False
    assert turned["speedup"] == pytest.approx(1 / second["speedup"])


def test_peak_memory_is_that_of_the_model(result: dict[str, Any], larger: Artifact) -> None:
    """Opening a model takes at least its weights; and what the libraries take is not counted."""
    small, large = (row["peak_memory_bytes"] for row in result["artifacts"])
    print(f"small {small / 1e6:.0f} MB, large {large / 1e6:.0f} MB of {larger.size_bytes / 1e6:.0f} MB")
    assert 0 <= small < 60e6
    assert 0.9 * larger.size_bytes < large < 4 * larger.size_bytes


def test_pass_compares_with_parent_and_first(
    tiny_source: Path, tiny_onnx: Path, larger: Artifact, tmp_path: Path
) -> None:
    said: list[str] = []
    history = (open_artifact(tiny_source, family="sd15"), larger, Artifact.load(tiny_onnx))
    context = Context(
        folder=tmp_path,
        family="sd15",
        device="cpu",
        seed=0,
        history=history,
        run_dir=tmp_path,
        sampling=SamplingConfig(steps=2),
        say=said.append,
    )
    outcome = Benchmark(repeats=2, memory=False, threads=1).run(history[-1], context)
    print(outcome.metrics)
    assert outcome.metrics["speedup"] > 1  # type: ignore[operator]
    assert outcome.metrics["slower"] is False
    assert outcome.metrics["size_ratio"] < 0.2  # type: ignore[operator]
    assert "speedup_first" in outcome.metrics
    assert outcome.metrics["peak_memory_bytes"] is None
    assert set(outcome.details["artifacts"]) == {history[0].path.name, larger.path.name}  # type: ignore[union-attr]
    assert outcome.details["note"].startswith("speed-up: ")
    assert any("round 2 of 2" in line for line in said)

    slow = Benchmark(repeats=2, memory=False, threads=1).run(
        larger, Context(**{**vars(context), "history": history[:2]})
    )
    assert slow.metrics["slower"] is True
    assert slow.details["note"].startswith("SLOWER")


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile(list(map(float, range(101))), 95) == 95
    assert percentile([7.0], 95) == 7


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ConfigError, match="at least one artifact"):
        compare([])
    with pytest.raises(ChainError, match="no effect on a model in torch"):
        check_chain(parse_chain([{"benchmark": {"provider": "openvino"}}]), "torch")
