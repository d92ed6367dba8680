"""Rows of one shape: what a forward pass takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Name -> tensor whose dim 0 is the batch."""


@dataclass(frozen=True)
class Batch:
    """Samples with everything that belongs to them and everything that was drawn for them.

    Attributes:
        ids: of the samples.
        rows: `latents` [B, C, h, w] float32, scaled, drawn from the VAE's distribution; `noise`, like them;
            `timesteps` [B] float32; `weight` [B] float32, 1 or the prior weight of a class picture; `frame`
            [B, 6] float32, see `families.Frame`; and whatever else is kept beside a latent.
        conditioning: what the text encoders gave, before `Family.conditioning`.
    """

    ids: tuple[str, ...]
    rows: Rows
    conditioning: Rows = field(default_factory=dict)

    @property
    def latents(self) -> Tensor:
        """See `rows`, as for the others."""
        return self.rows["latents"]

    @property
    def noise(self) -> Tensor:
        """Of `objective.noise`."""
        return self.rows["noise"]

    @property
    def timesteps(self) -> Tensor:
        """Of `objective.draw`."""
        return self.rows["timesteps"]

    @property
    def weight(self) -> Tensor:
        """How much each row counts."""
        return self.rows["weight"]

    @property
    def frame(self) -> Tensor:
        """Which part of which picture each row is."""
        return self.rows["frame"]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` - 1."""
        made = self._each(lambda tensor: tensor[start:stop])
        return Batch(self.ids[start:stop], made.rows, made.conditioning)

    def with_rows(self, **rows: Tensor) -> Batch:
        """The same batch with other row tensors."""
        return Batch(self.ids, {**self.rows, **rows}, self.conditioning)

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from self.rows.values()
        yield from self.conditioning.values()

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            self.ids,
            {name: change(value) for name, value in self.rows.items()},
            {name: change(value) for name, value in self.conditioning.items()},
        )


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows; they have the same names and shapes."""
    first = batches[0]
    return Batch(
        tuple(name for batch in batches for name in batch.ids),
        {name: torch.cat([batch.rows[name] for batch in batches]) for name in first.rows},
        {name: torch.cat([batch.conditioning[name] for batch in batches]) for name in first.conditioning},
    )


def single(name: str, rows: Rows, conditioning: Rows) -> Batch:
    """A batch of one sample, whose tensors have no batch dimension yet."""
    return Batch(
        (name,),
        {key: value[None] for key, value in rows.items()},
        {key: value[None] for key, value in conditioning.items()},
    )
