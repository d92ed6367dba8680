"""How far an output is from its reference; NaN where either holds a value that is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_PSNR_DB = 150.0  # what equal pictures get, so that reports need no infinity; float32 noise is near 140 dB


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return ||value - reference|| / ||reference||; 0 if both are zero, infinity if only the reference is."""
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    error, size = float((value - reference).norm()), float(reference.norm())
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.nan
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def psnr_db(value: Tensor, reference: Tensor, *, peak: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in dB, at most `MAX_PSNR_DB`, over all elements."""
    error = (value.detach().cpu().double() - reference.detach().cpu().double()).square().mean().item()
    if not math.isfinite(error):
        return math.nan
    return min(MAX_PSNR_DB, 10 * math.log10(peak**2 / error)) if error > 0 else MAX_PSNR_DB


def ssim(value: Tensor, reference: Tensor, *, peak: float = 1.0) -> float:
    """Return the structural similarity of pictures [B, C, H, W], averaged over pictures and channels.

    Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861): Gaussian window of 11 pixels with sigma 1.5,
    K1 = 0.01, K2 = 0.03, windows that lie inside the picture only. Pictures smaller than 11 pixels get a
    smaller window.
    """
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    size = min(11, *value.shape[-2:])
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(distance**2) / (2 * 1.5**2))
    line /= line.sum()
    channels = value.shape[1]
    window = torch.outer(line, line).expand(channels, 1, size, size)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    mean_a, mean_b = blur(value), blur(reference)
    variance_a = blur(value**2) - mean_a**2
    variance_b = blur(reference**2) - mean_b**2
    covariance = blur(value * reference) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean().item()
