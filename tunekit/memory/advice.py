"""What to change where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunekit.config.memory import open_levers
from tunekit.hardware import DeviceFacts
from tunekit.memory.plan import Plan
from tunekit.memory.planner import Planner
from tunekit.memory.room import Room, room_of
from tunekit.units import format_bytes


def advice(planner: Planner, plan: Plan, room: Room, cards: Sequence[DeviceFacts]) -> str:
    """What to change when nothing fits: the one change that saves most, and the smallest card that would do.

    Args:
        planner: that made `plan`.
        cards: to choose from.
    """
    job, full = planner.job, planner.job.adapter is None
    changes: list[tuple[str, Planner]] = []

    def change(text: str, **fields: Any) -> None:
        changes.append((text, replace(planner, job=replace(job, **fields), _known={})))

    pinned = planner.memory.model_copy(update=dict.fromkeys(open_levers()))
    if pinned != planner.memory:
        changes.append(("leave what is set under memory: to the planner", replace(planner, memory=pinned)))
    if planner.memory.approximate == "never":
        allowed = planner.memory.model_copy(update={"approximate": "if_needed"})
        changes.append(("memory.approximate=if_needed", replace(planner, memory=allowed)))
    if full and job.max_grad_norm is not None and job.precision != "fp16":
        change(
            "train.max_grad_norm=null, which lets the optimizer work in the backward pass", max_grad_norm=None
        )
    if full:
        change("train.optimizer=adafactor, at another learning rate", optimizer="adafactor")
    if job.precision == "fp32" and room.context:
        change("memory.precision=bf16", precision="bf16")
    if full and job.optimizer == "adamw" and not planner.may_change_optimizer:
        change("train.optimizer=auto", optimizer="adamw8bit")
    if job.preview is not None and plan.peak_phase == "preview":
        change("no previews (preview.prompts=[])", preview=None)
    if any(one.phase == plan.peak_phase for one in planner.after):
        small = [replace(one, levers=replace(one.levers, micro_batch=1)) for one in planner.after]
        changes.append((f"{plan.peak_phase}: {{micro_batch: 1}}", replace(planner, after=small)))
        changes.append((f"no {plan.peak_phase} under optimize:", replace(planner, after=())))
    if min(job.size) >= 512:
        half = (job.size[0] // 2, job.size[1] // 2)
        drawn = {name: half for name in ("preview", "class_pictures") if getattr(job, name)}
        change(f"data.resolution={half[0]}", size=half, **drawn)
    tried = [(text, other.least(plan.device, room)) for text, other in changes]
    lines = []
    if tried:
        text, best = min(tried, key=lambda item: item[1].device_bytes)
        enough = "would fit" if best.device_bytes <= room.total else "is still too much"
        lines.append(f"what helps most: {text} needs {format_bytes(best.device_bytes)}, which {enough}")
    for facts in sorted(cards, key=lambda card: card.memory_bytes or 0):
        if facts.kind == "cuda" and (facts.supports_bf16 or job.precision != "bf16"):
            larger = room_of(facts)
            if larger.total >= plan.device_bytes and planner.least(facts.name, larger).fits:
                lines.append(f"smallest card that would do: {facts.title} ({facts.name})")
                break
    else:
        lines.append("no single card of the table would do")
    return "\n".join(lines)
