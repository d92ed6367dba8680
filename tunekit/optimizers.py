"""One row per optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunekit.errors import ConfigError, MissingPackageError, did_you_mean, missing, require

if TYPE_CHECKING:
    import torch


SHARED = ("betas", "eps", "weight_decay")
"""The hyper-parameters beside lr that `build` has for all optimizers."""
AUTO = "auto"
"""A name that is no row: adamw, unless memory is planned and only another one fits."""


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known about an optimizer without importing it.

    Attributes:
        import_path: "module:class".
        state_bytes_per_parameter: what its state takes per trained parameter, fp32 parameters.
        takes: which of `SHARED` the class takes.
        defaults: keyword arguments beside lr and `SHARED`.
        fused_on: device types on which the class has one fused kernel (`fused=True`).
        extra: the extra of tunekit that installs it; None for torch's own.
        by_element: whether its state is a value for each weight, which may be split like the weights.
        paged: whether large state lives in host memory.
    """

    name: str
    import_path: str
    state_bytes_per_parameter: float
    takes: frozenset[str] = frozenset(SHARED)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fused_on: frozenset[str] = frozenset()
    extra: str | None = None
    by_element: bool = False
    paged: bool = False


TABLE: dict[str, OptimizerFacts] = {
    facts.name: facts
    for facts in (
        # Two fp32 moments. The fused kernel walks all tensors in one launch.
        OptimizerFacts(
            "adamw",
            "torch.optim:AdamW",
            8,
            fused_on=frozenset({"cpu", "cuda", "mps", "xpu"}),
            by_element=True,
        ),
        # Two int8 moments with one fp32 scale each per block of 256; tensors under 4096 elements stay fp32.
        OptimizerFacts("adamw8bit", "bitsandbytes.optim:AdamW8bit", 2 + 2 * 4 / 256, extra="quant"),
        # The same, but on CUDA the moments of tensors of 1e5 elements or more are in managed memory, whose
        # pages wait on the host; the scales stay on the device. On the CPU it is adamw8bit.
        OptimizerFacts(
            "paged_adamw8bit", "bitsandbytes.optim:PagedAdamW8bit", 2 + 2 * 4 / 256, extra="quant", paged=True
        ),
        # One fp32 second moment, as a mean over each of the last two dimensions: next to nothing for a
        # matrix, but 6/9 of a 3x3 convolution, twice a 1x1 one, and all of a vector. Its eps is a pair that
        # means something else than ours, and lr is relative to the size of the weights.
        OptimizerFacts("adafactor", "torch.optim:Adafactor", 0, takes=frozenset({"weight_decay"})),
    )
}


def find(name: str, *, where: str | None = None) -> OptimizerFacts:
    """The row of an optimizer; of adamw for auto, which whoever plans memory replaces by what it chose.

    Raises:
        ConfigError: for an unknown name, with the nearest one.
    """
    if name == AUTO:
        return TABLE["adamw"]
    if name in TABLE:
        return TABLE[name]
    known = (AUTO, *TABLE)
    hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
    raise ConfigError(f'there is no optimizer "{name}"; {hint}', where=where)


def absent(name: str) -> MissingPackageError | None:
    """What is to be said where the package of an optimizer is not installed; else None.

    Raises:
        ConfigError: unknown name.
    """
    facts = find(name)
    package = facts.import_path.partition(":")[0]
    why = f'the optimizer "{facts.name}" needs'
    return missing(package, extra=facts.extra, why=why) if facts.extra else None


def build(
    name: str,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    device: str = "cpu",
    per_parameter: bool = False,
) -> torch.optim.Optimizer:
    """Makes an optimizer over `parameters`.

    Args:
        name: a row, or auto for adamw.
        parameters: or groups of them, as torch's optimizers take them.
        betas, eps, weight_decay: ignored where the class does not take them (`OptimizerFacts.takes`).
        device: torch device the parameters are on ("cuda:0"); decides whether the fused kernel is used.
        per_parameter: one group per parameter, so that each can be stepped alone during the backward pass.

    Raises:
        ConfigError: unknown name.
        MissingPackageError: the package that has it is not installed.
    """
    facts = find(name)
    module_name, class_name = facts.import_path.split(":")
    if facts.extra:
        require(module_name.partition(".")[0], extra=facts.extra, why=f'the optimizer "{facts.name}" needs')
    optimizer_class = getattr(importlib.import_module(module_name), class_name)
    shared = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    options = {key: value for key, value in shared.items() if key in facts.takes} | dict(facts.defaults)
    if str(device).partition(":")[0] in facts.fused_on:
        options["fused"] = True
    groups = [{"params": [p]} for p in parameters] if per_parameter else list(parameters)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, lr=lr, **options)
    return optimizer
