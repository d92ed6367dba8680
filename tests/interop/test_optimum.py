"""Optimum's own pipeline draws the same picture from our folder; and tunekit works beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tunekit import families
from tunekit.artifacts import open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.passes import tiny_decoder
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.runtime import generate_pixels, open_runtime

pytestmark = pytest.mark.interop

HERE = Path(__file__).resolve().parent
OF_OPTIMUM_INTEL = {"StableDiffusionPipeline", "StableDiffusionXLPipeline"}
"""Pipelines that it opens there. Those with T5 want its tokenizer's slow class, which needs more packages."""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)


def test_optimum_draws_the_same_pictures(tiny_onnx: Path, tmp_path: Path, in_optimum: Run) -> None:
    external = tmp_path / "external"
    shutil.copytree(tiny_onnx, external)
    unet = onnx.load(external / "unet" / "model.onnx")
    onnx.save(
        unet,
        external / "unet" / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx_data",
        size_threshold=1024,
    )
    requests = [
        {
            "folder": str(folder),
            "prompts": ["a red cat", "the moon"],
            "seeds": [1, 2],
            "steps": 8,
            "guidance": 5.0,
            "height": height,
            "width": width,
            "out": str(tmp_path / f"{index}.npy"),
        }
        for index, (folder, height, width) in enumerate(
            [(tiny_onnx, 64, 64), (tiny_onnx, 48, 80), (external, 64, 64)]
        )
    ]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    in_optimum(HERE / "draw_with_optimum.py", tmp_path / "requests.json")
    runtime = open_runtime(tiny_onnx)
    for request in requests:
        sampling = SamplingConfig(
            steps=8,
            guidance=5.0,
            height=request["height"],  # type: ignore[arg-type]
            width=request["width"],  # type: ignore[arg-type]
        )
        ours = generate_pixels(
            runtime,
            request["prompts"],  # type: ignore[arg-type]
            sampling,
            seeds=request["seeds"],  # type: ignore[arg-type]
        )
        psnr = psnr_db(pixels(Path(request["out"])), ours)  # type: ignore[arg-type]
        print(f"Optimum, {request['height']} x {request['width']}: {psnr:.1f} dB")
        assert psnr >= 60


def test_optimum_opens_what_later_passes_made(tiny_source: Path, tmp_path: Path, in_optimum: Run) -> None:
    """A small decoder in the own one's place, and steps that are cached, which are in artifact.json alone."""
    from diffusers import AutoencoderTiny

    widths, counts = (8, 8, 8), (1, 1, 1)
    small = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts,
    )
    small.save_pretrained(tmp_path / "small")
    taken = {"source": str(tmp_path / "small"), "keep": {"psnr": 1}, "compared": 1}
    chain = parse_chain(["export_onnx", {"tiny_decoder": taken}, {"cache": {"interval": 2}}])
    few = {"steps": 4, "guidance": 5.0, "height": 64, "width": 64}
    context = Context(tmp_path, device="cpu", prompts=("a cat",), sampling=SamplingConfig(**few))
    real = tiny_decoder.TinyDecoder._compared
    with pytest.MonkeyPatch.context() as patch:  # it may be no faster than one that is tiny itself
        patch.setattr(tiny_decoder.TinyDecoder, "_compared", lambda *given: (real(*given)[0], 2.0, []))
        made = run_chain(chain, open_artifact(tiny_source, family="sd15"), context)
    names = {step.kind: step.artifact for step in made.lineage}
    folder = tmp_path / names["tiny_decoder"]
    assert str(made.model_path) in (str(folder), str(tmp_path / names["cache"]))
    request = {"folder": made.source, "prompts": ["a red cat"], "seeds": [1], **few}
    (tmp_path / "requests.json").write_text(json.dumps([request | {"out": str(tmp_path / "there.npy")}]))
    in_optimum(HERE / "draw_with_optimum.py", tmp_path / "requests.json")
    ours = generate_pixels(open_runtime(folder), ["a red cat"], SamplingConfig(**few), seeds=[1])
    psnr = psnr_db(pixels(tmp_path / "there.npy"), ours)
    print(f"Optimum, with a small decoder: {psnr:.1f} dB")
    assert psnr >= 60


@pytest.mark.parametrize("name", families.runnable())
def test_optimum_intel_draws_the_same_pictures(
    name: str, tiny_irs: Callable[[str], Path], tmp_path: Path, in_optimum: Run
) -> None:
    facts = families.get(name).facts
    if facts.pipeline_class not in OF_OPTIMUM_INTEL:
        pytest.skip(f"optimum-intel has no pipeline for {facts.title}")
    few = {"steps": 4, "guidance": 3.0, "height": 48, "width": 80}
    asked = {"folder": str(tiny_irs(name)), "prompts": ["a red cat", "the moon"], "seeds": [1, 2]}
    request = {**asked, **few, "precision": "f32", "out": str(tmp_path / "there.npy")}
    (tmp_path / "requests.json").write_text(json.dumps([request]))
    done = in_optimum(HERE / "draw_with_optimum_intel.py", tmp_path / "requests.json")
    assert f"OV{facts.pipeline_class}" in done.stdout
    runtime = open_runtime(tiny_irs(name), device="cpu")
    ours = generate_pixels(runtime, ["a red cat", "the moon"], SamplingConfig(**few), seeds=[1, 2])
    psnr = psnr_db(pixels(tmp_path / "there.npy"), ours)
    print(f"optimum-intel, {name}: {psnr:.1f} dB")
    assert psnr >= 60


def test_models_saved_here_draw_the_same_there(tiny_source: Path, tmp_path: Path, in_optimum: Run) -> None:
    """What transformers 5 saved, its tokenizer above all, transformers 4 must be able to read."""
    for source in (str(tiny_source), "builtin/emoji-64"):
        here, there = tmp_path / "here.npy", tmp_path / "there.npy"
        script = HERE / "draw_with_tunekit.py"
        subprocess.run([sys.executable, script, source, here], check=True, capture_output=True, timeout=600)
        print(in_optimum(script, source, there).stdout.strip())
        psnr = psnr_db(pixels(there), pixels(here))
        print(f"{source}: {psnr:.1f} dB")
        assert psnr >= 60


SAME_THERE = (
    *("test_packed_while_read_is_packed_afterwards", "test_loading_holds_little_more_than_the_model"),
    *("test_shards_are_read_like_one_file", "test_quantized_layers_survive"),
)
"""Of loading, what is our own code on both sides; it takes half of the time."""


@pytest.mark.slow
def test_core_tests_pass_there(in_optimum: Run) -> None:
    tests = (
        *("tests/diffusion/test_sampling.py", "tests/families/test_contract.py"),
        *("tests/families/test_against_diffusers.py", "tests/families/test_weights.py"),
        *("tests/families/test_loading.py", "tests/training/test_checkpoint.py"),
    )
    same = [f"--deselect=tests/families/test_loading.py::{name}" for name in SAME_THERE]
    done = in_optimum("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *same, timeout=1800)
    summary = done.stdout.strip().splitlines()[-1]
    print(summary)
    assert " passed" in summary
