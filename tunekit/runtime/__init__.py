"""One way to run an artifact, whatever runs it: torch, ONNX Runtime, OpenVINO or a TensorRT engine.

A family talks to a pipeline's components. For graphs (ONNX, engines) a stand-in with the same components
is built, so the family's own code encodes, denoises and decodes on every runtime.
"""

from __future__ import annotations

from tunekit.quiet import no_telemetry
from tunekit.runtime.base import Runtime, torch_runtime
from tunekit.runtime.draw import generate, generate_pixels, other_steps, remarks, sample_pixels, to_images
from tunekit.runtime.graph import Graph, GraphModule, GraphVae
from tunekit.runtime.open import open_runtime

__all__ = [
    "Graph",
    "GraphModule",
    "GraphVae",
    "Runtime",
    "generate",
    "generate_pixels",
    "open_runtime",
    "other_steps",
    "remarks",
    "sample_pixels",
    "to_images",
    "torch_runtime",
]

no_telemetry()
