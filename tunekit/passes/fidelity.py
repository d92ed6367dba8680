"""How far a quantized model is from what it was, and on what calls that is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunekit.errors import ArtifactError
from tunekit.passes.metrics import Value

if TYPE_CHECKING:
    from torch import Tensor

VAES = ("vae_encoder", "vae_decoder")
"""Graphs of the autoencoder."""
TESTED_CALLS = 8
"""Calls of the denoiser that the error is measured on; ranges are measured on others."""
GARBAGE = 0.5
"""Relative error of a runtime's answers from which they are refused."""
PROBE_STEPS = 8
"""Sampling steps at most of the pictures that are drawn for these calls alone."""


def nothing(component: str, why: str, where: str) -> ArtifactError:
    """A success with nothing done is none."""
    return ArtifactError(
        f"the {component} has no weights that could be quantized: {why}",
        where=where,
        hint="int8 is made of float32: take the model from before it was quantized, export it with"
        " `export_onnx: {dtype: fp32}`, or name other components",
    )


def error(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative error over all tensors."""
    import torch

    from tunekit.diffusion.metrics import relative_error

    return relative_error(torch.cat([t.flatten() for t in made]), torch.cat([t.flatten() for t in wanted]))


def fidelity(found: float) -> dict[str, Value]:
    """A relative error as figures of a pass."""
    return {"relative_error": found, "sqnr_db": -20 * math.log10(max(1e-9, found))}
