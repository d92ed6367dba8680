"""Verification: it measures, it shows, and it fails where it should."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from tunekit import families, hardware
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.errors import ChainError, VerificationFailed
from tunekit.passes.base import Context, Outcome, Pass, check_chain, parse_chain, run_chain
from tunekit.passes.export_onnx import ExportOnnx
from tunekit.passes.verify import Verify


class Damage(Pass):
    """Adds a share of noise to the weights of one part."""

    kind: ClassVar[str] = "damage"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch"})

    share: float
    part: str = "unet"

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        import torch

        family = families.get(context.family)
        pipeline = family.load(artifact.source)
        generator = torch.Generator().manual_seed(0)
        for parameter in getattr(pipeline, self.part).parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += self.share * parameter.std(correction=0) * noise
        family.save(pipeline, context.folder)
        return Outcome()


def chain(
    source: Path, tmp_path: Path, passes: Sequence[Pass], *, family: str = "sd15", **options: Any
) -> Artifact:
    return run_chain(
        passes,
        open_artifact(source, family=family),
        Context(run_dir=tmp_path, prompts=("a cat", "the moon"), **options),
    )


def look(verify: Verify, history: Sequence[Artifact], folder: Path) -> Outcome:
    """Runs the pass alone, on models that are there already."""
    folder.mkdir()
    return verify.run(
        history[-1],
        Context(
            folder=folder,
            family="sd15",
            device="cpu",
            seed=3,
            history=tuple(history),
            run_dir=folder,
            sampling=SamplingConfig(steps=4),
        ),
    )


def onnx_copy(source: Path, folder: Path, change: Any) -> Artifact:
    """A copy of an ONNX artifact with the values of one of the denoiser's weights changed."""
    shutil.copytree(source, folder)
    file = folder / "unet" / "model.onnx"
    model = onnx.load(file)
    tensor = next(tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 1000)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, file)
    loaded = Artifact.load(folder, check=False)  # it is changed on purpose
    return replace(loaded, recorded_hash=None)


def test_an_exact_export_passes_on_every_runtime_it_is_meant_for(
    tiny_source: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    history = [open_artifact(tiny_source, family="sd15"), Artifact.load(tiny_onnx)]
    verify = Verify(
        providers=["cpu", "openvino"],
        pictures=2,
        steps=6,
        max_relative_error=1e-4,
        min_psnr_db=60,
        min_ssim=0.999,
    )
    outcome = look(verify, history, tmp_path / "look")
    print({name: f"{value:.3g}" for name, value in outcome.metrics.items()})
    assert outcome.failure is None
    assert 0 < outcome.metrics["relative_error"] <= 1e-4  # type: ignore[operator]
    assert outcome.metrics["psnr_db"] >= outcome.metrics["psnr_db_worst"] >= 60  # type: ignore[operator]
    rows = outcome.details["components"]
    assert {row["component"] for row in rows} == {"text_encoder", "denoiser", "vae_encoder", "vae_decoder"}
    denoiser = [row for row in rows if row["component"] == "denoiser"]
    assert len({row["batch"] for row in denoiser}) == 3
    assert len({row["pixels"] for row in denoiser}) == 3
    assert len({row["timestep"] for row in denoiser}) == 3
    runtimes = [row["runtime"] for row in outcome.details["runtimes"]]
    assert len(runtimes) == 2
    assert all(row[f"relative error, {name}"] <= 1e-4 for row in rows for name in runtimes)
    assert len(outcome.details["trajectory"]) >= 6
    json.dumps(outcome.details)


def test_pictures_of_both_sides_are_written(tiny_source: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    history = [open_artifact(tiny_source, family="sd15"), Artifact.load(tiny_onnx)]
    outcome = look(Verify(pictures=5, steps=2), history, tmp_path / "look")
    # Each runtime that users of this machine have: one file can be another model on another.
    runtimes = [row["runtime"].partition(" ")[0] for row in outcome.details["runtimes"]]
    assert runtimes == ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    assert len(outcome.pictures) == 5 * (1 + len(runtimes))
    rows: dict[str, list[tuple[str, int]]] = {}
    for picture in outcome.pictures:
        rows.setdefault(picture["label"], []).append((picture["prompt"], picture["seed"]))
        with Image.open(tmp_path / "look" / picture["file"]) as image:
            assert image.size == (64, 64)
    reference, *candidates = rows.values()
    assert all(reference == candidate for candidate in candidates)
    assert [seed for _, seed in reference] == [3, 4, 5, 6, 7]
    assert all(file.parent.name == "pictures" for file in (tmp_path / "look").rglob("*.png"))


def test_a_missed_threshold_stops_the_chain_and_keeps_the_figures(tiny_source: Path, tmp_path: Path) -> None:
    passes = [
        Damage(share=0.3),
        Verify(pictures=2, steps=4, min_psnr_db=50, max_relative_error=1e-3),
        Damage(share=1),
    ]
    with pytest.raises(VerificationFailed) as raised:
        chain(tiny_source, tmp_path, passes)
    assert raised.value.exit_code == 1
    for words in (
        "PSNR",
        "min_psnr_db 50",
        "relative error",
        "max_relative_error 0.001",
        "optimize[1] (verify)",
    ):
        assert words in str(raised.value)
    step = Artifact.load(next(tmp_path.glob("02-verify-*"))).step
    assert step is not None
    assert step.metrics["psnr_db"] < 50  # type: ignore[operator]
    assert step.metrics["relative_error_text_encoder"] == 0
    assert len(step.pictures) == 4
    assert not list(tmp_path.glob("03-*"))


def test_without_thresholds_it_only_reports(tiny_source: Path, tmp_path: Path) -> None:
    made = chain(tiny_source, tmp_path, [Damage(share=0.3), Verify(pictures=1, steps=2)])
    assert made.step is not None
    assert made.step.kind == "verify"
    assert made.source.endswith(next(tmp_path.glob("01-damage-*")).name), "it points at what it verified"


def test_parent_and_first_are_different_references(tiny_source: Path, tmp_path: Path) -> None:
    passes = [
        Damage(share=0.05),
        Damage(share=0.01),
        Verify(pictures=1, steps=2),
        Verify(pictures=1, steps=2, against="first"),
    ]
    made = chain(tiny_source, tmp_path, passes)
    parent, first = (step.metrics["relative_error_denoiser"] for step in made.lineage[-2:])
    assert parent < first  # type: ignore[operator]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae"])
def test_an_error_is_placed(part: str, tiny_sources: Callable[[str], Path], tmp_path: Path) -> None:
    """With two text encoders, too: each has its own figure."""
    passes = [Damage(share=0.1, part=part), Verify(pictures=1, steps=2)]
    made = chain(tiny_sources("sdxl"), tmp_path, passes, family="sdxl", device="cpu")
    assert made.step is not None
    prefix = "relative_error_"
    errors = {
        name.removeprefix(prefix): value
        for name, value in made.step.metrics.items()
        if name.startswith(prefix) and not name.endswith("trajectory")
    }
    assert set(errors) == {"text_encoder", "text_encoder_2", "denoiser", "vae_encoder", "vae_decoder"}
    damaged = {"unet": {"denoiser"}, "vae": {"vae_encoder", "vae_decoder"}}.get(part, {part})
    assert {name for name, error in errors.items() if error > 1e-3} == damaged  # type: ignore[operator]
    assert all(error == 0 for name, error in errors.items() if name not in damaged)
    rows = made.step.details["components"]
    assert {row["batch"] for row in rows if row["component"] == "text_encoder_2"} == {1, 2, 3}


def test_a_broken_file_is_found(tiny_source: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    source = open_artifact(tiny_source, family="sd15")
    wrong = onnx_copy(tiny_onnx, tmp_path / "wrong", lambda values: values * 1.5)
    outcome = look(Verify(pictures=1, steps=2, max_relative_error=1e-4), [source, wrong], tmp_path / "a")
    assert outcome.failure is not None
    assert outcome.metrics["relative_error_denoiser"] > 1e-3  # type: ignore[operator]
    assert outcome.metrics["relative_error_vae_decoder"] <= 1e-4  # type: ignore[operator]


def test_values_that_are_not_finite_fail_without_any_threshold(
    tiny_source: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    source = open_artifact(tiny_source, family="sd15")
    broken = onnx_copy(tiny_onnx, tmp_path / "broken", lambda values: values * np.float32("nan"))
    outcome = look(Verify(pictures=1, steps=2), [source, broken], tmp_path / "b")
    assert outcome.failure is not None
    assert "not finite" in outcome.failure


def test_places_where_it_cannot_stand() -> None:
    with pytest.raises(ChainError, match="nothing to compare with"):
        check_chain(parse_chain(["verify"]), "torch")
    with pytest.raises(ChainError, match="have no effect on a model in torch"):
        check_chain(parse_chain(["prune", {"verify": {"providers": ["openvino"]}}]), "torch")
    with pytest.raises(ChainError, match=r"optimize\[0\] \(verify\).*providers"):
        parse_chain([{"verify": {"providers": ["openvimo"]}}])


def test_without_a_reference_it_says_so(tiny_source: Path, tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="no parent model to compare with"):
        look(Verify(), [open_artifact(tiny_source, family="sd15")], tmp_path / "look")


def test_engines_cannot_run_without_their_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(requested: str = "auto") -> hardware.Device:
        raise hardware.DeviceError("the device is not there")

    monkeypatch.setattr(hardware, "probe", none)
    problem = Verify().problem("tensorrt", [ExportOnnx()])
    assert problem is not None
    assert "no NVIDIA GPU answers here" in problem
    assert "before build_tensorrt" in problem
