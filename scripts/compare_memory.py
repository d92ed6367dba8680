#!/usr/bin/env python3
"""Predicted memory beside figures that others have published: writes benchmarks/memory.json and memory.md.

    python scripts/compare_memory.py          # two minutes, no GPU

Each row names who measured and on what, is traced in the arithmetic of its source, and says how our
configuration differs from theirs. What cannot be made here is listed with the reason, and not compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import diffusers
import peft
import torch
from torch import Tensor, nn

from tunekit import families
from tunekit.config import AdapterConfig
from tunekit.families import Component, Conditioning, Sizes
from tunekit.memory.allocator import least_capacity, replay
from tunekit.memory.job import Job
from tunekit.memory.levers import Levers, lowered
from tunekit.memory.room import CONTEXT
from tunekit.memory.step import trace_step
from tunekit.memory.trace import CUDA

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
UNITS = {"GiB": GIB, "GB": 10**9, "M": 2**20}
"""What a published unit is taken for; M is what nvidia-smi shows."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Arithmetic:
    """In which types a trainer holds weights and computes.

    Attributes:
        words: for people.
        precision: of the job and its levers.
        held: type of the denoiser's weights before anything is done to them.
    """

    words: str
    precision: str
    held: torch.dtype = torch.float32


# fp16 has bf16's sizes, and tunekit trains fp16 adapters under autocast, where its bf16 ones have masters.
AUTOCAST = Arithmetic("16-bit autocast", "fp16")
NO_AUTOCAST = Arithmetic("bf16 with a float32 adapter, no autocast", "fp32", torch.bfloat16)
ALL_BF16 = Arithmetic("bf16 weights, 16-bit autocast", "bf16", torch.bfloat16)
ALL_FLOAT32 = Arithmetic("all float32", "fp32")


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's, and the configuration that is traced for it.

    Attributes:
        who: the project.
        source: where the figure stands.
        device: that it was measured on.
        figure: as published, in `unit`.
        counter: what the figure is: "reserved" by torch's allocator, "device" for all that a process holds,
            or "card" for the size of a card on which it runs.
        size: (height, width) in pixels.
        rank: of the LoRA; None trains all weights.
        targets: of the LoRA; None means the family's own.
        tokens: of a prompt, for each encoder; None means the family's own.
        beside: networks that stay on the device and are not trained; their weights are added to the step.
        beside_bytes: bytes per weight of theirs.
        difference: what to know before believing the ratio.
    """

    who: str
    source: str
    device: str
    figure: float
    unit: str
    counter: str
    family: str
    size: tuple[int, int]
    arithmetic: Arithmetic
    difference: str
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    base_precision: str = "same"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    optimizer_in_backward: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    attention: str = "flash"
    tokens: tuple[int, ...] | None = None
    beside: tuple[str, ...] = ()
    beside_bytes: int = 4

    @property
    def bytes(self) -> float:
        """The figure."""
        return self.figure * UNITS[self.unit]

    def words(self) -> str:
        """The configuration."""
        trained = f"LoRA r{self.rank}" if self.rank else "all weights"
        height, width = self.size
        facts = families.planned(self.family).facts
        parts = [
            f"{facts.base_title or facts.title}, {trained}, {width}x{height}",
            f"batch {self.micro_batch}" + (f" x {self.accumulation}" if self.accumulation > 1 else ""),
            self.arithmetic.words,
            *([f"{self.base_precision} base"] if self.base_precision != "same" else []),
            self.optimizer + (" in the backward pass" if self.optimizer_in_backward else ""),
            "checkpointed" if self.gradient_checkpointing else "nothing checkpointed",
            *(["attention with a score matrix"] if self.attention == "math" else []),
            *([f"{' and '.join(self.beside)} on the device"] if self.beside else []),
        ]
        return ", ".join(parts)


SIMPLETUNER = "https://github.com/bghira/SimpleTuner/blob/main/documentation"
SWEEP = f"{SIMPLETUNER}/experimental/SEGMENTED_CHECKPOINTING.md"
LOWEST = f"{SIMPLETUNER}/quickstart/FLUX.md"
FIZGIG = "https://github.com/shootthesound/Fizgig/blob/main/src/fizgig/families/sdxl.py"
FUSED = "https://github.com/kohya-ss/sd-scripts/pull/1259"
QLORA = "https://huggingface.co/blog/flux-qlora"
DREAMBOOTH = "https://github.com/huggingface/diffusers/blob/main/examples/dreambooth/README.md"
DREAMBOOTH_DOCS = "https://huggingface.co/docs/diffusers/training/dreambooth"
SHIVAM = "https://github.com/ShivamShrirao/diffusers/blob/main/examples/dreambooth/README.md"

LOKR = "Theirs is a LoKr of factor 12, which keeps other activations; ours is a LoRA on the same layers."
BF16_ADAPTER = "Adapter and AdamW's state are bf16 there, float32 here."
RANK_128 = f"{BF16_ADAPTER} At this rank that is worth up to 0.4 GiB."
CARD = "The size of a card, not a measurement: the ratio has to be below 1 and says no more."
T4 = "Whether each batch had a class picture too is not told; ours has none."
WIDER = "Their nf4 covers layers outside the blocks too."
BOTH = ("text encoders", "VAE")

ROWS = (
    Published(
        "SimpleTuner", SWEEP, "H100", 2.87, "GiB", "reserved", "sd15", (512, 512), AUTOCAST, BF16_ADAPTER,
        rank=16, targets=ATTENTION, gradient_checkpointing=False,
    ),
    Published(
        "SimpleTuner", SWEEP, "H100", 1.98, "GiB", "reserved", "sd15", (512, 512), AUTOCAST, BF16_ADAPTER,
        rank=16, targets=ATTENTION,
    ),
    Published(
        "SimpleTuner", SWEEP, "H100", 13.03, "GiB", "reserved", "sdxl", (1024, 1024), AUTOCAST, LOKR,
        rank=16, targets=ATTENTION, gradient_checkpointing=False,
    ),
    Published(
        "SimpleTuner", SWEEP, "H100", 6.53, "GiB", "reserved", "sdxl", (1024, 1024), AUTOCAST, LOKR,
        rank=16, targets=ATTENTION,
    ),
    Published(
        "SimpleTuner", SWEEP, "H100", 34.59, "GiB", "reserved", "sd3", (1024, 1024), AUTOCAST, RANK_128,
        rank=128, targets=ATTENTION, micro_batch=3, tokens=(77, 77, 154), gradient_checkpointing=False,
    ),
    Published(
        "SimpleTuner", SWEEP, "H100", 7.67, "GiB", "reserved", "sd3", (1024, 1024), AUTOCAST, RANK_128,
        rank=128, targets=ATTENTION, micro_batch=3, tokens=(77, 77, 154),
    ),
    Published(
        "SimpleTuner", LOWEST, "10 or 12 GB card", 9090, "M", "device", "flux", (512, 512), AUTOCAST,
        f"Theirs has 8-bit Lion, and perhaps another rank than their default of 16. {WIDER}",
        rank=16, base_precision="nf4", optimizer="paged_adamw8bit",
    ),
    Published(
        "Fizgig", FIZGIG, "RTX 5090", 6.5, "GB", "reserved", "sdxl", (1024, 1024), NO_AUTOCAST,
        "No difference is known; neither figure has previews in it.",
        rank=16, optimizer="adamw8bit",
    ),
    Published(
        "Fizgig", FIZGIG, "RTX 5090", 3.6, "GB", "reserved", "sdxl", (1024, 1024), NO_AUTOCAST,
        "Their nf4 leaves out proj_in, proj_out and the residual blocks; ours packs them.",
        rank=16, base_precision="nf4", optimizer="adamw8bit",
    ),
    Published(
        "sd-scripts", FUSED, "card not told", 10, "GB", "device", "sdxl", (1024, 1024), ALL_BF16,
        "Not offered here, where trained weights are float32; their Adafactor updates float32 copies.",
        optimizer="adafactor", optimizer_in_backward=True, beside=BOTH, beside_bytes=2,
    ),
    Published(
        "sd-scripts", FUSED, "card not told", 16.4, "GB", "device", "sdxl", (1024, 1024), ALL_FLOAT32,
        "Their README said about 17 GB of the same.",
        optimizer="adafactor", optimizer_in_backward=True, beside=BOTH,
    ),
    Published(
        "diffusers", DREAMBOOTH, "16 GB card", 16, "GiB", "card", "sd15", (512, 512), AUTOCAST, CARD,
        optimizer="adamw8bit", micro_batch=2, accumulation=2, attention="math", beside=BOTH, beside_bytes=2,
    ),
    Published(
        "diffusers", DREAMBOOTH_DOCS, "12 GB card", 12, "GiB", "card", "sd15", (512, 512), AUTOCAST, CARD,
        optimizer="adamw8bit", beside=BOTH, beside_bytes=2,
    ),
    Published(
        "ShivamShrirao", SHIVAM, "T4", 9.92, "GB", "device", "sd15", (512, 512), AUTOCAST, T4,
        optimizer="adamw8bit", attention="efficient",
    ),
    Published(
        "ShivamShrirao", SHIVAM, "T4", 11.17, "GB", "device", "sd15", (512, 512), AUTOCAST, T4,
        optimizer="adamw8bit", attention="efficient", gradient_checkpointing=False,
    ),
    Published(
        "ShivamShrirao", SHIVAM, "T4", 10.08, "GB", "device", "sd15", (512, 512), ALL_FLOAT32, T4,
        optimizer="adamw8bit", attention="efficient",
    ),
    Published(
        "Hugging Face", QLORA, "RTX 4090", 9, "GB", "device", "flux", (768, 512), AUTOCAST,
        f"Theirs is called approximate. {WIDER}",
        rank=4, targets=ATTENTION, base_precision="nf4", optimizer="adamw8bit", accumulation=4,
        tokens=(77, 77),
    ),
    Published(
        "Hugging Face", QLORA, "RTX 4090", 26, "GB", "device", "flux", (768, 512), AUTOCAST,
        "More than the card that they name has, so it was another one or it spilled.",
        rank=4, targets=ATTENTION, optimizer="adamw8bit", accumulation=4, tokens=(77, 77),
    ),
)  # fmt: skip

COUNTERS = {
    "SimpleTuner": "the sweep does not tell which counter it reads. Its L40S shows 0.05 GiB less than its "
    "H100 in nearly all rows, as much as two workspaces of cuBLAS differ and less than two contexts "
    "would, so it is taken for torch's allocator. Rank, layers, batch and prompt length are those of the "
    "example configs that it names, and of SimpleTuner's defaults. FLUX.1's 9090M is taken for MiB of "
    "nvidia-smi.",
    "Fizgig": "a comment in the model's description; the counter is not told. Their logs elsewhere divide "
    "max_memory_reserved by 2^30 and say GB.",
    "sd-scripts": "whether text encoders and VAE stayed on the device and latents were cached is not "
    "told. Ours has all three there, and cached latents. Had they encoded a picture in each step, that "
    "would be the peak.",
    "diffusers": "commands said to run on such a card: with class pictures (2 samples) and 2 accumulated "
    "steps on 16 GB, with xFormers on 12 GB. They leave precision to the user; 16-bit autocast is "
    "assumed. They do not cache latents. In these two rows reserved is the least with which the allocator "
    "gets through.",
    "ShivamShrirao": "a fork of that script that caches latents and captions. The counter is not told and "
    "taken for nvidia-smi. The table ends with 15.79 GB, which a T4 has only if a GB is 10^9 bytes.",
    "Hugging Face": "prompts of 77 tokens, latents and captions cached; the counter is not told.",
}
NOT_COMPARED = (
    "SimpleTuner, FLUX.1 with all layers adapted (30, 18, 13 and 9 GB by base precision): the resolution "
    "is not told, and the figures are lower bounds.",
    "SimpleTuner, int8 and fp8 bases of the sweep: other schemes, of which some keep more than bf16 does.",
    "SimpleTuner, SDXL with all weights (more than 24 GB): a bound, without its configuration.",
    "Fizgig, peaks with previews (10.3 GB in bf16): their sampler and decoder are not ours.",
    "diffusers, DreamBooth on 8 GB: DeepSpeed keeps weights and optimizer state in host memory.",
    "Hugging Face, FLUX.1 with all weights (120 GB): their estimate, not a measurement.",
    "Hugging Face, FLUX.1 in float8 (36.57 GB): a type that tunekit does not compute in.",
    "finetrainers, CogVideoX: no such family here.",
)


class HeldPart(Component):
    """A network whose weights are in bf16 from the start."""

    def build(self, device: str = "meta") -> nn.Module:
        """Makes it."""
        made: nn.Module = super().build(device).to(torch.bfloat16)
        return made


class HeldSizes(Sizes):
    """Sizes whose denoiser, and what that takes, are in bf16."""

    def latents(self, batch: int, height: int, width: int) -> Tensor:
        """In bf16."""
        return super().latents(batch, height, width).to(torch.bfloat16)

    def encoded(self, batch: int) -> Conditioning:
        """In bf16."""
        return lowered(super().encoded(batch), torch.bfloat16, ())


def sizes_of(row: Published) -> Sizes:
    """Of the base that was measured."""
    found = families.sizes_of(row.family, families.planned(row.family).facts.default_source)
    lengths = dict(zip((part.name for part in found.encoders), row.tokens or (), strict=False))
    parts = [replace(part, tokens=lengths.get(part.name, part.tokens)) for part in found.components]
    if row.arithmetic.held == torch.float32:
        return replace(found, components=tuple(parts))
    held = {part.name: getattr(found.denoiser, part.name) for part in fields(Component)}
    parts[parts.index(found.denoiser)] = HeldPart(**held)
    return HeldSizes(found.family, tuple(parts))


def predict(row: Published) -> tuple[int, int]:
    """Bytes allocated and reserved; of a card, the least that the allocator can do with."""
    sizes = sizes_of(row)
    targets = tuple(row.targets or sizes.family.facts.lora_targets)
    adapter = AdapterConfig(rank=row.rank, alpha=row.rank, targets=list(targets)) if row.rank else None
    precision = row.arithmetic.precision
    job = Job(
        sizes,
        adapter,
        row.optimizer,
        precision,
        row.size,
        max_grad_norm=None if row.optimizer_in_backward else 1.0,
    )
    levers = Levers(
        precision,
        row.base_precision,
        row.micro_batch,
        gradient_checkpointing=row.gradient_checkpointing,
        optimizer_in_backward=row.optimizer_in_backward,
    )
    target = replace(CUDA, attention=row.attention)
    trace = trace_step(job, target, levers, rows=(row.micro_batch,) * min(row.accumulation, 2)).trace
    networks = {"text encoders": sizes.encoders, "VAE": (sizes.vae,)}
    parts = [part.build() for name in row.beside for part in networks[name]]
    beside = row.beside_bytes * sum(p.numel() for part in parts for p in part.parameters())
    card = row.counter == "card"
    reserved = least_capacity(trace.events) if card else max(replay(trace.events).values())
    return trace.peak().size + beside, reserved + beside


def main() -> None:
    """Traces, compares, writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    rows = []
    for published in ROWS:
        began = time.perf_counter()
        allocated, reserved = predict(published)
        device = reserved + CONTEXT
        ours = reserved if published.counter == "reserved" else device
        rows.append(
            {
                "who": published.who,
                "source": published.source,
                "device": published.device,
                "configuration": published.words(),
                "published": f"{published.figure:g} {published.unit}",
                "published_gib": round(published.bytes / GIB, 2),
                "compared_with": "reserved" if published.counter == "reserved" else "device",
                "allocated_gib": round(allocated / GIB, 2),
                "reserved_gib": round(reserved / GIB, 2),
                "device_gib": round(device / GIB, 2),
                "ratio": round(ours / published.bytes, 3),
                "ratio_if_gb_is_gib": round(ours / GIB / published.figure, 3)
                if published.unit == "GB"
                else None,
                "difference": published.difference,
            }
        )
        print(f"{time.perf_counter() - began:5.1f} s  {rows[-1]['ratio']:.2f}  {rows[-1]['configuration']}")
    content = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            module.__name__: module.__version__ for module in (torch, diffusers, peft, bitsandbytes)
        },
        "device": "none: predicted without a GPU",
        "context_gib": round(CONTEXT / GIB, 2),
        "rows": rows,
        "sources": COUNTERS,
        "not_compared": NOT_COMPARED,
    }
    (ROOT / "benchmarks/memory.json").write_text(json.dumps(content, indent=2) + "\n")
    (ROOT / "benchmarks/memory.md").write_text("\n".join(markdown(rows)) + "\n")


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of memory.md."""
    lines = [
        "# Predicted memory beside published measurements",
        "",
        "Made by `scripts/compare_memory.py`, without a GPU; `benchmarks/memory.json` has the versions.",
        "",
        "Ours is in GiB of 2^30 bytes: what tensors hold (allocated), what torch's allocator takes for",
        f"them (reserved), and that with {CONTEXT / GIB:.2f} GiB for the CUDA context (device). Each job is",
        "traced in the arithmetic of its source; under autocast, what is trained is float32. tunekit's own",
        "bf16 adapters compute without autocast and take less.",
        "",
        "The ratio is ours to theirs, of the number in bold. GB is read as 10^9 bytes; the ratio in",
        "brackets is for those who meant GiB.",
        "",
        "| who, device | job | published | allocated | reserved | device | ratio | what differs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for row in rows:
        ours = {key: f"{row[f'{key}_gib']:.2f}" for key in ("allocated", "reserved", "device")}
        ours[row["compared_with"]] = f"**{ours[row['compared_with']]}**"
        ratio = f"{row['ratio']:.2f}"
        if row["ratio_if_gb_is_gib"]:
            ratio += f" ({row['ratio_if_gb_is_gib']:.2f})"
        cells = [
            f"[{row['who']}][{sources.index(row['source']) + 1}], {row['device']}",
            row["configuration"],
            row["published"],
            *ours.values(),
            ratio,
            row["difference"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## The sources", "", *(f"- {who}: {told}" for who, told in COUNTERS.items())]
    lines += ["", "## Not compared", "", *(f"- {one}" for one in NOT_COMPARED), ""]
    return [*lines, *(f"[{number}]: {url}" for number, url in enumerate(sources, start=1))]


if __name__ == "__main__":
    main()
