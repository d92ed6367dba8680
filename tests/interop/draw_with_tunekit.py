"""Runs in any environment: draws with tunekit and saves the pixels. Arguments: source, output file."""

from __future__ import annotations

import sys

import diffusers
import numpy as np
import transformers

from tunekit.runtime import generate_pixels, open_runtime

source, out = sys.argv[1:]
pixels = generate_pixels(open_runtime(source, family="sd15"), ["a red cat"], seeds=[7], steps=6, guidance=5.0)
np.save(out, pixels.permute(0, 2, 3, 1).numpy())
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
