"""int8 in OpenVINO: what nncf is asked for, what comes of it, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit import families, install
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.errors import ArtifactError, ChainError, ConfigError
from tunekit.passes.base import Context, check_chain, parse_chain, run_chain
from tunekit.passes.quantize_openvino import QuantizeOpenvino
from tunekit.runtime import generate_pixels, open_runtime

pytest.importorskip("openvino")

PROMPTS = ("a cat", "a dog")
LEAST_SQNR_DB = {"hybrid": 20, "ptq": 15, "weight_only": 30}
"""Of the tiny model: random weights are harder on rounding than trained ones."""


def quantized(source: Path | Artifact, folder: Path, **settings: Any) -> Artifact:
    given = source if isinstance(source, Artifact) else Artifact.load(source)
    context = Context(
        run_dir=folder,
        prompts=PROMPTS,
        sampling=SamplingConfig(steps=4),
        device="cpu",
        say=lambda line: None,
    )
    return run_chain([QuantizeOpenvino(**settings)], given, context)


def draw(source: Artifact | Path) -> torch.Tensor:
    return generate_pixels(open_runtime(source, device="cpu"), PROMPTS, SamplingConfig(steps=3), seeds=[0, 1])


@pytest.fixture(scope="module")
def results(tiny_irs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    pytest.importorskip("nncf")
    folder = tmp_path_factory.mktemp("quantized")
    return {
        "hybrid": quantized(tiny_irs("sd15"), folder, samples=8),
        "ptq": quantized(tiny_irs("sd15"), folder, method="ptq", samples=8, keep=["conv_in"]),
        "weight_only": quantized(
            tiny_irs("sd15"), folder, method="weight_only", components=["unet", "vae_decoder"]
        ),
    }


@pytest.mark.parametrize("method", ["hybrid", "ptq", "weight_only"])
def test_it_gets_small_and_stays_near(
    method: str, results: dict[str, Artifact], tiny_irs: Callable[[str], Path]
) -> None:
    made = results[method]
    assert made.step is not None and made.format == "openvino"
    metrics, rows = made.step.metrics, made.step.details["components"]
    print(method, metrics, rows)
    assert metrics["sqnr_db"] > LEAST_SQNR_DB[method]  # type: ignore[operator]
    layers = rows[0]["layers"]
    computed = {"hybrid": range(10, layers), "ptq": range(layers // 2, layers + 1), "weight_only": range(1)}
    assert metrics["int8_computed_layers"] in computed[method]
    for row in rows:
        assert row["size_bytes"] < 0.75 * row["size_bytes_before"]  # the graph itself is as large as before
    noted = json.loads((Path(made.source) / "unet" / "config.json").read_text())
    assert noted["quantization"] == {"scheme": "int8", "mode": method}
    assert noted["openvino"] == {"precision": "fp32"}  # what is left of floats
    assert psnr_db(draw(made), draw(tiny_irs("sd15"))) > LEAST_SQNR_DB[method] - 3
    same = Path(made.source) / "text_encoder" / "openvino_model.bin"
    assert same.read_bytes() == (tiny_irs("sd15") / "text_encoder" / "openvino_model.bin").read_bytes()


def test_what_is_kept_computes_in_floats(results: dict[str, Artifact]) -> None:
    from tunekit.passes.openvino_int8 import Model

    def computed(method: str) -> dict[str, bool]:
        model = Model(Path(results[method].source) / "unet" / "openvino_model.xml")
        return {layer.name: layer.computed for layer in model.layers()}

    sensitive = list(families.get("sd15").facts.denoiser.sensitive)
    assert results["hybrid"].lineage[-1].details["kept"] == sensitive
    assert results["ptq"].lineage[-1].details["kept"] == ["conv_in"]
    first = next(iter(computed("ptq")))
    assert not computed("ptq")[first] and not computed("hybrid")[first]
    assert sum(computed("ptq").values()) > sum(computed("hybrid").values())


def test_a_denoiser_without_convolutions(tiny_irs: Callable[[str], Path], tmp_path: Path) -> None:
    """It has products of matrices alone, so hybrid would compute nothing in int8."""
    pytest.importorskip("nncf")
    name = next(name for name in families.runnable() if not has_convolutions(name))
    with pytest.raises(ArtifactError, match=r"has no convolutions that may compute in int8.*\n.*method ptq"):
        quantized(tiny_irs(name), tmp_path, samples=4)
    made = quantized(tiny_irs(name), tmp_path, method="ptq", samples=4)
    assert made.step is not None
    print(name, made.step.metrics)
    assert made.step.metrics["int8_computed_layers"] > 4  # type: ignore[operator]
    assert made.step.metrics["sqnr_db"] > 10  # type: ignore[operator]


def has_convolutions(name: str) -> bool:
    family = families.get(name)
    return any(isinstance(part, torch.nn.Conv2d) for part in family.denoiser(family.tiny()).modules())


def test_what_cannot_be(
    tiny_irs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(settings: dict[str, Any], start: str = "openvino") -> str:
        with pytest.raises(ChainError) as caught:
            check_chain(parse_chain([{"quantize_openvino": settings}]), start)
        return str(caught.value)

    monkeypatch.setitem(sys.modules, "nncf", None)
    assert f'needs the package "nncf": {install.with_extra("nncf")}' in refused({})
    monkeypatch.undo()
    assert "put `export_openvino: {}` before it" in refused({}, "torch")
    with pytest.raises(ConfigError, match="method is weight_only"):
        parse_chain([{"quantize_openvino": {"method": "weight_only", "samples": 4}}])
    with pytest.raises(ConfigError, match="samples: must be at least 4"):
        parse_chain([{"quantize_openvino": {"samples": 2}}])
    pytest.importorskip("nncf")
    source = open_artifact(tiny_irs("sd15"))
    with pytest.raises(ChainError, match="finds a model that is quantized already, by quantize_openvino"):
        check_chain(parse_chain(["quantize_openvino", "quantize_openvino"]), "openvino")
    for settings, message in (
        ({"components": ["vae"]}, "has method hybrid, which has no effect on vae"),
        ({"keep": ["up_blocks.9"]}, '"up_blocks.9" names nothing'),
    ):
        with pytest.raises(ChainError, match=message):
            quantized(source, tmp_path, **settings)
    with pytest.raises(ArtifactError, match="there is no component vae to quantize"):
        quantized(source, tmp_path, method="weight_only", components=["vae"])
