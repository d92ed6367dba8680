"""Runs where optimum-intel is installed: draws with its pipeline, saves the pixels. Argument: a JSON file."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.intel import OVDiffusionPipeline

for request in json.loads(Path(sys.argv[1]).read_text()):
    pipeline = OVDiffusionPipeline.from_pretrained(
        request["folder"], device="CPU", ov_config={"INFERENCE_PRECISION_HINT": request["precision"]}
    )
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.auto_model_class.__call__).parameters
    options: dict[str, Any] = {}
    if "max_sequence_length" in known:
        read = [getattr(pipeline, f"tokenizer{number}", None) for number in ("_3", "_2", "")]
        options["max_sequence_length"] = next(one for one in read if one is not None).model_max_length
    pixels = pipeline(
        prompt=request["prompts"],
        generator=[torch.Generator().manual_seed(seed) for seed in request["seeds"]],
        num_inference_steps=request["steps"],
        guidance_scale=request["guidance"],
        height=request["height"],
        width=request["width"],
        output_type="np",
        **options,
    ).images
    np.save(request["out"], pixels)
    print(type(pipeline).__name__, pixels.shape)
