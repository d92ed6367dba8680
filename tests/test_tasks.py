"""What a training step computes, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunekit import families
from tunekit.config import ObjectiveConfig
from tunekit.diffusion.batch import Batch
from tunekit.diffusion.objectives import FlowMatching
from tunekit.families import Family, Frame
from tunekit.memory.levers import Fitted
from tunekit.tasks import Denoising


@pytest.fixture(scope="module", params=families.runnable())
def family(request: pytest.FixtureRequest) -> Family:
    return families.get(request.param)


@pytest.fixture(scope="module")
def pipeline(family: Family) -> Any:
    return family.tiny()


@pytest.fixture(scope="module")
def batch(family: Family, pipeline: Any) -> Batch:
    """Three rows of unlike weight, one of them cut out of a larger picture."""
    draw = torch.Generator().manual_seed(0)
    shape = (3, *family.latent_shape(pipeline, 32, 48))
    frames = [Frame.whole(32, 48), Frame((100, 90), (0, 3), (32, 48)), Frame.whole(32, 48)]
    rows = {
        "latents": torch.randn(shape, generator=draw),
        "noise": torch.randn(shape, generator=draw),
        "timesteps": torch.tensor([10.0, 500.0, 990.0]),
        "weight": torch.tensor([1.0, 0.25, 0.0]),
        "frame": torch.stack([frame.row for frame in frames]),
    }
    return Batch(("a", "b", "c"), rows, family.encode_prompt(pipeline, ["a fox", "", "the moon"]))


@pytest.mark.parametrize("options", [{}, {"snr_gamma": 5.0}, {"loss": "huber", "huber_delta": 0.3}])
def test_denoising_is_the_weighted_error_of_the_prediction(
    family: Family, pipeline: Any, batch: Batch, options: dict[str, Any]
) -> None:
    flow = isinstance(family.objective(pipeline), FlowMatching)
    if flow and "snr_gamma" in options:
        pytest.skip("flow matching has no signal-to-noise weights")
    objective = family.objective(pipeline, ObjectiveConfig(**options))
    denoiser = family.denoiser(pipeline)
    task = Denoising(Fitted.plain(denoiser), family, objective)
    with torch.no_grad():
        losses = task.loss(denoiser, batch)
    assert set(losses) == {"loss"} and losses["loss"].shape == (3,)
    scheduler, by_v = pipeline.scheduler, False
    if flow:
        alpha = torch.tensor(1.0)
        times = (batch.timesteps / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - times) * batch.latents + times * batch.noise, batch.noise - batch.latents
    else:
        alpha = scheduler.alphas_cumprod[batch.timesteps.long()].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
        by_v = scheduler.config.prediction_type == "v_prediction"
        velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.latents
        target = velocity if by_v else batch.noise
    told = family.conditioning(batch.conditioning, batch.rows["frame"])
    with torch.no_grad():
        made = family.denoise(denoiser, noisy, batch.timesteps, told)
    error = (made - target).abs()
    rows = error.square()
    if options.get("loss") == "huber":
        rows = torch.where(error < 0.3, rows, 2 * 0.3 * (error - 0.15))
    weight = batch.weight
    if "snr_gamma" in options:
        snr = (alpha / (1 - alpha)).flatten()
        weight = weight * snr.clamp(max=5) / (snr + 1 if by_v else snr)
    torch.testing.assert_close(losses["loss"], weight * rows.flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    assert losses["loss"][2] == 0


def test_parts_of_a_batch_give_the_same_values(family: Family, pipeline: Any, batch: Batch) -> None:
    denoiser = family.denoiser(pipeline)
    task = Denoising(Fitted.plain(denoiser), family, family.objective(pipeline))
    with torch.no_grad():
        whole = task.loss(denoiser, batch)["loss"]
        parts = [task.loss(denoiser, batch.part(at, at + 1))["loss"] for at in range(3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
    assert batch.part(1, 3).ids == ("b", "c")


def test_nothing_is_remembered_beside_the_weights(family: Family, pipeline: Any) -> None:
    task = Denoising(Fitted.plain(family.denoiser(pipeline)), family, family.objective(pipeline))
    task.updated(1)
    task.restore(task.state())
    assert task.state() == {}
