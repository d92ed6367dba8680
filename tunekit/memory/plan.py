"""A plan: how a job is trained on a device, and what it will take. Plain data, read without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import metadata
from typing import Any

from tunekit.config.memory import Scale
from tunekit.errors import DoesNotFit
from tunekit.memory.decided import Levers
from tunekit.resources import PACKAGE
from tunekit.units import format_bytes

VERSION = 1
PHASES = ("load", "class_pictures", "encode", "first_step", "step", "preview", "save", "heal", "distill")

SPELLED_ALIKE = (
    "precision",
    "micro_batch",
    "optimizer_in_backward",
    "encode_on_host",
    "vae_tiling",
    "class_batch",
)
"""Levers that plan.json, version 1, also has at its top, under the names that they have in `memory:`."""

Phase = dict[str, Any]
"""`{"peak_allocated_bytes", "least_bytes", "host_bytes", "ledger"}`; least_bytes is what the allocator needs
for it, host_bytes what is in the host's memory: on the CPU, all."""


@dataclass(frozen=True)
class Plan:
    """A decision. `as_json` is `plan.json`.

    Attributes:
        device: name of the card, or title of the device that is here.
        budget_bytes: what may be used.
        levers: what is done to make it fit; units are named, even if they are all.
        accumulation: forwards per optimizer step.
        optimizer: a row of `optimizers`.
        blocks: number of all checkpointing units.
        device_bytes: what is needed: the allocator's in the largest phase, context and headroom.
        context_bytes: what CUDA and its libraries hold beside the allocator; 0 on the CPU.
        headroom_bytes: what is kept free, because a prediction can be wrong.
        host_bytes: page-locked memory of the host, for weights that stay there.
        relative_step_time: to the same job with all the memory it wants.
        processes: that train together, each on such a device; all else is told of one of them.
        traffic: bytes that each of them sends in a step (`sharding.Traffic.as_json`).
        moments: one step, for a picture: [phase, ledger].
    """

    device: str
    budget_bytes: int
    fits: bool
    levers: Levers
    accumulation: int
    optimizer: str
    blocks: int
    phases: dict[str, Phase]
    device_bytes: int
    context_bytes: int
    headroom_bytes: int
    host_bytes: int
    relative_step_time: float
    notes: tuple[str, ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()
    processes: int = 1
    traffic: dict[str, int] = field(default_factory=dict)
    moments: tuple[tuple[str, dict[str, int]], ...] = field(default=(), repr=False)

    @property
    def margin(self) -> float:
        """Share of what may be used that is left over."""
        return 1 - self.device_bytes / self.budget_bytes

    @property
    def ram_bytes(self) -> int:
        """Of the host's memory at most; on the CPU, all that is needed."""
        return max(int(phase["host_bytes"]) for phase in self.phases.values())

    @property
    def ram_phase(self) -> str:
        """Phase that needs most of the host's memory."""
        return max(self.phases, key=lambda name: int(self.phases[name]["host_bytes"]))

    @property
    def peak_phase(self) -> str:
        """Phase that needs most."""
        return max(self.phases, key=lambda name: int(self.phases[name]["least_bytes"]))

    @property
    def scale(self) -> Scale:
        """What the words of its levers compare with."""
        return Scale(self.blocks, self.accumulation)

    @property
    def approximates(self) -> list[str]:
        """What of it changes a little what is learned."""
        eight = ["8-bit optimizer state"] if self.optimizer.endswith("8bit") else []
        return [*self.levers.approximations(self.scale), *eight]

    @property
    def measures(self) -> list[str]:
        """What was done to make it fit, in words."""
        return measures(self.levers, self.optimizer, self.scale)

    @property
    def words(self) -> str:
        """The plan in a line: "bf16, micro-batch 1 x 4, 34 of 86 blocks checkpointed"."""
        said = [f"{self.levers.precision}"]
        if self.accumulation == 1:
            said.append(f"micro-batch {self.levers.micro_batch}")
        said += self.measures
        if not self.levers.gradient_checkpointing:
            said.append("nothing checkpointed")
        return ", ".join(said)

    def memory(self) -> dict[str, Any]:
        """The plan as keys of a `memory:` section, with nothing left open."""
        return self.levers.section()

    def as_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        phases = {
            name: {
                "peak_allocated_bytes": found["peak_allocated_bytes"],
                "peak_reserved_bytes": found["least_bytes"],
                "host_bytes": found["host_bytes"],
                "ledger": found["ledger"],
            }
            for name, found in self.phases.items()
        }
        memory = self.memory()
        packed = memory["base_precision"] != "same"
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
            "memory": memory,
            "accumulation": self.accumulation,
            "optimizer": self.optimizer,
            "blocks": self.blocks,
            # The levers again, as they were spelled before `memory` was there.
            **{key: memory[key] for key in SPELLED_ALIKE},
            "base_precision": memory["base_precision" if packed else "precision"],
            "checkpointed_blocks": memory["gradient_checkpointing"],
            "attention_kept_blocks": memory["keep_attention"],
            "offloaded_blocks": memory["offload"],
            "levers": self.measures,
            "approximates": self.approximates,
            "relative_step_time": round(self.relative_step_time, 4),
            "notes": list(self.notes),
            "rejected": list(self.rejected),
            **({"processes": self.processes, "traffic": self.traffic} if self.processes > 1 else {}),
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
        named: dict[str, Any] = dict(known["levers"])
        for name, value in named.items():
            named[name] = tuple(value) if isinstance(value, list) else value
        known["levers"] = Levers(**named)
        return cls(**known)


def measures(levers: Levers, optimizer: str, scale: Scale) -> list[str]:
    """What is done to make a job fit, in words."""
    return [*levers.words(scale), *([optimizer] if optimizer != "adamw" else [])]


@cache
def versions() -> dict[str, str]:
    """Of the packages whose code a trace runs."""
    return {name: metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")}


@cache
def code() -> str:
    """A digest of our own code that traces and plans come from: what they are cached under."""
    sources = [PACKAGE / f"{name}.py" for name in ("planning", "layers", "networks", "optimizers", "tasks")]
    sources.append(PACKAGE / "training" / "distill.py")
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
