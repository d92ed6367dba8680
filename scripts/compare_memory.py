#!/usr/bin/env python3
"""Predicted memory beside figures that others have published: writes benchmarks/memory.json and memory.md.

    python scripts/compare_memory.py          # about a minute, no GPU

Each row names who measured, on what, and how our configuration differs from theirs.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import peft
import torch

from tunekit import families
from tunekit.config import AdapterConfig
from tunekit.memory.allocator import replay
from tunekit.memory.job import Job, trace_step
from tunekit.memory.trace import CUDA

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's."""

    who: str
    source: str
    device: str
    gib: float
    family: str
    size: int
    checkpointed: bool
    difference: str


ROWS = (
    Published(
        "SimpleTuner",
        "https://github.com/bghira/SimpleTuner",
        "H100",
        2.87,
        "sd15",
        512,
        False,
        "rank as theirs; their targets and the counter they read are not known",
    ),
    Published(
        "SimpleTuner",
        "https://github.com/bghira/SimpleTuner",
        "H100",
        1.98,
        "sd15",
        512,
        True,
        "rank as theirs; their targets and the counter they read are not known",
    ),
    Published(
        "Fizgig",
        "https://github.com/shootthesound/Fizgig",
        "RTX 5090",
        6.5e9 / GIB,
        "sdxl",
        1024,
        True,
        "theirs is in GB of 10^9 bytes, rounded; which counter they read is not said",
    ),
)


def main() -> None:
    """Traces, compares, writes."""
    rows = []
    for published in ROWS:
        blueprint = families.BLUEPRINTS.get(published.family)
        adapter = AdapterConfig(rank=16, alpha=16, targets=ATTENTION)
        job = Job(blueprint, adapter, precision="bf16", size=(published.size, published.size))
        trace = trace_step(job, CUDA, micro_batch=1, checkpointed=published.checkpointed).trace
        allocated = trace.peak().size / GIB
        reserved = max(replay(trace.events).values()) / GIB
        rows.append(
            {
                "who": published.who,
                "source": published.source,
                "device": published.device,
                "what": f"{blueprint.title}, LoRA r16, {published.size} px, batch 1, bf16, "
                + ("all checkpointed" if published.checkpointed else "nothing checkpointed"),
                "published_gib": round(published.gib, 2),
                "allocated_gib": round(allocated, 2),
                "reserved_gib": round(reserved, 2),
                "reserved_error": round(reserved / published.gib - 1, 4),
                "difference": published.difference,
            }
        )
        print(rows[-1])
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft)},
        "device": "none: predicted without a GPU",
        "rows": rows,
    }
    (ROOT / "benchmarks/memory.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [
        "# Predicted memory beside published measurements",
        "",
        "Made by `scripts/compare_memory.py`, without a GPU. GiB of 2^30 bytes; the step alone, without the",
        "CUDA context. `benchmarks/memory.json` has the versions.",
        "",
        "| who, device | job | published | allocated | reserved | error of reserved | differences |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['who']}, {row['device']} | {row['what']} | {row['published_gib']} | {row['allocated_gib']} "
        f"| {row['reserved_gib']} | {row['reserved_error']:+.1%} | {row['difference']} |"
        for row in rows
    ]
    (ROOT / "benchmarks/memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
