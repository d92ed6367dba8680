"""Dropout whose masks belong to the samples, as all other draws do.

A mask follows from (seed, step, sample id, name of the module) by integer arithmetic. So micro-batches,
processes, gradient checkpointing, a resume and another device leave what is learned as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tunekit.diffusion.noise import stable_seed


class Masks:
    """What the dropout of one model knows of the batch that goes through it."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        """[B] int32, a seed for each row."""
        self.wanted = False
        """Whether a module draws from them; without one a step copies nothing to the device for them."""

    def draw(self, seed: int, step: int, ids: Sequence[str], device: torch.device | str) -> None:
        """Take the masks of these samples from here on.

        Args:
            seed: of the run.
            step: optimizer step.
            ids: of the samples, in the order of the rows.
            device: where they are computed.
        """
        if not self.wanted:
            return
        seeds = [_signed(stable_seed(seed, step, name, "dropout")) for name in ids]
        self.rows = torch.tensor(seeds, dtype=torch.int32, device=device)


class SampleDropout(nn.Module):
    """Dropout in training, dim 0 of whose input are the samples that `masks` was told of.

    Args:
        p: share of the values that become zero; the others grow by 1 / (1 - p).
        name: of the module in the model, which tells its masks from others.
        masks: of the model.
    """

    def __init__(self, p: float, name: str, masks: Masks) -> None:
        super().__init__()
        self.p = p
        self.masks = masks
        masks.wanted = True
        self.own = _signed(stable_seed(name))

    def forward(self, values: Tensor) -> Tensor:
        """Values like `values`.

        Raises:
            RuntimeError: the masks were not drawn for these rows.
        """
        if not self.training:
            return values
        rows = self.masks.rows
        if rows is None or len(rows) != len(values):
            drawn = "none were drawn" if rows is None else f"they were drawn for {len(rows)}"
            raise RuntimeError(f"dropout needs the masks of {len(values)} samples, and {drawn}")
        kept = self._kept(rows, values[0].numel()).view(values.shape)
        return torch.where(kept, values, 0.0) * (1 / (1 - self.p))

    @torch.no_grad()
    def _kept(self, rows: Tensor, count: int) -> Tensor:
        """[B, count] bool: a hash of (row, place) against the share."""
        places = _mixed(torch.arange(count, dtype=torch.int32, device=rows.device))
        drawn = _mixed(places[None] ^ _mixed(rows ^ self.own)[:, None])
        return drawn >= round(self.p * 2**32) - 2**31

    def extra_repr(self) -> str:
        """As nn.Dropout's."""
        return f"p={self.p}"


def with_masks(model: nn.Module) -> Masks:
    """Let every dropout of a model that does something draw its masks by sample, and return what tells it."""
    masks = Masks()
    for name, module in list(model.named_modules()):
        if isinstance(module, _DropoutNd) and module.p > 0:
            parent, _, leaf = name.rpartition(".")
            mine = SampleDropout(module.p, name, masks).train(module.training)
            setattr(model.get_submodule(parent), leaf, mine)
    return masks


def _signed(number: int) -> int:
    """The low 32 bits, as int32 has them."""
    low = number & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def _mixed(bits: Tensor) -> Tensor:
    """A hash of each int32: the finalizer "lowbias32" (C. Wellons, nullprogram.com/blog/2018/07/31)."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits.mul_(0x7FEB352D)
    bits ^= (bits >> 15) & 0x1FFFF
    bits.mul_(_signed(0x846CA68B))
    bits ^= (bits >> 16) & 0xFFFF
    return bits
