#!/usr/bin/env python3
"""OpenVINO beside torch and ONNX Runtime: speed and fidelity in one run; writes benchmarks/openvino.json.

    .venv/bin/python scripts/measure_openvino.py WORK                            # builtin/emoji-64
    .venv/bin/python scripts/measure_openvino.py WORK runs/quickstart/01-merge-1d0fa2df

WORK keeps the models, so that a second run only measures. One thread; each round gives every model a few
calls of its denoiser (two rows, at the model's own size), in turns, and starts with another one. What is
counted is processor time, which other programs on the machine disturb least. Fidelity is PSNR of whole
pictures against those that torch draws in float32 with the same prompts and seeds, none of which ranges were
measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.diffusion.sampling import initial_latents
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.runtime import generate_pixels, open_runtime

sys.path.insert(0, str(Path(__file__).parent))
import measuring

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ("a dog", "a smiling face", "a house", "a green apple", "a bus", "a flower")
PROMPTS = ("red apple", "panda face", "hamburger", "rocket", "red heart", "soccer ball", "pizza", "blue car")
SAMPLING = SamplingConfig(steps=30, guidance=4.0, negative_prompt="")
CHAINS: dict[str, list[Any]] = {
    "onnxruntime fp32": [],
    "openvino fp32": [{"export_openvino": {"precision": "fp32"}}],
    "openvino bf16": [{"export_openvino": {"precision": "bf16"}}],
    **{
        f"openvino {precision} {method}": [
            {"export_openvino": {"precision": precision}},
            {"quantize_openvino": {"method": method}},
        ]
        for precision, method in (
            ("fp32", "hybrid"),
            ("bf16", "hybrid"),
            ("fp32", "ptq"),
            ("bf16", "ptq"),
            ("bf16", "weight_only"),
        )
    },
}
CALLS = 3


def models(source: str, work: Path) -> dict[str, Artifact]:
    """All models, by name; those that are in `work` are not made again."""
    first = open_artifact(source)
    made = {"torch fp32": first}
    for name, chain in CHAINS.items():
        context = Context(run_dir=work, device="cpu", prompts=CALIBRATION, sampling=SAMPLING)
        made[name] = run_chain(parse_chain(["export_onnx", *chain]), first, context)
    return made


def measure(made: dict[str, Artifact], rounds: int) -> list[dict[str, Any]]:
    """A row for each model."""
    sides = {name: open_runtime(artifact, device="cpu", threads=1) for name, artifact in made.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            side = sides[name]
            sampling = SAMPLING.over(side.sampling)
            latents = initial_latents([0, 1], side.latent_shape(*side.size(sampling)))
            told = side.conditioning(["", PROMPTS[0]], sampling)
            side.denoise(latents, 500.0, told)
            for _ in range(CALLS):
                started = time.process_time()
                side.denoise(latents, 500.0, told)
                times[name].append((time.process_time() - started) * 1e3)
        print(number + 1, {name: round(values[-1], 1) for name, values in times.items()}, flush=True)
    seeds = list(range(100, 100 + len(PROMPTS)))
    wanted = generate_pixels(sides["torch fp32"], list(PROMPTS), SAMPLING, seeds=seeds)
    rows = []
    for name, side in sides.items():
        row: dict[str, Any] = {
            "model": name,
            "runtime": side.title,
            "size_bytes": made[name].size_bytes,
            "denoiser_ms": round(statistics.median(times[name]), 2),
        }
        row["speedup"] = round(statistics.median(times["torch fp32"]) / statistics.median(times[name]), 2)
        if name != "torch fp32":
            drawn = generate_pixels(side, list(PROMPTS), SAMPLING, seeds=seeds)
            worst = min(psnr_db(a, b) for a, b in zip(drawn[:, None], wanted[:, None], strict=True))
            row |= {"psnr_db": round(psnr_db(drawn, wanted), 1), "psnr_db_worst": round(worst, 1)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Makes the models, measures them, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("source", nargs="?", default="builtin/emoji-64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "openvino.json")
    told = parser.parse_args()
    torch.set_num_threads(1)
    made = models(told.source, told.work)
    machine = measuring.machine("torch", "diffusers", "onnxruntime", "openvino", "nncf")
    settings = {"prompts": PROMPTS, "calibration": CALIBRATION, **SAMPLING.model_dump(exclude_none=True)}
    rows = measure(made, told.rounds)
    source = told.source if told.source.startswith("builtin/") else Path(told.source).resolve().name
    content = {"machine": machine, "source": source, "settings": settings, "models": rows}
    told.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
