#!/usr/bin/env python3
"""What leaves with `prune`, and what `heal` brings back: benchmarks/prune_cpu.json, and a table.

    .venv/bin/python scripts/measure_prune.py WORK

The bundled model is pruned in several ways below WORK, and each is healed (what is there already is taken).
Time: one call of the denoiser on one guidance pair in torch, in turns with the whole model, median of rounds.
Fidelity: PSNR of pictures against those of the whole model with the same seeds, on prompts that neither prune
nor heal has seen.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from tunekit import families
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import SamplingConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.passes.models import around
from tunekit.passes.pace import Pace
from tunekit.resources import resolve_path
from tunekit.runtime import generate_pixels, open_runtime

ROOT = Path(__file__).resolve().parent.parent
LEARNED = ("cat face", "house", "banana", "airplane", "blue book", "pizza", "rocket", "key")
UNSEEN = ("tiger", "red apple", "crying face", "soccer ball")
WAYS: dict[str, dict[str, Any]] = {
    "`ratio: 0.5, cost: macs`": {"ratio": 0.5, "cost": "macs"},
    "`blocks: small`": {"blocks": "small"},
    "`blocks: 2`": {"blocks": 2},
}
HEAL = {"max_steps": 100, "lr": 1e-3, "batch_size": 8, "pictures": 32}
DRAWN = SamplingConfig(steps=12, guidance=4.0, height=64, width=64)


def pictures(model: Artifact) -> torch.Tensor:
    """What a model draws of the prompts that were not learned from."""
    runtime = open_runtime(model, family="sd15", device="cpu")
    return generate_pixels(runtime, list(UNSEEN), DRAWN, seeds=list(range(len(UNSEEN))))


def fidelity(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """PSNR in dB, the mean of the pictures'."""
    return sum(psnr_db(one, other) for one, other in zip(made, wanted, strict=True)) / len(wanted)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=HEAL["max_steps"], help="of heal")
    parser.add_argument("--only", help="ways whose name has this in it")
    given = parser.parse_args()
    torch.manual_seed(0)
    family = families.get("sd15")
    base = open_artifact(resolve_path("builtin/emoji-64"), family="sd15")
    wanted = pictures(base)
    target = ROOT / "benchmarks" / "prune_cpu.json"
    rows: dict[str, Any] = json.loads(target.read_text())["rows"] if target.is_file() else {}
    whole = family.load(base.model_source)
    for name, settings in WAYS.items():
        if given.only and given.only not in name:
            continue
        context = Context(
            run_dir=given.work / "".join(filter(str.isalnum, name)),
            shared_cache=given.work / "cache",
            device="cpu",
            prompts=LEARNED,
        )
        steps = [{"prune": settings}, {"heal": {**HEAL, "max_steps": given.steps}}]
        made: list[Artifact] = []
        run_chain(parse_chain(steps), base, context, after_step=made.append)
        pruned, healed = made
        own = family.load(pruned.model_source)
        metrics, after = pruned.lineage[-1].metrics, healed.lineage[-1].metrics
        rows[name] = {
            "parameters": metrics["parameters"] / metrics["parameters_before"],
            "macs": metrics["macs"] / metrics["macs_before"],
            "latency": Pace(family, around(whole, {})).share(own.unet),
            "relative_error": [metrics["relative_error"], after["relative_error"]],
            "psnr_db": [fidelity(pictures(model), wanted) for model in made],
            "heal": {**HEAL, "max_steps": after["steps"], "seconds": healed.lineage[-1].seconds},
            "left": [row["block"] for row in pruned.lineage[-1].details.get("whole", []) if row["left"]],
        }
        print(name, rows[name], flush=True)
        said = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        target.write_text(json.dumps({"made with": said, "rows": rows}, indent=2) + "\n")
    print("| | parameters | time of a call | PSNR pruned | PSNR healed |\n| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        before, healed_psnr = row["psnr_db"]
        print(
            f"| {name} | {row['parameters']:.2f} | {row['latency']:.2f} | {before:.1f} dB |"
            f" {healed_psnr:.1f} dB |"
        )


if __name__ == "__main__":
    main()
