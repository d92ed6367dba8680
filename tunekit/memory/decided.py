"""The `memory:` section with nothing left open: plain data, read without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tunekit.config.memory import MemoryConfig, Scale, levers

Units = bool | Collection[str]
"""Module paths of units; True for all, False for none."""


@dataclass(frozen=True)
class Levers:
    """How a job is made to fit: a field for each `config.memory.Lever`, spelled like it.

    Attributes:
        precision: "fp32", "bf16" or "fp16" arithmetic; frozen weights are kept in it.
        base_precision: "same" as `precision`, or "int8", "fp8" or "nf4" for the frozen linear layers of the
            blocks.
        micro_batch: samples per forward; None for the whole batch.
        gradient_checkpointing: units that are computed twice.
        keep_attention: of those, the ones that keep the outputs of their attentions.
        offload: of those, the ones whose frozen weights stay in host memory.
        sharding: "none", or "full" where each process has a part of the weights.
        optimizer_in_backward: each parameter is updated, and its gradient freed, as soon as it is there.
        encode_on_host: text encoders run on the CPU.
        encode_by_layer: text encoders run on the device, and each of their layers is there only then.
        encode_precision: "fp32" or "bf16" arithmetic of the VAE while pictures are encoded.
        vae_tiling: previews are decoded in tiles.
        class_batch: class pictures drawn at once; None where none are.
    """

    precision: str = "fp32"
    base_precision: str = "same"
    micro_batch: int | None = None
    gradient_checkpointing: Units = False
    keep_attention: Units = False
    offload: Units = False
    sharding: str = "none"
    optimizer_in_backward: bool = False
    encode_on_host: bool = False
    encode_by_layer: bool = False
    encode_precision: str = "fp32"
    vae_tiling: bool = False
    class_batch: int | None = None

    @classmethod
    def of(cls, memory: MemoryConfig | Mapping[str, Any]) -> Levers:
        """Those of a section in which nothing is left to a planner, or of the `section` of others."""
        known = memory if isinstance(memory, Mapping) else memory.model_dump()
        made: dict[str, Any] = {}
        for item in fields(cls):
            value = known[item.name]
            empty = value is None or value in ([], ())
            made[item.name] = item.default if empty else tuple(value) if isinstance(value, list) else value
        return cls(**made)

    def section(self) -> dict[str, Any]:
        """As keys of a `memory:` section."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def among(self, units: Sequence[str]) -> Levers:
        """The same with the units named that "all" and "none" stand for, in order."""
        twice = named(self.gradient_checkpointing, units)
        kept = named(self.keep_attention, units)
        away = named(self.offload, units)
        return replace(
            self,
            gradient_checkpointing=tuple(unit for unit in units if unit in twice),
            keep_attention=tuple(unit for unit in units if unit in kept & twice),
            offload=tuple(unit for unit in units if unit in away),
        )

    def words(self, scale: Scale) -> list[str]:
        """What was done to make it fit; of levers that name `among` units."""
        return [*self._said(scale).values()]

    def approximations(self, scale: Scale) -> list[str]:
        """What of that changes a little what is learned."""
        known = levers()
        return [text for name, text in self._said(scale).items() if not known[name].exact]

    def _said(self, scale: Scale) -> dict[str, str]:
        said: dict[str, str] = {}
        for name, lever in levers().items():
            text = lever.words(getattr(self, name), scale)
            if text.startswith("(") and said:
                said[next(reversed(said))] += f" {text}"
            elif text:
                said[name] = text
        return said


def named(chosen: Units, units: Collection[str]) -> set[str]:
    """Those of the units that are chosen."""
    return set(units) if chosen is True else set(chosen or ())
