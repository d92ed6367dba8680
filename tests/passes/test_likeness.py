"""LPIPS and CLIP in a budget: the figures that others give, and one line where something is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.judges import ALEXNET, Judges
from tunekit.diffusion.perceptual import CONVOLUTIONS, PLACES, ClipScore, Lpips
from tunekit.errors import ChainError, ModelError, VerificationFailed
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain

pytest.importorskip("torchmetrics")
PROMPTS = ("a cat", "a dog", "a house", "a tree")


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's convolutions as torchvision names them, with random weights."""
    draw = torch.Generator().manual_seed(0)
    state = {}
    for place, (into, out, kernel, *_) in zip(PLACES, CONVOLUTIONS, strict=True):
        scale = (into * kernel * kernel) ** -0.5
        state[f"features.{place}.weight"] = torch.randn(out, into, kernel, kernel, generator=draw) * scale
        state[f"features.{place}.bias"] = torch.randn(out, generator=draw) * 0.1
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(state, file)
    return file


# The figures ------------------------------------------------------------------------------------------------


def test_lpips_is_that_of_torchmetrics(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    layers: list[nn.Module] = []
    state = torch.load(alexnet)
    for index, sizes in enumerate(CONVOLUTIONS):
        layer = nn.Conv2d(*sizes)
        layer.load_state_dict({key: state[f"features.{PLACES[index]}.{key}"] for key in ("weight", "bias")})
        layers += [layer, nn.ReLU()]
        if index in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: nn.Sequential(*layers))
    reference = theirs._LPIPS(net="alex")
    a, b = torch.rand(2, 3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    found = Judges(lpips=True, lpips_weights=str(alexnet)).distances(a, b)
    wanted = reference(a, b, normalize=True).flatten()
    assert found == pytest.approx(wanted.tolist(), rel=1e-5) and min(found) > 0.01
    assert Judges(lpips=True, lpips_weights=str(alexnet)).distances(a, a) == [0, 0, 0]


@torch.no_grad()
def test_clip_scores_are_those_of_the_model(tiny_clip: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel

    score, model = ClipScore(tiny_clip), CLIPModel.from_pretrained(tiny_clip)
    smooth = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(2))  # PIL rounds to 8 bits
    pixels = F.interpolate(smooth, (48, 64), mode="bilinear")
    found = score(pixels, ["a cat", "a dog"])
    for index, prompt in enumerate(("a cat", "a dog")):
        # As CLIP's own preparation: PIL's bicubic, the middle, mean and deviation.
        picture = Image.fromarray((pixels[index] * 255).round().byte().permute(1, 2, 0).numpy())
        small = torch.tensor(np.asarray(picture.resize((42, 32), Image.Resampling.BICUBIC)))
        small = small[:, 5:37].permute(2, 0, 1)[None] / 255
        seen = model(
            **score.tokenizer([prompt], return_tensors="pt"), pixel_values=(small - score.mean) / score.std
        )
        assert float(found[index]) == pytest.approx(
            float(F.cosine_similarity(seen.image_embeds, seen.text_embeds)), abs=2e-3
        )


# In chains --------------------------------------------------------------------------------------------------


def run(chain: list[Any], source: Path, folder: Path) -> Artifact:
    sampling = SamplingConfig(steps=2, guidance=2)
    context = Context(folder / "run", "cpu", 0, PROMPTS, sampling, say=lambda line: None)
    return run_chain(parse_chain(chain), open_artifact(source, family="sd15"), context)


def test_a_search_keeps_what_networks_say(
    tiny_source: Path, alexnet: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.passes.trials.Judge.speed", lambda self, model: 1.0)  # not asked here
    keep = {"lpips": 0.1, "lpips_weights": str(alexnet), "clip": 0.5, "clip_model": str(tiny_clip)}
    choices = [{"quantize": [{"scheme": "int8"}, {"scheme": "int4", "keep": []}]}]
    settings = {"keep": keep, "minimize": "size", "target": "torch", "passes": choices, "pictures": 2}
    made = run([{"search": settings}], tiny_source, tmp_path)
    step = made.lineage[-1]
    rows = step.details["trials"]
    assert [row["kept"] for row in rows].count("winner") == 1
    assert all((row["lpips"] <= 0.1 and row["clip_drop"] <= 0.5) == (row["kept"] != "no") for row in rows)
    assert rows[0]["lpips"] == 0 == rows[0]["clip_drop"] and all(row["lpips"] > 0 for row in rows[1:])
    assert 0 < step.metrics["lpips"] <= 0.1 and step.metrics["clip_drop"] <= 0.5
    assert "LPIPS 0." in step.details["note"] and "CLIP score less" in step.details["note"]
    book = (tmp_path / "run/search/trials.json").read_text()
    assert str(alexnet) in book  # with other weights, trials are others


def test_verify_holds_a_model_to_it(
    tiny_source: Path, alexnet: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    limits = {
        "max_lpips": 1e-6,
        "lpips_weights": str(alexnet),
        "max_clip_drop": 1,
        "clip_model": str(tiny_clip),
    }
    with pytest.raises(VerificationFailed, match=r"LPIPS 0\.\d+, max_lpips 1e-06"):
        run(["quantize", {"verify": {"pictures": 2, "steps": 2, **limits}}], tiny_source, tmp_path)
    (folder,) = (tmp_path / "run").glob("02-verify-*")
    metrics = Artifact.load(folder).lineage[-1].metrics
    assert 0 < metrics["lpips"] <= metrics["lpips_worst"] and abs(metrics["clip_drop"]) < 1


# What is missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["search", "verify"])
def test_what_is_missing_is_said_before_anything_runs(
    name: str, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refused(lpips: bool = False, **more: Any) -> str:
        if name == "search":
            own: dict[str, Any] = {"keep": {"lpips" if lpips else "clip": 0.1, **more}, "target": "torch"}
        else:
            own = {"max_lpips" if lpips else "max_clip_drop": 0.1, **more}
        before = [] if name == "search" else ["quantize"]
        with pytest.raises(ChainError) as caught:
            check_chain(parse_chain([*before, {name: own}]), "torch")
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        return text

    place = tmp_path / "torch/hub/checkpoints" / ALEXNET
    assert str(place) in refused(lpips=True) and "download.pytorch.org" in refused(lpips=True)
    assert "there is no file nowhere.pth" in refused(lpips=True, lpips_weights="nowhere.pth")
    assert "needs a CLIP" in refused()
    assert "there is no config.json in it" in refused(clip_model=str(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "preprocessor_config.json").touch()
    assert "there are no weights in it" in refused(clip_model=str(tmp_path))
    assert "no effect" in refused(lpips=True, clip_model=str(tiny_clip))
    import importlib.util

    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torchmetrics" else real(name, *more)
    )
    assert 'needs the package "torchmetrics"' in refused(lpips=True)


def test_files_that_hold_something_else(alexnet: Path, tiny_clip: Path, tmp_path: Path) -> None:
    cut = tmp_path / ALEXNET
    cut.write_bytes(alexnet.read_bytes()[:-10])
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    text = tmp_path / "text.pth"
    text.write_text("none")
    for file, said in ((cut, "what its name says"), (other, "no AlexNet"), (text, "something else")):
        with pytest.raises(ModelError, match=said) as caught:
            Judges(lpips=True, lpips_weights=str(file)).distances(*torch.rand(2, 1, 3, 64, 64))
        assert str(file) in str(caught.value)
    digest = hashlib.sha256(alexnet.read_bytes()).hexdigest()[:8]
    right = tmp_path / f"alexnet-{digest}.pth"
    right.write_bytes(alexnet.read_bytes())
    heads = tmp_path / "heads.pth"
    torch.save(
        {f"lin{i}.model.1.weight": torch.ones(1, s[1], 1, 1) for i, s in enumerate(CONVOLUTIONS)}, heads
    )
    judge = Lpips(right, heads)
    with pytest.raises(ModelError, match="32 x 32 pixels"):
        judge(*torch.rand(2, 1, 3, 16, 64))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no CLIP that can be opened"):
        ClipScore(tmp_path)
