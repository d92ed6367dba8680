#!/usr/bin/env python3
"""SDXL at its real size with random weights, on the CPU; writes benchmarks/sdxl_real_size.json.

    .venv/bin/python scripts/measure_sdxl.py WORK          # all parts; WORK needs 25 GB of disk
    .venv/bin/python scripts/measure_sdxl.py WORK load     # some of: write load step export compare

write    a pipeline in fp16, its weights drawn at random and written shard by shard (7 GB)
load     what opening it in bf16 takes of the host's memory, beside the bytes of the model
step     two steps of a LoRA at 512 px through the recipe, planned and measured memory side by side
export   its U-Net as an ONNX graph in fp32, with its weights in a file beside it
compare  that graph in ONNX Runtime against torch, on one picture of 256 px

Each part runs in a process of its own. Anonymous memory is what a process cannot give back; the pages of
mapped files, which count as resident too, are the system's to drop.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("write", "load", "step", "export", "compare")
SIDE = 512


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Peak resident and anonymous memory of this process within the block, above what was there before."""
    found = {"resident_bytes": 0, "anonymous_bytes": 0}
    before = _memory()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            for name, value in _memory().items():
                found[name] = max(found[name], value - before[name])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"resident_bytes": sizes["VmRSS"], "anonymous_bytes": sizes["RssAnon"]}


def write(folder: Path) -> dict[str, Any]:
    """Writes the pipeline, never holding more than a shard of it."""
    started = time.perf_counter()
    with watched() as memory:
        total = measuring.write_random("sdxl", "StableDiffusionXLPipeline", folder)
    return {"seconds": round(time.perf_counter() - started, 1), "bytes": total, **memory}


def load(folder: Path) -> dict[str, Any]:
    """Opens the pipeline in bf16."""
    from tunekit import families
    from tunekit.resources import Source

    family = families.get("sdxl")
    family.tiny()  # the libraries' own memory is not the model's
    gc.collect()
    started = time.perf_counter()
    with watched() as memory:
        pipeline = family.load(Source(str(folder)), torch.bfloat16)
    own = sum(
        tensor.numel() * tensor.element_size()
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in part.state_dict().values()
    )
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "model_bytes": own,
        **memory,
        "anonymous_ratio": round(memory["anonymous_bytes"] / own, 3),
        "resident_ratio": round(memory["resident_bytes"] / own, 3),
    }


def step(folder: Path) -> dict[str, Any]:
    """Two steps of a LoRA, planned for what is free here."""
    import numpy as np
    from PIL import Image

    pictures, runs = folder.parent / "pictures", folder.parent / "runs"
    pictures.mkdir(exist_ok=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"noise number {number}")
    overrides = {
        "model.source": folder,
        "data.path": pictures,
        "data.resolution": SIDE,
        "train.max_steps": 2,
        "train.warmup_steps": 0,
        "memory.device": "cpu",
        "memory.precision": "bf16",
        "memory.approximate": "never",
        "runs": runs,
        "name": "sdxl",
    }
    command = [sys.executable, "-m", "tunekit", "run", "sdxl/lora"]
    started = time.perf_counter()
    subprocess.run([*command, *(f"{key}={value}" for key, value in overrides.items())], check=True)
    plan = json.loads((runs / "sdxl" / "plan.json").read_text())
    rows = [json.loads(line) for line in (runs / "sdxl" / "metrics.jsonl").read_text().splitlines()]
    phases = {
        name: {key: phase.get(key) for key in ("peak_allocated_bytes", "measured", "error")}
        for name, phase in plan["phases"].items()
    }
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "levers": plan["levers"],
        "phases": phases,
        "steps": [{key: row.get(key) for key in ("step", "loss", "seconds")} for row in rows],
    }


def unet(folder: Path) -> Any:
    """The U-Net as a component to export, in fp32; nothing else of the pipeline stays in memory."""
    from tunekit import families

    family = families.get("sdxl")
    pipeline = family.load(str(folder), family.facts.dtypes(torch.float32))
    made = {component.name: component for component in family.export_components(pipeline)}["unet"]
    del pipeline
    gc.collect()
    return made


def export(folder: Path) -> dict[str, Any]:
    """Exports the U-Net."""
    from tunekit.passes.export_onnx import export_component

    component, target = unet(folder), folder.parent / "onnx" / "unet"
    started = time.perf_counter()
    with watched() as memory:
        nodes = export_component(component, target)
    files = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    return {"seconds": round(time.perf_counter() - started, 1), "nodes": nodes, "files": files, **memory}


def compare(folder: Path) -> dict[str, Any]:
    """Runs the U-Net in torch, lets it go, and runs the graph in ONNX Runtime on the same inputs."""
    from tunekit.passes.export_onnx import as_tuple, check_inputs, graph_error

    component, target = unet(folder), folder.parent / "onnx" / "unet"
    # One row of 256 px: the graph is judged, and not this processor.
    inputs = {
        name: value[:1, ..., :32, :32] if name == "sample" else value[:1]
        for name, value in check_inputs(component).items()
    }
    with torch.no_grad():
        expected = as_tuple(component.module(*inputs.values()))
    del component
    gc.collect()
    started = time.perf_counter()
    with watched() as memory:
        error = graph_error(target / "model.onnx", inputs, expected)
    return {"seconds": round(time.perf_counter() - started, 1), "relative_error": error, **memory}


def main() -> None:
    """Runs the parts, each in a process of its own, and writes down what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model and all that is made of it")
    parser.add_argument("parts", nargs="*", choices=PARTS, help="default: all")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.work.resolve() / "sdxl"
    if arguments.inside:
        (part,) = arguments.parts
        parts = {"write": write, "load": load, "step": step, "export": export, "compare": compare}
        print(json.dumps(parts[part](folder)))
        return
    target = ROOT / "benchmarks" / "sdxl_real_size.json"
    known = json.loads(target.read_text()) if target.is_file() else {}
    for part in arguments.parts or PARTS:
        command = [sys.executable, __file__, str(arguments.work), part, "--inside"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        known[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, json.dumps(known[part], indent=2))
        import diffusers

        known["machine"] = {
            "date": datetime.date.today().isoformat(),
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
        target.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
