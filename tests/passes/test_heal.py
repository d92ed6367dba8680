from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import AdapterConfig, DataConfig
from tunekit.passes import learning
from tunekit.passes.base import Context, run_chain
from tunekit.passes.heal import Heal
from tunekit.passes.prune import Prune
from tunekit.training import average

FAMILY = families.get("sd15")
PRUNE = Prune(ratio=0.3, samples=8, spread="uniform", multiple=1)
DRAWN = tempfile.TemporaryDirectory(prefix="tunekit-heal-")
"""What models draw to learn from, once for all tests."""
WEIGHTS = 32_000_000
"""Moved by all steps together: of a network with few weights, a step is quick and mends little."""


def heal(family: Any) -> Heal:
    """At the pass's own rate; as many steps as the size of the blocks of its smallest network asks for."""
    blocks = family.blocks(family.denoiser(family.tiny()))
    count = sum(parameter.numel() for _, block in blocks for parameter in block.parameters())
    return Heal(max_steps=min(200, max(40, WEIGHTS // count)), batch_size=4, pictures=4)


def healed(
    source: Path,
    folder: Path,
    step: Heal,
    data: DataConfig | None = None,
    family: str = "sd15",
    say: Callable[[str], None] = lambda line: None,
) -> Artifact:
    return run_chain(
        [PRUNE, step],
        open_artifact(source, family=family),
        Context(
            run_dir=folder / "run",
            prompts=("a cat", "a dog"),
            data=data,
            device="cpu",
            shared_cache=Path(DRAWN.name),
            say=say,
        ),
    )


@pytest.fixture(scope="module")
def result(
    family: Any, tiny_sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Of each family."""
    source = tiny_sources(family.name)
    return healed(source, tmp_path_factory.mktemp("healed"), heal(family), family=family.name)


@pytest.mark.each_family
def test_the_output_comes_closer_to_the_parents(result: Artifact):
    metrics = result.lineage[-1].metrics
    before, after, steps = (metrics[name] for name in ("relative_error_before", "relative_error", "steps"))
    print(f"{result.family}: {before:.4f} -> {after:.4f}, {after / before:.3f} of it, in {steps} steps")
    assert after < 0.8 * before
    assert steps == heal(families.get(result.family)).max_steps and metrics["loss"] < 1
    assert before == pytest.approx(result.lineage[0].metrics["relative_error"], rel=0.5)
    assert "drawn by the model" in result.lineage[-1].details["note"]
    assert result.lineage[-1].details["ended"] == {"step": steps, "taken": steps, "why": "max_steps"}


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


def test_what_no_longer_gets_better_ends_by_itself_and_is_thrown_away(tiny_source: Path, tmp_path: Path):
    settings = {"max_steps": 12, "check_every": 1, "patience": 2, "batch_size": 2, "pictures": 2}
    said: list[str] = []
    artifact = healed(tiny_source, tmp_path, Heal(lr=0.5, **settings), say=said.append)
    metrics, details = artifact.lineage[-1].metrics, artifact.lineage[-1].details
    best = metrics["steps"] - 2
    told = f"ends by itself after step {metrics['steps']} of 12: no lower val_loss since step {best}"
    assert metrics["steps"] < 12 and told in "".join(said)
    why = f"no lower error on held-out noise in 2 looks, since step {best}"
    assert details["ended"] == {"step": metrics["steps"], "taken": 0, "why": why}
    assert f"ended at step {metrics['steps']} of 12: {why}; training made the output worse" in details["note"]
    assert metrics["relative_error"] == metrics["relative_error_before"]
    pruned = FAMILY.denoiser(FAMILY.load(str(next(tmp_path.glob("run/01-prune-*")))))
    kept = FAMILY.denoiser(FAMILY.load(artifact.source))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), kept.parameters(), strict=True))


def test_an_adapter_heals_and_is_folded_in(tiny_source: Path, tmp_path: Path):
    adapter = AdapterConfig(rank=4, alpha=4)
    step = Heal(max_steps=8, adapter=adapter, batch_size=4, pictures=2)
    artifact = healed(tiny_source, tmp_path, step)
    metrics = artifact.lineage[-1].metrics
    assert metrics["relative_error"] < metrics["relative_error_before"]
    pruned = FAMILY.denoiser(FAMILY.load(str(next(tmp_path.glob("run/01-prune-*")))))
    after = FAMILY.denoiser(FAMILY.load(artifact.source))
    pairs = zip(after.named_parameters(), pruned.parameters(), strict=True)
    moved = {name.removesuffix(".weight") for (name, one), other in pairs if not torch.equal(one, other)}
    assert moved and all(name.endswith(FAMILY.facts.lora_targets) for name in moved)


def test_it_goes_on_where_it_was_stopped(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit, with the mean of the weights and what was found out about the error; timed or not."""
    step = Heal(max_steps=6, check_every=2, checkpoint_every=2, ema=0.5, batch_size=2, pictures=2)
    whole = healed(tiny_source, tmp_path / "whole", step)
    step = step.model_copy(update={"minutes": 1000.0})
    follow, followed = average.Average.follow, []

    def stopped(self: Any) -> None:
        follow(self)
        followed.append(1)
        if len(followed) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(average.Average, "follow", stopped)
        healed(tiny_source, tmp_path / "cut", step)
    (state,) = (tmp_path / "cut" / "run").glob(".heal-*.state")
    assert (state / "checkpoints" / "step-000002").is_dir() and (state / "best.safetensors").is_file()
    assert (state / "pace.json").is_file()
    again = healed(tiny_source, tmp_path / "cut", step)
    assert not state.exists()
    states = [FAMILY.denoiser(FAMILY.load(made.source)).state_dict() for made in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name in ("relative_error", "relative_error_before", "steps"):
        assert whole.lineage[-1].metrics[name] == again.lineage[-1].metrics[name]


def test_minutes_bound_the_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training that goes on has the same end, however fast this machine is then."""
    said: list[str] = []
    context = Context(run_dir=tmp_path, state=tmp_path / "state", say=said.append)
    for pace, minutes, steps in ((2.0, 0.5, 15), (60.0, 0.5, 15), (60.0, None, 200), (0.1, 1e-6, 1)):
        monkeypatch.setattr(learning, "_pace", lambda *_, pace=pace: pace)
        assert learning.affordable(Heal(minutes=minutes), None, None, None, context) == steps  # type: ignore[arg-type]
    assert said[0] == "15 of 200 steps, for which minutes: 0.5 has time"


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
