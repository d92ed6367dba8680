"""Figures against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tunekit.diffusion.metrics import MAX_PSNR_DB, psnr_db, relative_error, ssim
from tunekit.errors import NonFiniteError
from tunekit.runtime import to_images


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert relative_error(torch.full((4,), 1.5, dtype=torch.float16), torch.ones(4)) == pytest.approx(0.5)


def test_psnr() -> None:
    picture = noise(1, 3, 16, 16)
    assert psnr_db(picture + 0.1, picture) == pytest.approx(20, abs=1e-4)
    assert psnr_db(255 * picture + 25.5, 255 * picture, peak=255) == pytest.approx(20, abs=1e-4)
    assert psnr_db(picture, picture) == MAX_PSNR_DB


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_no_figure(broken: float) -> None:
    picture = noise(1, 3, 16, 16)
    other = picture.clone()
    other[0, 0, 3, 3] = broken
    for figure in (relative_error, psnr_db, ssim):
        assert math.isnan(figure(other, picture)) and math.isnan(figure(picture, other))
    with pytest.raises(NonFiniteError, match="not finite"):
        to_images(other)


def test_ssim_of_flat_pictures() -> None:
    # Without structure only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 0.2, 0.6, 0.01**2
    value = ssim(torch.full((1, 3, 20, 20), a), torch.full((1, 3, 20, 20), b))
    assert value == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


def test_ssim_window_by_window() -> None:
    a, b = noise(1, 1, 12, 13, seed=1), noise(1, 1, 12, 13, seed=2)
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for y in range(2):
        for x in range(3):
            p, q = (t[0, 0, y : y + 11, x : x + 11].double().numpy() for t in (a, b))
            mean_p, mean_q = (weight * p).sum(), (weight * q).sum()
            variance_p, variance_q = (weight * (p - mean_p) ** 2).sum(), (weight * (q - mean_q) ** 2).sum()
            covariance = (weight * (p - mean_p) * (q - mean_q)).sum()
            luminance = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (variance_p + variance_q + 0.03**2))
    assert ssim(a, b) == pytest.approx(float(np.mean(values)), abs=1e-9)


def test_ssim_orders_pictures() -> None:
    picture = noise(2, 3, 32, 32)
    slightly, badly = picture + 0.05 * noise(2, 3, 32, 32, seed=1), noise(2, 3, 32, 32, seed=2)
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, slightly) == pytest.approx(ssim(slightly, picture))
    assert 1 > ssim(slightly, picture) > 0.9
    assert ssim(badly, picture) < 0.2


def test_ssim_of_pictures_smaller_than_the_window() -> None:
    assert ssim(noise(1, 3, 8, 8), noise(1, 3, 8, 8)) == pytest.approx(1)


def to_float(images: list[Image.Image]) -> Tensor:
    """Pictures of one size as [B, 3, H, W] float32 in [0, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def test_pictures_of_eight_bits_keep_every_value() -> None:
    values = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3) * 10
    pixels = to_float([Image.fromarray(values), Image.fromarray(255 - values)])
    assert pixels.shape == (2, 3, 2, 4)
    assert torch.equal((pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(values))
    torch.testing.assert_close(pixels[1], 1 - pixels[0])
    drawn = to_images(pixels)
    assert [np.asarray(picture).tolist() for picture in drawn] == [values.tolist(), (255 - values).tolist()]


def test_eight_bits_cost_what_rounding_costs() -> None:
    """The error is uniform over one step of 1/255, so its mean square is a twelfth of the step's."""
    picture = noise(1, 3, 64, 64)
    rounded = to_float(to_images(picture))
    assert (rounded - picture).abs().max() <= 0.5 / 255 + 1e-6
    assert psnr_db(rounded, picture) == pytest.approx(10 * math.log10(12 * 255**2), abs=0.3)
