from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import DataConfig
from tunekit.passes.base import Context, run_chain
from tunekit.passes.heal import Heal
from tunekit.passes.prune import Prune

FAMILY = families.get("sd15")
PRUNE = Prune(ratio=0.3, samples=8, spread="uniform", multiple=1)
WEIGHTS = 32_000_000
"""Moved by all steps together: of a network with few weights, a step is quick and mends little."""


def heal(family: Any) -> Heal:
    """At the pass's own rate; as many steps as the size of the blocks of its smallest network asks for."""
    blocks = family.blocks(family.denoiser(family.tiny()))
    count = sum(parameter.numel() for _, block in blocks for parameter in block.parameters())
    return Heal(max_steps=min(200, max(40, WEIGHTS // count)), batch_size=4, pictures=4)


def healed(
    source: Path, folder: Path, step: Heal, data: DataConfig | None = None, family: str = "sd15"
) -> Artifact:
    return run_chain(
        [PRUNE, step],
        open_artifact(source, family=family),
        Context(
            run_dir=folder / "run",
            prompts=("a cat", "a dog"),
            data=data,
            device="cpu",
            say=lambda line: None,
        ),
    )


@pytest.fixture(scope="module")
def result(
    family: Any, tiny_sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Of each family."""
    source = tiny_sources(family.name)
    return healed(source, tmp_path_factory.mktemp("healed"), heal(family), family=family.name)


def test_the_output_comes_closer_to_the_parents(result: Artifact):
    metrics = result.lineage[-1].metrics
    before, after, steps = (metrics[name] for name in ("relative_error_before", "relative_error", "steps"))
    print(f"{result.family}: {before:.4f} -> {after:.4f}, {after / before:.3f} of it, in {steps} steps")
    assert after < 0.95 * before
    assert steps == heal(families.get(result.family)).max_steps and metrics["loss"] < 1
    assert before == pytest.approx(result.lineage[0].metrics["relative_error"], rel=0.5)
    assert "drawn by the model" in result.lineage[-1].details["note"]


def test_shapes_stay_and_weights_move(result: Artifact, unread: Callable[[Any], frozenset[str]]):
    assert result.path is not None
    family = families.get(result.family)
    before = family.denoiser(family.load(str(next(result.path.parent.glob("01-prune-*")))))
    after = family.denoiser(family.load(result.source))
    assert layers.describe(after) == layers.describe(before)
    pairs = zip(after.named_parameters(), before.parameters(), strict=True)
    still = {name.removesuffix(".weight") for (name, one), other in pairs if torch.equal(one, other)}
    print(result.family, "stays:", sorted(still))
    assert still <= unread(family)  # such as tokens that fill up a row, where it is full


def test_micro_batches_change_nothing_that_is_learned(tiny_source: Path, pictures: Path, tmp_path: Path):
    data = DataConfig(path=str(pictures), resolution=64)
    short = {"max_steps": 6, "lr": 2e-4, "batch_size": 4}
    states = []
    for micro_batch in (None, 1):
        artifact = healed(tiny_source, tmp_path, Heal(**short, micro_batch=micro_batch), data)
        assert artifact.lineage[-1].details["note"] == f"learned from 4 pictures of {pictures}"
        states.append(FAMILY.denoiser(FAMILY.load(artifact.source)).state_dict())
    assert all(torch.allclose(states[0][name], states[1][name], atol=2e-4) for name in states[0])


def test_training_that_makes_it_worse_is_thrown_away_and_said(tiny_source: Path, tmp_path: Path):
    artifact = healed(tiny_source, tmp_path, Heal(max_steps=4, lr=0.03, batch_size=2, pictures=2))
    metrics = artifact.lineage[-1].metrics
    assert metrics["relative_error"] == metrics["relative_error_before"]
    assert "made the output worse" in artifact.lineage[-1].details["note"]
    pruned = FAMILY.denoiser(FAMILY.load(str(next(tmp_path.glob("run/01-prune-*")))))
    kept = FAMILY.denoiser(FAMILY.load(artifact.source))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), kept.parameters(), strict=True))


def test_a_unet_without_a_middle_is_pruned_and_healed(tmp_path: Path):
    """As BK-SDM and tiny-sd are: the very models that people prune."""
    from diffusers import UNet2DConditionModel

    pipeline = FAMILY.tiny()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
        unet = UNet2DConditionModel(**{**settings, "mid_block_type": None})
    pipeline.register_modules(unet=unet.eval())
    assert [path for path, _ in FAMILY.blocks(unet)] == [
        *("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1")
    ]
    FAMILY.save(pipeline, tmp_path / "base")
    step = Heal(max_steps=2, batch_size=2, pictures=2)
    metrics = healed(tmp_path / "base", tmp_path, step).lineage[-1].metrics
    assert metrics["relative_error"] > 0 and metrics["steps"] == 2
