"""diffusers' own ONNX pipeline, while it exists, draws the same picture from our folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.diffusion.sampling import initial_latents
from tunekit.runtime import generate_pixels, open_runtime

pytestmark = pytest.mark.interop


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_draws_the_same_picture(tiny_onnx: Path, tmp_path: Path) -> None:
    pipeline_class: Any = getattr(diffusers, "OnnxStableDiffusionPipeline", None)
    if pipeline_class is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no ONNX pipeline any more")
    # It takes SD 1.x's VAE for granted: the scale 0.18215, which the tiny one is given here; and 8 pixels per
    # latent where the tiny one has 4, so it is asked for twice the size.
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx, folder)
    # A plain ONNX folder then, and no artifact: that would say that it was changed.
    (folder / "artifact.json").unlink()
    for config in folder.glob("vae_*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.18215}))
    pipeline = pipeline_class.from_pretrained(folder, provider="CPUExecutionProvider")
    pipeline.set_progress_bar_config(disable=True)
    runtime = open_runtime(folder)
    for height, width in ((64, 64), (32, 96)):
        theirs = pipeline(
            "a red cat",
            latents=initial_latents([5], runtime.latent_shape(height, width)).numpy(),
            num_inference_steps=8,
            guidance_scale=5.0,
            height=2 * height,
            width=2 * width,
            output_type="np",
        ).images
        sampling = SamplingConfig(steps=8, guidance=5.0, height=height, width=width)
        ours = generate_pixels(runtime, ["a red cat"], sampling, seeds=[5])
        psnr = psnr_db(torch.from_numpy(np.asarray(theirs)).permute(0, 3, 1, 2), ours)
        print(f"diffusers {diffusers.__version__}, {height} x {width}: {psnr:.1f} dB")
        assert psnr >= 60
