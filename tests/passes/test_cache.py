"""How many steps can be cached is found, written where all read it, and true of unseen pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import CacheConfig, SamplingConfig
from tunekit.errors import ChainError
from tunekit.passes import cache
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.runtime import open_runtime

FIVE = SamplingConfig(steps=5, guidance=3)


def run(chain: list[Any], artifact: Artifact, folder: Path) -> tuple[Artifact, list[str]]:
    said: list[str] = []
    context = Context(
        run_dir=folder, device="cpu", prompts=("a cat", "a dog"), sampling=FIVE, say=said.append
    )
    return run_chain(parse_chain(chain), artifact, context), said


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_speedup", lambda *_: 1.5)


def test_the_largest_interval_that_keeps_is_taken(tiny_source: Path, tmp_path: Path) -> None:
    start = open_artifact(tiny_source, family="sd15")
    chain: list[Any] = [
        {"cache": {"keep": {"psnr": 5}, "intervals": [2, 3], "pictures": 1}},
        {"verify": {"pictures": 1}},
    ]
    last, said = run(chain, start, tmp_path)
    found, verified = last.lineage
    assert last.sampling is not None and last.sampling.cache is not None
    assert last.sampling.cache.interval == 3 == found.metrics["cache_interval"]
    assert last.source == start.source and last.sampling.steps == 5
    assert [(row["whole every"], row["order"]) for row in found.details["tried"]] == [
        *((2, 0), (2, 1), (3, 0), (3, 1)),
    ]
    assert any("2 of 5 steps whole" in line and "1.50x as fast" in line for line in said)
    assert 5 < verified.metrics["psnr_db"] < 100  # type: ignore[operator]
    assert verified.metrics["relative_error"] == 0
    assert open_runtime(last, device="cpu").sampling.cache == last.sampling.cache
    again, said = run(chain, start, tmp_path)
    assert again.path == last.path and any("already there" in line for line in said)


def test_what_is_not_kept_or_not_faster_is_left(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = open_artifact(tiny_source, family="sd15")
    last, said = run([{"cache": {"keep": {"psnr": 99}, "pictures": 1}}], start, tmp_path)
    assert last.sampling is not None and last.sampling.cache is None
    assert any("psnr 99 is not kept by any interval; nearest: every 2 steps" in line for line in said)
    monkeypatch.setattr(cache, "_speedup", lambda *_: 0.9)
    last, said = run([{"cache": {"keep": {"psnr": 5}, "intervals": [2], "pictures": 1}}], start, tmp_path)
    assert last.sampling is not None and last.sampling.cache is None
    assert any("no faster here, and every step stays whole" in line for line in said)


def test_a_graph_is_cached_and_keeps_its_files(tiny_onnx: Path, tmp_path: Path) -> None:
    start = Artifact.load(tiny_onnx)
    last, _ = run([{"cache": {"interval": 2, "pictures": 1}}], start, tmp_path)
    assert last.sampling is not None and last.sampling.cache is not None
    assert last.hash == start.hash and last.sampling.cache == CacheConfig(
        interval=2, order=last.sampling.cache.order
    )


def test_bad_input() -> None:
    for chain, format, message in (
        ([{"cache": {"interval": 2, "keep": {"psnr": 30}}}], "onnx", "sets interval and keep"),
        (["cache", "cache"], "torch", "comes after cache, and steps are cached already"),
        (["cache", {"build_tensorrt": {"devices": ["rtx-4090"]}}], "onnx", "an engine runs every step whole"),
    ):
        with pytest.raises(ChainError, match=message):
            check_chain(parse_chain(chain), format)
