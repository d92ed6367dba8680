from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import AdapterConfig, DataConfig, SamplingConfig
from tunekit.errors import ChainError, ConfigError
from tunekit.passes.base import Context, check_chain, run_chain
from tunekit.passes.prunable import find, parameters
from tunekit.passes.prune import Prune, choose
from tunekit.passes.sparse import patterns
from tunekit.runtime import generate_pixels, open_runtime

FAMILY = families.get("sd15")
FEW = {"samples": 8}


def pruned(
    source: Path,
    folder: Path,
    *,
    family: str = "sd15",
    prompts: tuple[str, ...] = ("a cat",),
    data: Any = None,
    **settings: Any,
) -> Artifact:
    start = open_artifact(source, family=family)
    step = Prune(**{**FEW, **settings})
    context = Context(run_dir=folder / "run", prompts=prompts, data=data, device="cpu", say=lambda line: None)
    return run_chain([step], start, context)


def unet(artifact: Artifact) -> Any:
    family = families.get(artifact.family)
    return family.denoiser(family.load(artifact.source))


@pytest.fixture(scope="module")
def results(
    tiny_sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    @cache
    def make(family: str) -> Artifact:
        folder = tmp_path_factory.mktemp("pruned")
        return pruned(tiny_sources(family), folder, family=family, ratio=0.4, multiple=4)

    return make


@pytest.fixture
def result(results: Callable[[str], Artifact]) -> Artifact:
    return results("sd15")


@pytest.fixture
def each(family: Any, results: Callable[[str], Artifact]) -> Artifact:
    """Of each family."""
    return results(family.name)


@pytest.mark.each_family
def test_shapes_shrink_and_nothing_is_zeroed(family: Any, each: Artifact):
    denoiser, whole = unet(each), family.denoiser(family.tiny())
    metrics = each.lineage[-1].metrics
    assert metrics["parameters"] == parameters(denoiser) < metrics["parameters_before"] == parameters(whole)
    assert metrics["macs"] < metrics["macs_before"]
    assert 0 < metrics["relative_error"] < 1
    smaller = [
        name
        for name, weight in denoiser.state_dict().items()
        if weight.shape != whole.state_dict()[name].shape
    ]
    assert smaller
    assert not any((weight == 0).all() for weight in denoiser.parameters() if weight.ndim > 1)
    described = json.loads(Path(each.source, family.facts.denoiser_name, layers.FILE).read_text())
    assert described == layers.describe(denoiser)


def test_about_the_share_asked_for_leaves(family: Any, each: Artifact):
    prunable = sum(
        item.count * item.parameters
        for item in find(family.denoiser(family.tiny()), ["feed_forward", "heads", "resnet"])
    )
    metrics = each.lineage[-1].metrics
    assert (metrics["parameters_before"] - metrics["parameters"]) / prunable == pytest.approx(0.4, abs=0.05)


def test_the_table_tells_what_left(each: Artifact):
    table = {(row["block"], row["what"]): row for row in each.lineage[-1].details["blocks"]}
    after = find(unet(each), ["feed_forward", "heads", "resnet"])
    assert {key: row["after"] for key, row in table.items()} == {
        (item.name, item.target): item.count for item in after
    }
    for item in after:
        row = table[item.name, item.target]
        assert row["after"] >= max(1, 0.25 * row["before"])
        if item.target != "heads" and row["after"] < row["before"]:
            assert item.count * item.width % 4 == 0


def test_the_runtime_draws_with_it(result: Artifact):
    pixels = generate_pixels(
        open_runtime(result, device="cpu"), ["a cat"], SamplingConfig(steps=2), seeds=[0]
    )
    assert pixels.shape == (1, 3, 64, 64) and pixels.isfinite().all()


def test_it_is_the_same_each_time(result: Artifact, tiny_source: Path, tmp_path: Path):
    assert pruned(tiny_source, tmp_path, ratio=0.4, multiple=4).hash == result.hash


def test_it_learns_from_the_runs_pictures(tiny_source: Path, pictures: Path, tmp_path: Path):
    data = DataConfig(path=str(pictures), resolution=64)
    artifact = pruned(tiny_source, tmp_path, prompts=(), data=data)
    assert artifact.lineage[-1].details["note"] == f"judged on 4 pictures of {pictures}"


def test_without_pictures_and_prompts_it_says_so(tiny_source: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither pictures nor prompts"):
        pruned(tiny_source, tmp_path, prompts=())
    assert not (tmp_path / "run").exists()  # nothing has begun


def test_ratios_targets_and_kept_blocks(tiny_source: Path, tmp_path: Path):
    artifact = pruned(
        tiny_source,
        tmp_path,
        targets=["heads", "feed_forward"],
        ratio={"heads": 0.5, "feed_forward": 0.0},
        spread="uniform",
        importance="magnitude",
        keep=["mid_block"],
    )
    rows = artifact.lineage[-1].details["blocks"]
    assert {row["what"] for row in rows} == {"heads", "feed_forward"}
    assert all(row["after"] == (2 if row["what"] == "heads" else row["before"]) for row in rows)
    assert not any(row["block"].startswith("mid_block") for row in rows)


def test_macs_as_the_cost_makes_it_faster(result: Artifact, tiny_source: Path, tmp_path: Path):
    by_macs = pruned(tiny_source, tmp_path, ratio=0.4, multiple=4, cost="macs")
    assert by_macs.lineage[-1].metrics["macs"] < result.lineage[-1].metrics["macs"]


def test_half_precision_stays(tmp_path: Path):
    FAMILY.save(FAMILY.tiny().to(torch.float16), tmp_path / "half")
    artifact = pruned(tmp_path / "half", tmp_path)
    assert layers.stored_dtype(Path(artifact.source, "unet")) == torch.float16


@pytest.mark.parametrize("importance", ["gradient", "activation"])
def test_it_is_judged_otherwise(importance: str, result: Artifact, tiny_source: Path, tmp_path: Path):
    other = pruned(tiny_source, tmp_path, ratio=0.4, multiple=4, importance=importance)
    assert other.hash != result.hash
    assert 0 < other.lineage[-1].metrics["relative_error"] < 1


def test_two_of_four_weights_become_zero_and_stay_so(tiny_source: Path, tmp_path: Path):
    from tunekit.passes.heal import Heal

    context = Context(run_dir=tmp_path / "run", prompts=("a cat",), device="cpu", say=lambda line: None)
    chain = [Prune(sparsity="2:4", keep=["mid_block"], **FEW), Heal(max_steps=3, batch_size=2, pictures=2)]
    healed = run_chain(chain, open_artifact(tiny_source, family="sd15"), context)
    step = healed.lineage[0]
    assert step.metrics["parameters"] == step.metrics["parameters_before"]
    assert step.details["note"].endswith("as large as before, and as slow but for cards that skip zeros")
    before, after = FAMILY.denoiser(FAMILY.tiny()), unet(healed)
    names = [f"{name}.weight" for name in step.details["sparse"]]
    assert names and set(names) == set(patterns(FAMILY, after))
    assert not any(name.startswith("mid_block") for name in names)
    for name in names:
        was, now = (model.get_parameter(name).detach().movedim(1, -1) for model in (before, after))
        was, now = (weight.reshape(-1, 4) for weight in (was, now))
        assert ((now != 0).sum(1) == 2).all()
        left = was.abs().masked_fill(now == 0, 0).sum(1)
        assert torch.allclose(left, was.abs().topk(2).values.sum(1))  # the larger two
    with pytest.raises(ChainError, match=r"would fill the zeros of prune; leave adapter out"):
        check_chain([chain[0], Heal(adapter=AdapterConfig(rank=2))], "torch")


def test_the_least_worth_leaves_first():
    found = find(FAMILY.denoiser(FAMILY.tiny()), ["feed_forward"])
    count = found[0].count
    flat = [torch.ones(item.count, dtype=torch.float64) for item in found]
    costs = [item.parameters for item in found]
    assert choose(found, flat, costs, 0.0, 0.25, 1) == [item.count for item in found]
    cheap = [score.clone() for score in flat]
    cheap[0] *= 1e-6  # the first block is worth nothing: it leaves, down to its floor
    kept = choose(found, cheap, costs, 0.1, 0.25, 1)
    total = sum(item.count * cost for item, cost in zip(found, costs, strict=True))
    assert kept[0] < count and kept[1:] == [item.count for item in found[1:]]
    assert (count - kept[0]) * costs[0] >= 0.1 * total
    assert choose(found, cheap, costs, 0.9, 0.5, 1)[0] == count // 2
    rounded = choose(found, flat, costs, 0.3, 0.25, 16)
    assert all(number % 16 == 0 for number in rounded)
