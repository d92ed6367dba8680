from __future__ import annotations

import sys

import pytest
import torch

from tunekit import optimizers
from tunekit.errors import ConfigError, MissingPackageError

SIDE = 256
"""Of a matrix above bitsandbytes' fp32 limit of 4096 elements."""


def matrix() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)))


def state_bytes(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> int:
    """Without what does not grow with the parameters: step counters, and the 8-bit optimizers' code books."""
    return sum(
        value.numel() * value.element_size()
        for key, value in optimizer.state[weight].items()
        if torch.is_tensor(value) and key != "step" and not key.startswith("qmap")
    )


def descend(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = sum((weight**2).mean() for weight in weights)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# bitsandbytes says that it does not page on the CPU.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [*optimizers.TABLE, "auto"])
def test_every_row_builds_trains_and_has_the_state_it_claims(name: str):
    facts = optimizers.find(name)
    if facts.extra:
        pytest.importorskip("bitsandbytes")
    weight = matrix()
    before = weight.detach().clone()
    optimizer = optimizers.build(name, [weight], lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    given = {"betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.1}
    assert group["lr"] == 1e-2
    assert {key: group[key] for key in facts.takes} == {key: given[key] for key in facts.takes}
    losses = descend(optimizer, [weight], 5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert (weight != before).all()
    held = state_bytes(optimizer, weight) / weight.numel()
    assert held == pytest.approx(facts.state_bytes_per_parameter, rel=0.05, abs=0.05)


def test_adafactor_has_its_own_eps_and_little_state():
    weight = matrix()
    optimizer = optimizers.build("adafactor", [weight], lr=1e-2, betas=(0.8, 0.9), eps=1e-7)
    assert optimizer.param_groups[0]["eps"] == (None, 1e-3)
    assert "betas" not in optimizer.param_groups[0]
    descend(optimizer, [weight], 1)
    assert state_bytes(optimizer, weight) == 2 * SIDE * 4  # a row and a column


@pytest.mark.parametrize(("kernel", "share"), [(3, 6 / 9), (1, 2)])
def test_adafactor_of_a_convolution(kernel: int, share: float):
    weight = torch.nn.Parameter(torch.ones(8, 4, kernel, kernel))
    optimizer = optimizers.build("adafactor", [weight], lr=1e-2)
    descend(optimizer, [weight], 1)
    assert state_bytes(optimizer, weight) / (4 * weight.numel()) == pytest.approx(share)


def test_only_the_paged_row_is_paged():
    assert [facts.name for facts in optimizers.TABLE.values() if facts.paged] == ["paged_adamw8bit"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", optimizers.TABLE)
def test_a_group_per_parameter_learns_the_same(name: str):
    if optimizers.TABLE[name].extra:
        pytest.importorskip("bitsandbytes")
    together, apart = [matrix(), matrix()], [matrix(), matrix()]
    one = optimizers.build(name, together, lr=1e-2)
    many = optimizers.build(name, iter(apart), lr=1e-2, per_parameter=True)
    assert [len(group["params"]) for group in one.param_groups] == [2]
    assert [[id(p) for p in group["params"]] for group in many.param_groups] == [[id(p)] for p in apart]
    assert descend(one, together, 3) == descend(many, apart, 3)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_auto_is_adamw():
    assert "auto" not in optimizers.TABLE
    assert optimizers.find("auto") is optimizers.TABLE["adamw"]
    built = optimizers.build("auto", [torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert type(built) is torch.optim.AdamW
    assert built.param_groups[0]["fused"] is True


def test_adamw_is_fused_where_there_is_a_kernel():
    weight = torch.nn.Parameter(torch.zeros(1))
    assert optimizers.build("adamw", [weight], lr=1.0, device="cpu").param_groups[0]["fused"] is True
    assert not optimizers.build("adamw", [weight], lr=1.0, device="hpu").param_groups[0]["fused"]


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match='there is no optimizer "adam8bit"; did you mean "adamw8bit"'):
        optimizers.build("adam8bit", [], lr=1.0)
    known = "known: auto, adamw, adamw8bit, paged_adamw8bit, adafactor"
    with pytest.raises(ConfigError, match=known):
        optimizers.find("sgd")
    with pytest.raises(ConfigError, match='there is no optimizer "Auto"; did you mean "auto"'):
        optimizers.find("Auto")


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_missing_package(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r'install .*\[quant\]"'):
        optimizers.build(name, [torch.nn.Parameter(torch.zeros(1))], lr=1.0)
