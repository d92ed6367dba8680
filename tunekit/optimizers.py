"""One row per optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunekit.errors import ConfigError, did_you_mean, require

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known about an optimizer without importing it.

    Attributes:
        import_path: "module:class".
        state_bytes_per_parameter: what its state takes per trained parameter, fp32 parameters.
        defaults: keyword arguments beside lr, betas, eps and weight_decay.
        fused_on: device types on which the class has one fused kernel (`fused=True`).
        extra: the extra of tunekit that installs it; None for torch's own.
    """

    name: str
    import_path: str
    state_bytes_per_parameter: float
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fused_on: frozenset[str] = frozenset()
    extra: str | None = None


TABLE: dict[str, OptimizerFacts] = {
    facts.name: facts
    for facts in (
        # Two fp32 moments. The fused kernel walks all tensors in one launch.
        OptimizerFacts("adamw", "torch.optim:AdamW", 8, fused_on=frozenset({"cpu", "cuda", "mps", "xpu"})),
        # Two int8 moments with one fp32 scale each per block of 256; tensors under 4096 elements stay fp32.
        OptimizerFacts("adamw8bit", "bitsandbytes.optim:AdamW8bit", 2 + 2 * 4 / 256, extra="quant"),
    )
}


def find(name: str, *, where: str | None = None) -> OptimizerFacts:
    """The row of an optimizer.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    if name in TABLE:
        return TABLE[name]
    hint = did_you_mean(name, TABLE) or f"known: {', '.join(TABLE)}"
    raise ConfigError(f'there is no optimizer "{name}"; {hint}', where=where)


def build(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    device: str = "cpu",
) -> torch.optim.Optimizer:
    """Makes an optimizer over `parameters`.

    Args:
        device: torch device the parameters are on ("cuda:0"); decides whether the fused kernel is used.

    Raises:
        ConfigError: unknown name.
        MissingPackageError: the package that has it is not installed.
    """
    facts = find(name)
    module_name, class_name = facts.import_path.split(":")
    if facts.extra:
        require(module_name.partition(".")[0], extra=facts.extra, why=f'the optimizer "{name}" needs')
    optimizer_class = getattr(importlib.import_module(module_name), class_name)
    options: dict[str, Any] = dict(facts.defaults)
    if str(device).partition(":")[0] in facts.fused_on:
        options["fused"] = True
    optimizer: torch.optim.Optimizer = optimizer_class(
        list(parameters), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
    )
    return optimizer
