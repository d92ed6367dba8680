"""Whole blocks that leave a denoiser: what may, what does, and that its configuration says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tunekit import families, layers
from tunekit.artifacts import Artifact, open_artifact
from tunekit.errors import ChainError
from tunekit.families import Frame, depth
from tunekit.passes import whole
from tunekit.passes.base import Context, Pass, check_chain, run_chain
from tunekit.passes.heal import Heal
from tunekit.passes.pace import Pace
from tunekit.passes.prunable import parameters
from tunekit.passes.prune import Prune

FAMILY = families.get("sd15")
FEW = {"samples": 4}


Run = Callable[..., Artifact]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(source, folder, *steps, family="sd15")`; what is drawn to judge by is drawn once."""
    cache = tmp_path_factory.mktemp("cache")

    def chain(source: Path, folder: Path, *steps: Pass, family: str = "sd15") -> Artifact:
        context = Context(
            run_dir=folder / "run",
            prompts=("a cat",),
            device="cpu",
            shared_cache=cache,
            say=lambda line: None,
        )
        return run_chain(steps, open_artifact(source, family=family), context)

    return chain


def wide(**other: Any) -> Any:
    """A U-Net of Stable Diffusion's shape: two pairs a level, and a lowest level as wide as the next."""
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in FAMILY.tiny().unet.config.items() if not key.startswith("_")}
    config |= {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**config, **other}).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    pipeline = FAMILY.tiny()
    pipeline.register_modules(unet=wide())
    FAMILY.save(pipeline, folder)
    return folder


def answer(family: Any, pipeline: Any, denoiser: nn.Module) -> torch.Tensor:
    size = family.default_size(pipeline)
    told = family.conditioning(family.encode_prompt(pipeline, ["a cat"]), Frame.whole(*size).rows(1))
    noisy = torch.randn(1, *family.latent_shape(pipeline, *size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made: torch.Tensor = family.denoise(denoiser, noisy, torch.tensor([500.0]), told)
    return made


def test_what_leaves_is_described_by_the_configuration(family: Any, tmp_path: Path):
    """Of every family: diffusers opens what is left, by its configuration alone."""
    pipeline = family.tiny()
    denoiser = family.denoiser(pipeline)
    before = dict(denoiser.config)
    for name, paths in family.removable(denoiser).items():
        left = family.without(denoiser, paths)
        assert depth.fits(left)
        assert not any(parameter.is_meta for parameter in left.parameters())
        assert len(list(left.parameters())) < len(list(denoiser.parameters()))
        left.save_pretrained(tmp_path / name)
        opened = type(denoiser).from_pretrained(tmp_path / name)
        made = answer(family, pipeline, left)
        torch.testing.assert_close(answer(family, pipeline, opened), made, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(made, answer(family, pipeline, denoiser), atol=1e-4)
    assert dict(denoiser.config) == before and depth.fits(denoiser)


@pytest.mark.each_family
def test_blocks_that_move_the_output_least_leave(
    run: Run, family: Any, tiny_sources: Callable[[str], Path], tmp_path: Path
):
    """Of every family."""
    step, source = Prune(blocks=1, **FEW), tiny_sources(family.name)
    if not family.removable(family.denoiser(family.tiny())):
        with pytest.raises(ChainError, match=r"no whole blocks that may leave the"):
            run(source, tmp_path, step, family=family.name)
        return
    made = run(source, tmp_path, step, family=family.name)
    metrics, details = made.lineage[0].metrics, made.lineage[0].details
    rows = details["whole"]
    assert [row["left"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows == sorted(rows, key=lambda row: row["relative_error"])
    assert metrics["blocks"] == 1
    assert metrics["relative_error"] == pytest.approx(rows[0]["relative_error"], rel=1e-4)
    assert metrics["parameters"] == metrics["parameters_before"] - rows[0]["parameters"]
    assert "blocks" not in details  # nothing within blocks
    assert not layers.has_custom_layers(Path(made.source, family.facts.denoiser_name))


# Layouts of Stable Diffusion --------------------------------------------------------------------------------

PUBLISHED = {"base": 580e6, "small": 490e6, "tiny": 330e6}
"""Parameters of BK-SDM's U-Nets, of 860 M. https://github.com/Nota-NetsPresso/BK-SDM"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_are_those_of_bk_sdm(name: str):
    """At the real size, without data: the configuration of the published model describes the very layers."""
    unet = FAMILY.facts.denoiser.build()
    left: Any = FAMILY.without(unet, FAMILY.layouts(unet)[name])
    assert sum(p.numel() for p in left.parameters()) == pytest.approx(PUBLISHED[name], rel=0.03)
    # https://huggingface.co/nota-ai/bk-sdm-tiny/blob/main/unet/config.json, and those of its siblings
    levels = 3 if name == "tiny" else 4
    attended = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    config = {
        **{key: value for key, value in unet.config.items() if not key.startswith("_")},
        "block_out_channels": [320, 640, 1280, 1280][:levels],
        "down_block_types": attended[:levels],
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(attended[:levels])],
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if name == "base" else None,
    }
    with torch.device("meta"):
        theirs = type(unet)(**config)
    shapes = {key: value.shape for key, value in left.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    for key in ("layers_per_block", "mid_block_type"):
        assert left.config[key] == config[key]


def test_a_layout_is_pruned_and_healed(run: Run, source: Path, tmp_path: Path):
    narrower = {
        "ratio": 0.4,
        "targets": ["feed_forward"],
        "multiple": 1,
        "keep": ["up_blocks.1.attentions.0"],
    }
    steps = [Prune(blocks="tiny", **narrower, **FEW), Heal(max_steps=2, batch_size=2, pictures=2)]
    made = run(source, tmp_path, *steps)
    within = [row["block"] for row in made.lineage[0].details["blocks"]]
    # What stays is called up_blocks.0.attentions.0 now.
    assert any(name.startswith("up_blocks.1.attentions.0") for name in within)
    assert not any(name.startswith("up_blocks.0.attentions.0") for name in within)
    gone = made.lineage[0].details["gone"]
    assert {"mid_block", "down_blocks.2", "up_blocks.0", "down_blocks.0.resnets.1"} <= set(gone)
    assert all(row["left"] for row in made.lineage[0].details["whole"] if "resnets" in row["block"])
    config = json.loads(Path(made.source, "unet", "config.json").read_text())
    assert config["mid_block_type"] is None and config["block_out_channels"] == [16, 32]
    assert made.lineage[1].metrics["relative_error_before"] > 0


def test_what_is_left_is_exported(run: Run, tiny_source: Path, tmp_path: Path):
    from tunekit.config import SamplingConfig
    from tunekit.passes.export_onnx import ExportOnnx
    from tunekit.runtime import generate_pixels, open_runtime

    made = run(tiny_source, tmp_path, Prune(blocks=2, **FEW), ExportOnnx())
    few = SamplingConfig(steps=2, height=64, width=64)
    torch_model, onnx_model = (
        generate_pixels(open_runtime(source, family="sd15", device="cpu"), ["a cat"], few, seeds=[0])
        for source in (next((tmp_path / "run").glob("01-prune-*")), made)
    )
    torch.testing.assert_close(onnx_model, torch_model, atol=1e-4, rtol=1e-3)


def test_levels_may_be_of_different_depths(run: Run, source: Path, tmp_path: Path):
    """By share of cost, in names as they were published too, where blocks are numbered through."""
    from tunekit.families import unet

    made = run(source, tmp_path, Prune(blocks=0.3, keep=["down_blocks.1", "mid_block"], **FEW))
    rows = {row["block"]: row["left"] for row in made.lineage[-1].details["whole"]}
    assert "mid_block" not in rows and "down_blocks.1.resnets.1" not in rows and any(rows.values())
    left = FAMILY.without(wide(), ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1"))
    assert left.config["layers_per_block"] == [1, 2, 2]
    names = unet.published_names(
        [path for path, layer in left.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    )
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.2.0.op"
    assert names["down_blocks.1.resnets.0.conv1"] == "input_blocks.3.0.in_layers.2"
    assert names["down_blocks.2.resnets.1.conv1"] == "input_blocks.7.0.in_layers.2"
    assert names["up_blocks.2.resnets.1.conv1"] == "output_blocks.7.0.in_layers.2"


# Latency ----------------------------------------------------------------------------------------------------


def test_as_little_leaves_as_the_time_of_a_call_asks_for(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def share(self: Pace, denoiser: nn.Module) -> float:
        """As if time went with the number of weights."""
        return parameters(denoiser) / parameters(self.family.denoiser(self.pipeline))

    real = Pace.share
    monkeypatch.setattr(Pace, "share", share)
    narrow = run(source, tmp_path / "a", Prune(latency=0.8, multiple=1, **FEW)).lineage[-1]
    assert 0.76 <= narrow.metrics["latency_ratio"] <= 0.8
    assert "measured here in turns (0.8 was asked for)" in narrow.details["note"]
    few = run(source, tmp_path / "b", Prune(latency=0.8, blocks="fewest", **FEW)).lineage[-1]
    rows = [row["parameters"] for row in few.details["whole"] if row["left"]]
    assert few.metrics["latency_ratio"] <= 0.8
    assert few.metrics["parameters_before"] - sum(rows[:-1]) > 0.8 * few.metrics["parameters_before"]
    with pytest.raises(ChainError, match=r"cannot reach latency 0.01 here: the nearest was 0\.\d\d"):
        run(source, tmp_path / "c", Prune(latency=0.01, **FEW))
    pipeline = FAMILY.tiny()
    # Of a real clock, whatever else this machine does.
    assert 0.2 < real(Pace(FAMILY, pipeline), FAMILY.without(pipeline.unet, ("mid_block",))) < 1.5


def test_bisection_finds_the_smallest_change():
    class Known(Pace):
        def share(self, denoiser: Any) -> float:
            return float(1 - denoiser)

    pace = Known(FAMILY, None)
    assert pace.fewest(lambda count: count / 10, 9, 0.65) == 4
    assert pace.fewest(lambda count: count / 10, 9, 0.05) is None
    assert pace.least(lambda far: far, 0.65) == pytest.approx(0.35, abs=0.02)
    assert pace.least(lambda far: far, 0.01) is None


# What cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 7}, r"is to take 7 whole blocks, and 2 may leave the unet: mid_block, "),
        ({"blocks": "base"}, r"blocks: base, a layout that this model cannot have \(small\)"),
        ({"blocks": "small", "keep": ["mid_block"]}, r"is without mid_block, and keep names that"),
        ({"blocks": 1, "keep": ["mid_block", "down_blocks.0"]}, r"finds no whole blocks that may leave"),
    ],
)
def test_what_the_model_does_not_have_is_said(
    run: Run, settings: dict[str, Any], message: str, tiny_source: Path, tmp_path: Path
):
    with pytest.raises(ChainError, match=message):
        run(tiny_source, tmp_path, Prune(**settings, **FEW))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.3, "latency": 0.7}, "gives ratio and latency"),
        ({"blocks": "fewest"}, "takes the fewest blocks of what: give latency"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str):
    with pytest.raises(ChainError, match=message):
        check_chain([Prune(**settings)], "torch")


# Names ------------------------------------------------------------------------------------------------------


def test_blocks_are_renumbered_and_know_whose_place_they_take():
    paths = ["a.0", "a.1", "a.2", "b", "c.0", "c.1"]
    gone = ("a.1", "c.0")
    assert depth.renumbered(paths, gone) == {"a.0": "a.0", "a.2": "a.1", "b": "b", "c.1": "c.0"}
    # What stands before a block that left learns to do its work; b and c.1 have nobody to follow.
    assert depth.counterparts(paths, gone) == {"a.0": "a.1", "a.1": "a.2", "b": "b", "c.0": "c.1"}
    order = [whole.Block("x", ("a.1", "b")), whole.Block("y", ("b",)), whole.Block("z", ("c",))]
    assert [[item.name for item in step] for step in whole.steps(order)] == [[], ["x"], ["x", "z"]]
    assert whole.paths_of([whole.Block("p", ("a.1",)), whole.Block("q", ("a",))]) == ("a",)
