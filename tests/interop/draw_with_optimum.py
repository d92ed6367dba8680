"""Runs where Optimum is installed: draws with its pipeline, saves the pixels. Argument: a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionPipeline

for request in json.loads(Path(sys.argv[1]).read_text()):
    pipeline = ORTStableDiffusionPipeline.from_pretrained(request["folder"])
    # The class that is chosen by model_index.json has to be the same one.
    assert type(ORTDiffusionPipeline.from_pretrained(request["folder"])) is ORTStableDiffusionPipeline
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline(
        request["prompts"],
        generator=[torch.Generator().manual_seed(seed) for seed in request["seeds"]],
        num_inference_steps=request["steps"],
        guidance_scale=request["guidance"],
        height=request["height"],
        width=request["width"],
        output_type="np",
    ).images
    np.save(request["out"], pixels)
