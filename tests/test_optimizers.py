from __future__ import annotations

import sys

import pytest
import torch

from tunekit import optimizers
from tunekit.errors import ConfigError, MissingPackageError


@pytest.mark.parametrize("name", optimizers.TABLE)
def test_every_row_builds_trains_and_has_the_state_it_claims(name: str):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(
        torch.randn(128, 128, generator=generator)
    )  # above bitsandbytes' fp32 limit of 4096
    optimizer = optimizers.build(name, [weight], lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-7, 0.1)
    before = weight.detach().clone()
    for _ in range(3):
        (weight**2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.detach().norm() < before.norm()
    tensors = [
        value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.numel() > 256
    ]
    held = sum(value.numel() * value.element_size() for value in tensors) / weight.numel()
    # The 256-entry code books of the 8-bit optimizer and step counters do not grow with the parameters.
    assert held == pytest.approx(optimizers.TABLE[name].state_bytes_per_parameter, rel=0.05)


def test_adamw_is_fused_where_there_is_a_kernel():
    weight = torch.nn.Parameter(torch.zeros(1))
    assert optimizers.build("adamw", [weight], lr=1.0, device="cpu").param_groups[0]["fused"] is True
    assert not optimizers.build("adamw", [weight], lr=1.0, device="hpu").param_groups[0]["fused"]


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match='there is no optimizer "adam8bit"; did you mean "adamw8bit"'):
        optimizers.build("adam8bit", [], lr=1.0)


def test_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r'pip install "tunekit\[quant\]"'):
        optimizers.build("adamw8bit", [torch.nn.Parameter(torch.zeros(1))], lr=1.0)
