"""What scripts that measure share: the machine in words, random weights, PSNR of several pictures."""

from __future__ import annotations

import datetime
import gc
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SHARD = 1_500_000_000
"""Bytes of a file of weights."""


def machine(*packages: str, threads: int = 1) -> dict[str, Any]:
    """Date, processor, threads, and the versions of packages that are installed."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": processor(),
        "threads": threads,
    }
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, as the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


def fidelity(drawn: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """PSNR of pictures [N, 3, H, W] against others, in dB: the mean of all, and the worst."""
    from tunekit.diffusion.metrics import psnr_db

    each = [psnr_db(one, other) for one, other in zip(drawn, wanted, strict=True)]
    return sum(each) / len(each), min(each)


def write_random(family_name: str, pipeline: str, folder: Path) -> int:
    """Writes a family's usual model in fp16 with random weights, holding no more than a shard of it.

    Args:
        pipeline: class of diffusers that opens it.

    Returns:
        Bytes of its weights.
    """
    from safetensors.torch import save_file

    from tunekit import families
    from tunekit.families import tiny
    from tunekit.families.loading import save_tokenizer

    family, total = families.planned(family_name), 0
    folder.mkdir(parents=True, exist_ok=True)
    for part in family.facts.components:
        made, place = part.build(), folder / part.name
        place.mkdir(exist_ok=True)
        if part.role == "scheduler":
            made.save_pretrained(place)
            continue
        made.config.save_pretrained(place) if part.tokenizer else made.save_config(place)
        stem = "model" if part.tokenizer else "diffusion_pytorch_model"
        total += write_shards(made.state_dict(), place, stem, save_file)
    for part in family.facts.encoders:
        save_tokenizer(tiny.clip_tokenizer(max_length=part.tokens), folder / part.tokenizer)
    index: dict[str, Any] = {"_class_name": pipeline, "force_zeros_for_empty_prompt": True}
    if not pipeline.startswith("StableDiffusionXL"):
        index = {"_class_name": pipeline}
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for part in family.facts.components:
        library, name = part.classes.split(":")
        index[part.name] = [library, name]
        if part.tokenizer:
            index[part.tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return total


def write_shards(state: dict[str, Any], place: Path, stem: str, save_file: Any) -> int:
    """Draws tensors one after the other and writes a file whenever enough are there."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    size = total = 0
    for name, tensor in state.items():
        count = tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
        if size + count > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count
        total += count
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        place_in = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{place_in}.safetensors"
        drawn = {name: drawn_like(name, tensor, generator) for name, tensor in shard.items()}
        save_file(drawn, place / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
        del drawn
        gc.collect()
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": names}
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    return total


def drawn_like(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights with which signals neither die nor grow; norms that change nothing."""
    if not like.is_floating_point():
        return torch.arange(like.numel()).view(like.shape)  # positions
    if like.ndim > 1:
        scale = (like[0].numel()) ** -0.5
        return (torch.randn(like.shape, generator=generator) * scale).half()
    return (torch.ones if name.endswith("weight") else torch.zeros)(like.shape).half()


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster `own` is: the median of the rounds' ratios."""
    from statistics import median

    return median(b / a for a, b in zip(own, other, strict=True))
