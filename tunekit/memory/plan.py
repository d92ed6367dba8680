"""A plan: how a job is trained on a device, and what it will take. Plain data, read without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from typing import Any

from tunekit.config import CLASS_BATCH
from tunekit.errors import DoesNotFit
from tunekit.resources import PACKAGE
from tunekit.units import format_bytes

VERSION = 1
PHASES = ("class_pictures", "encode", "first_step", "step", "preview", "save")

Phase = dict[str, Any]
"""`{"peak_allocated_bytes", "least_bytes", "ledger"}`; least_bytes is what the allocator needs for it."""


@dataclass(frozen=True)
class Plan:
    """A decision. `as_json` is `plan.json`.

    Attributes:
        device: name of the card, or title of the device that is here.
        budget_bytes: what may be used.
        device_bytes: what is needed: the allocator's in the largest phase, context and headroom.
        context_bytes: what CUDA and its libraries hold beside the allocator; 0 on the CPU.
        headroom_bytes: what is kept free, because a prediction can be wrong.
        precision: of the arithmetic.
        base_precision: of the frozen weights of linear layers: `precision`, "int8" or "nf4".
        checkpointed_blocks: computed twice.
        attention_kept_blocks: of those, the ones that keep what their attentions returned.
        offloaded_blocks: of those, the ones whose weights stay in host memory.
        host_bytes: what those take there.
        class_batch: class pictures drawn at once; None where none are drawn.
        blocks: number of all checkpointing units.
        relative_step_time: to the same job with all the memory it wants.
        moments: one step, for a picture: [phase, ledger].
    """

    device: str
    budget_bytes: int
    fits: bool
    micro_batch: int
    accumulation: int
    precision: str
    base_precision: str
    optimizer: str
    optimizer_in_backward: bool
    checkpointed_blocks: tuple[str, ...]
    attention_kept_blocks: tuple[str, ...]
    offloaded_blocks: tuple[str, ...]
    host_bytes: int
    encode_on_host: bool
    vae_tiling: bool
    class_batch: int | None
    blocks: int
    phases: dict[str, Phase]
    device_bytes: int
    context_bytes: int
    headroom_bytes: int
    relative_step_time: float
    notes: tuple[str, ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()
    moments: tuple[tuple[str, dict[str, int]], ...] = field(default=(), repr=False)

    @property
    def peak_phase(self) -> str:
        """Phase that needs most."""
        return max(self.phases, key=lambda name: int(self.phases[name]["least_bytes"]))

    @property
    def packed(self) -> bool:
        """Whether the base is kept in fewer bits than it computes in."""
        return self.base_precision != self.precision

    @property
    def approximates(self) -> list[str]:
        """What of it changes a little what is learned."""
        found = []
        if self.packed:
            found.append(f"{self.base_precision} base")
        if self.optimizer.endswith("8bit"):
            found.append("8-bit optimizer state")
        return found

    @property
    def levers(self) -> list[str]:
        """What was done to make it fit, in words."""
        made = []
        if self.packed:
            made.append(f"{self.base_precision} base")
        if self.accumulation > 1:
            made.append(f"micro-batch {self.micro_batch} x {self.accumulation}")
        if self.checkpointed_blocks:
            text = f"{len(self.checkpointed_blocks)} of {self.blocks} blocks checkpointed"
            if self.attention_kept_blocks:
                text += f" ({len(self.attention_kept_blocks)} keep their attention)"
            made.append(text)
        if self.offloaded_blocks:
            made.append(f"weights of {len(self.offloaded_blocks)} blocks in host memory")
        if self.optimizer != "adamw":
            made.append(self.optimizer)
        if self.optimizer_in_backward:
            made.append("optimizer in backward")
        if self.encode_on_host:
            made.append("text encoders on the CPU")
        if self.class_batch is not None and self.class_batch < CLASS_BATCH:
            made.append(f"class pictures drawn {self.class_batch} at once")
        if self.vae_tiling:
            made.append("previews decoded in tiles")
        return made

    @property
    def words(self) -> str:
        """The plan in a line: "bf16, micro-batch 1 x 4, 34 of 86 blocks checkpointed"."""
        said = [f"{self.precision}"]
        if self.accumulation == 1:
            said.append(f"micro-batch {self.micro_batch}")
        said += self.levers
        if not self.checkpointed_blocks:
            said.append("nothing checkpointed")
        return ", ".join(said)

    def memory(self) -> dict[str, Any]:
        """The plan as keys of a `memory:` section, with nothing left open."""
        return {
            "precision": self.precision,
            "base_precision": self.base_precision if self.packed else "same",
            "micro_batch": self.micro_batch,
            "gradient_checkpointing": list(self.checkpointed_blocks),
            "keep_attention": list(self.attention_kept_blocks),
            "offload": list(self.offloaded_blocks),
            "optimizer_in_backward": self.optimizer_in_backward,
            "encode_on_host": self.encode_on_host,
            "vae_tiling": self.vae_tiling,
            "class_batch": self.class_batch,
        }

    def as_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        phases = {
            name: {
                "peak_allocated_bytes": found["peak_allocated_bytes"],
                "peak_reserved_bytes": found["least_bytes"],
                "ledger": found["ledger"],
            }
            for name, found in self.phases.items()
        }
        return {
            "version": VERSION,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "phases": phases,
            "peak_phase": self.peak_phase,
            "device_bytes": self.device_bytes,
            "context_bytes": self.context_bytes,
            "headroom_bytes": self.headroom_bytes,
            "host_bytes": self.host_bytes,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "precision": self.precision,
            "base_precision": self.base_precision,
            "optimizer": self.optimizer,
            "optimizer_in_backward": self.optimizer_in_backward,
            "checkpointed_blocks": list(self.checkpointed_blocks),
            "attention_kept_blocks": list(self.attention_kept_blocks),
            "offloaded_blocks": list(self.offloaded_blocks),
            "encode_on_host": self.encode_on_host,
            "vae_tiling": self.vae_tiling,
            "class_batch": self.class_batch,
            "blocks": self.blocks,
            "levers": self.levers,
            "approximates": self.approximates,
            "relative_step_time": round(self.relative_step_time, 4),
            "notes": list(self.notes),
            "rejected": list(self.rejected),
        }

    def dump(self) -> dict[str, Any]:
        """All of it, for `Plan.load`."""
        return asdict(self)

    @classmethod
    def load(cls, content: Mapping[str, Any]) -> Plan:
        """The plan that `dump` gave, through JSON.

        Raises:
            TypeError, KeyError: made by another version.
        """
        known = {item.name: content[item.name] for item in fields(cls)}
        for name, value in known.items():
            if isinstance(value, list):
                known[name] = tuple(value)
        known["moments"] = tuple((phase, ledger) for phase, ledger in known["moments"])
        return cls(**known)


@cache
def versions() -> dict[str, str]:
    """Of the packages whose code a trace runs."""
    return {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")}


@cache
def code() -> str:
    """A digest of our own code that traces and plans come from: what they are cached under."""
    sources = [PACKAGE / f"{name}.py" for name in ("planning", "layers", "optimizers", "tasks")]
    for folder in ("adapters", "diffusion", "memory", "families"):
        sources += sorted((PACKAGE / folder).glob("*.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def refuse(plan: Plan, advice: str, why_less: str = "") -> DoesNotFit:
    """The error for a plan that does not fit.

    Args:
        advice: what to change.
        why_less: why the device offers less than it has.
    """
    missing = plan.device_bytes - plan.budget_bytes
    worst = plan.phases[plan.peak_phase]
    parts = ", ".join(
        f"{name} {format_bytes(size)}" for name, size in sorted(worst["ledger"].items(), key=lambda x: -x[1])
    )
    return DoesNotFit(
        f"it needs {format_bytes(plan.device_bytes)} in the phase {plan.peak_phase} even with {plan.words}"
        f" ({parts}), and {plan.device} has {format_bytes(plan.budget_bytes)}"
        + (f" ({why_less})" if why_less else "")
        + f": {format_bytes(missing)} are missing",
        hint=advice,
    )
