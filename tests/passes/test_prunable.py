from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunekit import families, layers
from tunekit.passes.prunable import Activation, Sensitivity, find, macs, macs_each, magnitudes, parameters

FAMILY = families.get("sd15")
ALL = ["feed_forward", "heads", "resnet"]


def tiny() -> nn.Module:
    return FAMILY.denoiser(FAMILY.tiny()).requires_grad_(False)


def outputs(denoiser: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    states = torch.randn(2, 9, 32, generator=generator)
    with torch.no_grad():
        return FAMILY.denoise(denoiser, noisy, torch.tensor([7, 700]), {"encoder_hidden_states": states})


def silence(item, gone: list[int]) -> None:
    """Cuts structures off where they are read."""
    for index in gone:
        item.consumer.weight.data[:, index * item.width : (index + 1) * item.width] = 0


def test_every_block_is_found():
    found = find(tiny(), ALL)
    count = {target: [item.name for item in found if item.target == target] for target in ALL}
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in tiny().modules())
    assert len(count["feed_forward"]) == blocks and len(count["heads"]) == 2 * blocks  # self and cross
    assert len(count["resnet"]) == sum(
        type(module).__name__ == "ResnetBlock2D" for module in tiny().modules()
    )
    assert all(item.count * item.width == item.consumer.weight.shape[1] for item in found)


@pytest.mark.parametrize("target", ALL)
def test_removing_computes_what_silencing_computes(target):
    whole, smaller = tiny(), tiny()
    for item, cut in zip(find(whole, [target]), find(smaller, [target]), strict=True):
        gone = [index for index in range(item.count) if index % 3 == 1]
        silence(item, gone)
        cut.keep([index for index in range(item.count) if index not in gone])
    assert torch.allclose(outputs(smaller), outputs(whole), atol=1e-5)
    assert not torch.allclose(outputs(smaller), outputs(tiny()), atol=1e-3)  # it does matter


@pytest.mark.parametrize("target", ALL)
def test_as_many_parameters_leave_as_announced(target):
    denoiser = tiny()
    for item in find(denoiser, [target]):
        before = parameters(denoiser)
        item.keep(range(item.count - 2))
        assert before - parameters(denoiser) == 2 * item.parameters
    assert all(not (weight == 0).all(dim=-1).any() for weight in denoiser.parameters() if weight.ndim == 2)


def test_packed_and_entangled_blocks_are_left_out():
    denoiser = tiny()
    layers.quantize(denoiser, "int8")
    assert find(denoiser, ALL) == []
    denoiser = tiny()
    for module in denoiser.modules():
        if hasattr(module, "to_q"):
            module.norm_q = nn.LayerNorm(8)
    assert find(denoiser, ["heads"]) == []


class FeedForward(nn.Module):
    """Looks like diffusers' to `find`, small enough to differentiate exactly."""

    def __init__(self) -> None:
        super().__init__()
        entry = nn.Module()
        entry.proj = nn.Linear(3, 6)
        self.net = nn.ModuleList([entry, nn.Identity(), nn.Linear(6, 4)])

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.tanh(self.net[0].proj(x))
        return self.net[2](hidden if gate is None else hidden * gate)


def test_sensitivity_estimates_the_squared_derivative_by_the_gate():
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward())
    block, x = model[0], torch.randn(2, 3)
    exact = (
        torch.autograd.functional.jacobian(lambda gate: block(x, gate), torch.ones(6)).square().sum((0, 1))
        / 2
    )
    with Sensitivity(find(model, ["feed_forward"])) as sensitivity:
        generator = torch.Generator().manual_seed(1)
        for _ in range(4000):
            sensitivity.add(model(x.clone().requires_grad_()), generator)
    (estimate,) = sensitivity.scores
    assert torch.allclose(estimate, exact.double(), rtol=0.15)
    assert sensitivity.examples == 8000


def test_other_importances_measure_what_they_say():
    """What a structure adds to its reader, and how far the output moves with what it says."""
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward())
    block, x = model[0], torch.randn(2, 3)
    found = find(model, ["feed_forward"])
    hidden = torch.tanh(block.net[0].proj(x)).detach()
    with Activation(found) as activation, torch.no_grad():
        model(x)
    added = hidden.square().sum(0) * block.net[2].weight.square().sum(0).detach()
    assert torch.allclose(activation.scores[0], (added / added.mean()).double(), rtol=1e-5)
    slopes = block.net[2].weight.square().sum(0).detach().double()  # the output is linear in what they say
    with Sensitivity(found, by="gradient") as sensitivity:
        generator = torch.Generator().manual_seed(1)
        for _ in range(3000):
            sensitivity.add(model(x.clone().requires_grad_()), generator)
    assert torch.allclose(sensitivity.scores[0], slopes, rtol=0.15)


def test_the_ranking_predicts_what_removal_costs():
    """A structure that ranks low costs less than one that ranks high, at equal size."""
    pipeline = FAMILY.tiny()
    denoiser = FAMILY.denoiser(pipeline).requires_grad_(False)
    found = find(denoiser, ["heads"])
    generator = torch.Generator().manual_seed(0)
    with Sensitivity(found) as sensitivity:
        for step in range(12):
            noisy = torch.randn(4, 4, 16, 16, generator=generator).requires_grad_()
            states = torch.randn(4, 9, 32, generator=generator)
            times = torch.full((4,), 80 * step)
            sensitivity.add(
                FAMILY.denoise(denoiser, noisy, times, {"encoder_hidden_states": states}), generator
            )
    ranked = torch.cat(sensitivity.scores).argsort()
    owner = [(index, head) for index, item in enumerate(found) for head in range(item.count)]
    errors = []
    for gone in (ranked[: len(ranked) // 3], ranked[-(len(ranked) // 3) :]):
        cut = copy.deepcopy(denoiser)
        blocks = find(cut, ["heads"])
        for index, head in (owner[i] for i in gone.tolist()):
            silence(blocks[index], [head])
        errors.append(float((outputs(cut) - outputs(denoiser)).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_magnitudes_are_relative_to_their_block():
    for score in magnitudes(find(tiny(), ALL)):
        assert score.mean() == pytest.approx(1)


def test_multiply_adds_are_counted():
    pipeline = FAMILY.tiny()
    denoiser = FAMILY.denoiser(pipeline)
    before = macs(FAMILY, pipeline)
    height, width = 16, 16
    assert before > denoiser.conv_in.weight.numel() * height * width
    found = find(denoiser, ["resnet"])
    announced = dict(zip((item.name for item in found), macs_each(found, FAMILY, pipeline), strict=True))
    item = next(item for item in found if item.name == "down_blocks.0.resnets.0")
    item.keep(range(item.count - 1))
    left = before - macs(FAMILY, pipeline)
    assert left == pytest.approx(
        announced[item.name], rel=0.05
    )  # biases and the time embedding are used once


@pytest.mark.parametrize("kind", ["one layer", "two layers"])
def test_gated_feed_forwards_of_transformers_are_cut_too(kind: str) -> None:
    """Value and gate leave together, whether one layer gives both or each has its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "one layer":
            from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward

            whole: nn.Module = Flux2FeedForward(8, 8, mult=2.0)
        else:
            from diffusers.models.transformers.transformer_z_image import FeedForward as Gated

            whole = Gated(8, 16)
    smaller = copy.deepcopy(whole)
    (item,), (cut,) = (
        find(nn.Sequential(whole), ["feed_forward"]),
        find(nn.Sequential(smaller), ["feed_forward"]),
    )
    before = parameters(smaller)
    assert (item.name, item.count, item.width) == ("0", 16, 1)
    silence(item, [3, 7])
    cut.keep([index for index in range(16) if index not in (3, 7)])
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(smaller(x), whole(x), atol=1e-6, rtol=1e-5)
    assert before - parameters(smaller) == 2 * item.parameters
