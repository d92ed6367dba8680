"""Runs in any environment: draws with tunekit and saves the pixels. Arguments: source, output file."""

from __future__ import annotations

import sys

import diffusers
import numpy as np
import transformers

from tunekit.config import SamplingConfig
from tunekit.runtime import generate_pixels, open_runtime

source, out = sys.argv[1:]
drawn = SamplingConfig(steps=6, guidance=5.0)
pixels = generate_pixels(open_runtime(source, family="sd15"), ["a red cat"], drawn, seeds=[7])
np.save(out, pixels.permute(0, 2, 3, 1).numpy())
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
