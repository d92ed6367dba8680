"""The section `memory:`, and what is known of each of its keys: a lever, or what the planner is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import field_validator, model_validator

from tunekit.config.schema import BatchSize, Names, Section, no_effect, refuse, wrong
from tunekit.errors import ConfigError
from tunekit.units import parse_budget

CLASS_BATCH = 4
"""Class pictures drawn at once where there is room."""


class Scale(NamedTuple):
    """What the words of a plan compare a lever with."""

    blocks: int
    """Units of the denoiser that can be checkpointed."""
    accumulation: int
    """Forwards per optimizer step."""


Words = Callable[[Any, Scale], str]
"""What a plan says of a lever's value; "" where it is not worth a word. Of what is in "(" and ")", the lever
before is meant."""


def _nothing(value: Any, scale: Scale) -> str:
    return ""


@dataclass(frozen=True)
class Mark:
    """What is known of a key of `memory:`.

    Attributes:
        resumable: whether it may differ between the lives of one run.
    """

    resumable: bool = True


@dataclass(frozen=True)
class Lever(Mark):
    """A key that is decided for each run: what the user set is kept, the planner finds the rest.

    Attributes:
        words: what a plan says of it.
        exact: whether it changes nothing that is learned.
    """

    words: Words = _nothing
    exact: bool = True


def _base(value: str, scale: Scale) -> str:
    return f"{value} base" if value != "same" else ""


def _micro_batch(value: int, scale: Scale) -> str:
    return f"micro-batch {value} x {scale.accumulation}" if scale.accumulation > 1 else ""


def _checkpointing(value: tuple[str, ...], scale: Scale) -> str:
    return f"{len(value)} of {scale.blocks} blocks checkpointed" if value else ""


def _kept(value: tuple[str, ...], scale: Scale) -> str:
    return f"({len(value)} keep their attention)" if value else ""


def _sharding(value: str, scale: Scale) -> str:
    return "weights split over the devices" if value == "full" else ""


def _offload(value: tuple[str, ...], scale: Scale) -> str:
    return f"weights of {len(value)} blocks in host memory" if value else ""


def _class_batch(value: int | None, scale: Scale) -> str:
    return f"class pictures drawn {value} at once" if value is not None and value < CLASS_BATCH else ""


def _encoded(value: str, scale: Scale) -> str:
    return f"pictures encoded in {value}" if value != "fp32" else ""


def _if_so(text: str) -> Words:
    return lambda value, scale: text if value else ""


class MemoryConfig(Section):
    """What fits where.

    Each key is marked: as a `Lever`, which has a field of the same name in `memory.decided.Levers`, or as
    what the planner is told.
    """

    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Lever(resumable=False, exact=False)] = (
        "fp32"
    )
    """Arithmetic of the denoiser; trained parameters stay fp32. auto is bf16 where the device has it, fp16 on
    older GPUs, fp32 on the CPU."""
    base_precision: Annotated[
        Literal["same", "int8", "fp8", "nf4"] | None, Lever(words=_base, resumable=False, exact=False)
    ] = None
    """Frozen weights of the linear layers in the blocks: same as precision, or packed. int8 and fp8 (e4m3)
    take a byte each, nf4 half of one; int8 rounds least, nf4 most and needs bitsandbytes. fp8 keeps weights
    that a file has in fp8 as they are, and computes in precision on any card. null leaves it to the planner,
    which takes int8 or nf4, and is same without one."""
    micro_batch: Annotated[BatchSize | None, Lever(words=_micro_batch)] = None
    """Samples per forward on one device; default batch_size / processes. Changes nothing that is learned."""
    gradient_checkpointing: Annotated[bool | Names | None, Lever(words=_checkpointing)] = None
    """Compute activations twice instead of keeping them: of all blocks, or of those named. null leaves it to
    the planner, and is false without one."""
    keep_attention: Annotated[bool | Names | None, Lever(words=_kept)] = None
    """Of the checkpointed blocks, all or those named keep what their attentions returned: a little more
    memory, a little less work. null leaves it to the planner."""
    offload: Annotated[bool | Names | None, Lever(words=_offload)] = None
    """Keep frozen weights of checkpointed blocks in host memory and copy them when they are needed: those
    named, or with true as many as the planner finds necessary. null lets the planner decide whether."""
    sharding: Annotated[Literal["none", "full"] | None, Lever(words=_sharding)] = None
    """What several devices have each a part of. full is FSDP2: of the weights that are trained, their
    gradients and the optimizer's state, or of a frozen base; a block's weights are gathered while it runs.
    An adapter is whole everywhere. null leaves it to the planner, and is none without one. One device alone
    has all of it anyway."""
    optimizer_in_backward: Annotated[
        bool | None, Lever(words=_if_so("optimizer in backward"), resumable=False)
    ] = None
    """Update each parameter as soon as its gradient is there, so that all gradients are never held. Only
    where all weights are trained, without accumulation and without train.max_grad_norm. null leaves it to
    the planner."""
    encode_on_host: Annotated[bool | None, Lever(words=_if_so("text encoders on the CPU"))] = None
    """Run the text encoders on the CPU. null lets the planner decide, and is false without one."""
    encode_by_layer: Annotated[
        bool | None, Lever(words=_if_so("text encoders on the device layer by layer"))
    ] = None
    """Keep the text encoders in host memory, and copy each of their layers to the device when it runs: slower
    than all of them at once, and much faster than the CPU. null lets the planner decide, and is false without
    one."""
    encode_precision: Annotated[
        Literal["fp32", "bf16"] | None, Lever(words=_encoded, resumable=False, exact=False)
    ] = None
    """Arithmetic of the VAE while pictures are encoded. bf16 takes half the memory, and moves a latent by
    less than the VAE's own uncertainty of it. null lets the planner decide, and is fp32 without one."""
    vae_tiling: Annotated[bool | None, Lever(words=_if_so("previews decoded in tiles"))] = None
    """Decode previews in tiles, which can show at their seams. null lets the planner decide."""
    class_batch: Annotated[BatchSize | None, Lever(words=_class_batch)] = None
    """Class pictures drawn at once. null leaves it to the planner, and is 4 without one."""
    approximate: Annotated[Literal["never", "if_needed", "if_faster"], Mark()] = "if_needed"
    """Whether the planner may choose what changes a little what is learned: packed base weights and 8-bit
    optimizer state. if_needed: only if nothing exact fits."""
    budget: Annotated[str | None, Mark()] = None
    """Memory to stay within, "8 GiB", or auto for all that is free: then what is not set here is planned
    (tunekit plan). null plans nothing."""
    on_oom: Annotated[Literal["stop", "replan"], Mark()] = "stop"
    """When memory runs out in spite of a plan: stop after a checkpoint, or plan again for less memory and go
    on from it."""
    device: Annotated[str, Mark()] = "auto"
    """auto, cpu, cuda, cuda:1, xpu or mps."""

    @model_validator(mode="after")
    def _one_decides(self) -> MemoryConfig:
        if self.encode_on_host and self.encode_by_layer:
            wrong(
                "encode_by_layer",
                "encode_on_host runs the text encoders on the CPU; leave one of the two out",
            )
        if self.sharding == "full":
            if self.base_precision not in (None, "same"):
                wrong("sharding", "splits float weights, and those of memory.base_precision are packed")
            if self.offload:
                wrong("sharding", "contradicts memory.offload: weights are with other devices or on the host")
            if self.optimizer_in_backward:
                wrong("sharding", "contradicts memory.optimizer_in_backward, which works in one process")
        if self.budget is not None:
            for key in ("gradient_checkpointing", "keep_attention", "offload"):
                if isinstance(getattr(self, key), list):
                    wrong(
                        key,
                        "names blocks, and with memory.budget the planner chooses them;"
                        " leave one of the two out",
                    )
            return self
        no_effect(self, ("approximate", "on_oom"), "nothing is planned without memory.budget")
        if not self.gradient_checkpointing:
            because = "no block is checkpointed (memory.gradient_checkpointing)"
            no_effect(self, (key for key in ("keep_attention", "offload") if getattr(self, key)), because)
        if self.offload is True:
            wrong("offload", "true lets the planner choose the blocks: set memory.budget too, or name them")
        return self

    @field_validator("budget")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None and value != "auto":
            try:
                parse_budget(value)
            except ConfigError as error:
                refuse(f"{error.message}; {error.hint}, or auto")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", value):
            refuse(f'there is no device "{value}"; known: auto, cpu, cuda, cuda:1, xpu, mps')
        return value


def marks() -> dict[str, Mark]:
    """Key -> what is known of it, in order."""
    return {
        name: mark
        for name, field in MemoryConfig.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Mark)
    }


def levers() -> dict[str, Lever]:
    """The keys that are decided for each run, in order."""
    return {name: mark for name, mark in marks().items() if isinstance(mark, Lever)}


def open_levers() -> list[str]:
    """The levers that are left to the planner where nobody sets them."""
    return [name for name in levers() if MemoryConfig.model_fields[name].default is None]


def free_on_resume() -> tuple[str, ...]:
    """Keys that may differ between the lives of one run, as "memory.micro_batch"."""
    return tuple(f"memory.{name}" for name, mark in marks().items() if mark.resumable)
