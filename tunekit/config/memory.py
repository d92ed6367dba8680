"""The section `memory:`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from tunekit.config.schema import Positive, Section, no_effect, refuse, wrong
from tunekit.errors import ConfigError
from tunekit.units import parse_bytes

CLASS_BATCH = 4
"""Class pictures drawn at once where there is room."""


class MemoryConfig(Section):
    """What fits where."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the denoiser; trained parameters stay fp32. auto is bf16 where the device has it, fp16 on
    older GPUs, fp32 on the CPU."""
    base_precision: Literal["same", "int8", "nf4"] | None = None
    """Frozen weights of the linear layers in the blocks: same as precision, or packed (nf4 needs
    bitsandbytes). null leaves it to the planner, and is same without one."""
    micro_batch: Positive | None = None
    """Samples per forward on one device; default batch_size / processes. Changes nothing that is learned."""
    gradient_checkpointing: bool | list[str] | None = None
    """Compute activations twice instead of keeping them: of all blocks, or of those named. null leaves it to
    the planner, and is false without one."""
    keep_attention: bool | list[str] | None = None
    """Of the checkpointed blocks, all or those named keep what their attentions returned: a little more
    memory, a little less work. null leaves it to the planner."""
    offload: bool | list[str] | None = None
    """Keep frozen weights of checkpointed blocks in host memory and copy them when they are needed: those
    named, or with true as many as the planner finds necessary. null lets the planner decide whether."""
    optimizer_in_backward: bool | None = None
    """Update each parameter as soon as its gradient is there, so that all gradients are never held. Only
    where all weights are trained, without accumulation and without train.max_grad_norm. null leaves it to
    the planner."""
    encode_on_host: bool | None = None
    """Run the text encoders on the CPU. null lets the planner decide, and is false without one."""
    vae_tiling: bool | None = None
    """Decode previews in tiles, which can show at their seams. null lets the planner decide."""
    class_batch: Positive | None = None
    """Class pictures drawn at once. null leaves it to the planner, and is 4 without one."""
    approximate: Literal["never", "if_needed", "if_faster"] = "if_needed"
    """Whether the planner may choose what changes a little what is learned: packed base weights and 8-bit
    optimizer state. if_needed: only if nothing exact fits."""
    budget: str | None = None
    """Memory to stay within, "8 GiB", or auto for all that is free: then what is not set here is planned
    (tunekit plan). null plans nothing."""
    on_oom: Literal["stop", "replan"] = "stop"
    """When memory runs out in spite of a plan: stop after a checkpoint, or plan again for less memory and go
    on from it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, xpu or mps."""

    @model_validator(mode="after")
    def _one_decides(self) -> MemoryConfig:
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
        if value not in (None, "auto"):
            try:
                parse_bytes(str(value))
            except ConfigError as error:
                refuse(f"{error.message}; {error.hint}, or auto")
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", value):
            refuse(f'there is no device "{value}"; known: auto, cpu, cuda, cuda:1, xpu, mps')
        return value
