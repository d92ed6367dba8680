"""Masks belong to samples: how a step is cut changes nothing, and the share is what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.config import AdapterConfig
from tunekit.diffusion.dropout import Masks, SampleDropout, with_masks
from tunekit.memory.job import Job
from tunekit.memory.levers import Levers, fit
from tunekit.memory.step import trace_step
from tunekit.memory.trace import CPU

IDS = ("a", "b", "c")


def dropped(
    ids: tuple[str, ...] = IDS, *, seed: int = 0, step: int = 1, name: str = "x", p: float = 0.3
) -> Tensor:
    """Ones behind a dropout."""
    layer = SampleDropout(p, name, Masks())
    layer.masks.draw(seed, step, ids, "cpu")
    return layer(torch.ones(len(ids), 5, 2000))


def test_a_mask_belongs_to_the_sample():
    whole = dropped()
    assert torch.equal(whole, torch.cat([dropped((name,)) for name in IDS]))
    assert torch.equal(whole, dropped(("c", "a", "b"))[[1, 2, 0]])
    for other in (dropped(seed=1), dropped(step=2), dropped(name="y"), dropped(("d", "e", "f"))):
        agree = (whole == other).float().mean()
        assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.02)  # as independent ones do


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_the_share_and_the_mean(p: float):
    values = dropped(p=p)
    assert (values == 0).float().mean() == pytest.approx(p, abs=0.015)
    assert values.max() == pytest.approx(1 / (1 - p))
    assert values.mean() == pytest.approx(1, abs=0.05)


def test_neighbours_and_rows_are_independent():
    kept = (dropped(p=0.5) > 0).double().flatten(1) - 0.5
    products = [kept[:, lag:] * kept[:, : kept.shape[1] - lag] for lag in (1, 2, 64, 2000)]
    products += [kept[0] * kept[1], kept[1] * kept[2]]
    assert all(abs(float(product.mean()) / 0.25) < 0.03 for product in products)


def test_the_numbers_stay_what_they_are():
    """A checkpoint is continued with the same masks in later versions."""
    layer = SampleDropout(0.5, "x", Masks())
    layer.masks.draw(0, 1, ["a"], "cpu")
    kept = layer(torch.ones(1, 24))[0] > 0
    assert "".join(str(int(one)) for one in kept) == "100000010000111010010010"


def test_nothing_is_dropped_outside_of_training_and_nothing_goes_unseeded():
    layer = SampleDropout(0.5, "x", Masks())
    with pytest.raises(RuntimeError, match="needs the masks of 2 samples, and none were drawn"):
        layer(torch.ones(2, 3))
    layer.masks.draw(0, 0, IDS, "cpu")
    with pytest.raises(RuntimeError, match="they were drawn for 3"):
        layer(torch.ones(2, 3))
    assert torch.equal(layer.eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_without_dropout_a_step_copies_nothing_to_the_device():
    masks = with_masks(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)))
    masks.draw(0, 0, IDS, "cpu")
    assert masks.rows is None


def test_every_dropout_that_does_something_is_found():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout2d(0.2), nn.Dropout(0.0)), nn.Linear(2, 2))
    with_masks(model)
    assert [type(module).__name__ for module in model.modules() if not isinstance(module, nn.Sequential)] == [
        "SampleDropout",
        "SampleDropout",
        "Dropout",
        "Linear",
    ]


@pytest.mark.parametrize(
    ("family", "kind", "levers", "targets"),
    [
        ("sd15", "lora", Levers(), None),
        ("sd15", "dora", Levers(gradient_checkpointing=True), ["to_q", "conv1"]),
        ("sd15", "lora", Levers(base_precision="nf4", gradient_checkpointing=True), None),
        ("sdxl", "dora", Levers(base_precision="int8"), None),
        ("sd2", "lora", Levers(gradient_checkpointing=True), None),
    ],
)
def test_micro_batches_give_the_same_gradients(
    script: Any, family: str, kind: str, levers: Levers, targets: list[str] | None
):
    if levers.base_precision == "nf4":
        pytest.importorskip("bitsandbytes")
    of = families.get(family)
    adapter = AdapterConfig(kind=kind, rank=4, alpha=8, dropout=0.3, targets=targets)
    job = Job(families.sizes_of(family, "tiny"), adapter, size=(32, 32))
    batch = script.real_batch(job, 4, "cpu")
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(batch.latents.shape, generator=draw) for _ in range(2))
    times = torch.tensor([20.0, 300.0, 600.0, 900.0])
    batch = batch.with_rows(latents=latents, noise=noise, timesteps=times, weight=torch.ones(4))
    gradients = {}
    for cut in (4, 1, 3):
        fitted = fit(of.denoiser(of.tiny()), adapter, of.facts, levers, device="cpu")
        task = job.task_of(fitted)
        fitted.module.train()
        with torch.no_grad():  # an update that starts at zero would hide what was dropped
            for index, item in enumerate(fitted.parameters.values()):
                item.add_(0.1 * torch.randn(item.shape, generator=torch.Generator().manual_seed(index)))
        for start in range(0, 4, cut):
            part = batch.part(start, start + cut)
            fitted.masks.draw(0, 1, part.ids, "cpu")
            (task.loss(fitted.module, part)["loss"].sum() / 4).backward()
        gradients[cut] = torch.cat([item.grad.flatten() for item in fitted.parameters.values()])
    size = float(gradients[4].abs().max())
    assert size > 0
    for cut in (1, 3):
        assert float((gradients[cut] - gradients[4]).abs().max()) < 1e-5 * size


def test_the_plan_sees_what_masks_take(script: Any):
    job = Job(families.sizes_of("sd15", "tiny"), AdapterConfig(rank=4, alpha=4, dropout=0.2), size=(64, 64))
    for levers in (Levers(micro_batch=2), Levers(micro_batch=2, gradient_checkpointing=True)):
        row = script.compare(job, levers, "cpu", rows=(2,))
        assert abs(row["error_allocated"]) < 0.01
    plain = Job(job.sizes, AdapterConfig(rank=4, alpha=4), size=(64, 64))
    taken, without = (trace_step(one, CPU, Levers(micro_batch=2)).trace.peak().size for one in (job, plain))
    assert without < taken < 1.5 * without
