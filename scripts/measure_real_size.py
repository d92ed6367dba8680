#!/usr/bin/env python3
"""A model at its real size with random weights, on the CPU; writes benchmarks/<family>_real_size.json.

    .venv/bin/python scripts/measure_real_size.py WORK sd15                  # write export quantize draw
    .venv/bin/python scripts/measure_real_size.py WORK sdxl write load step  # some of the parts

write     the pipeline in fp16, drawn at random and written shard by shard (SD 1.5: 2 GB, SDXL: 7 GB)
load      what opening it in bf16 takes of the host's memory, beside the bytes of the model
step      two steps of a LoRA at 512 px through the recipe, planned and measured memory side by side
export    `export_onnx` in fp32, each graph compared with its torch module on one row of 256 px; with --graphs
          some of them, which are no whole model then
quantize  `quantize` of them as it is without settings, but for --mode and the target
draw      one picture of 256 px in two steps with that, and with the graphs in fp32

WORK needs five times the disk that the pipeline takes. Each part runs in a process of its own, in one thread
unless OMP_NUM_THREADS says more. Its memory is what it takes above the libraries; `process_bytes` is the peak
of the whole process with these. Anonymous memory is what a process cannot give back; the pages of mapped
files, which count as resident too, are the system's to drop. A part is stopped, and nothing is written, when
the machine has less than --spare free.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring

ROOT = Path(__file__).resolve().parent.parent
SIDE, DRAWN = 512, 256
"""Pixels of what is trained on, and of what is drawn: graphs are judged, and not this processor."""
CHAIN = ("write", "export", "quantize", "draw")


# Memory -----------------------------------------------------------------------------------------------------


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Peak resident and anonymous memory of this process within the block, above what was there before."""
    found = {"resident_bytes": 0, "anonymous_bytes": 0, "process_bytes": 0}
    before = _memory()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            now = _memory()
            for name, value in now.items():
                found[name] = max(found[name], value - before[name])
            found["process_bytes"] = max(found["process_bytes"], now["resident_bytes"])

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


def _guard(spare: int) -> None:
    """Ends the process when the machine runs short."""
    from tunekit import hardware

    def look() -> None:
        while True:
            time.sleep(0.5)
            if (free := hardware.machine_memory()[1]) < spare:
                print(f"stopped: {free / 1e9:.1f} GB are free", file=sys.stderr)
                os._exit(3)

    threading.Thread(target=look, daemon=True).start()


# Parts ------------------------------------------------------------------------------------------------------


def write(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Writes the pipeline, never holding more than a shard of it."""
    from tunekit import families

    with watched() as memory:
        facts = families.get(family).facts
        total = measuring.write_random(family, facts.pipeline_class, folder / "model")
    return {"bytes": total, **memory}


def load(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Opens the pipeline in bf16."""
    from tunekit import families
    from tunekit.resources import Source

    made = families.get(family)
    made.tiny()  # the libraries' own memory is not the model's
    gc.collect()
    with watched() as memory:
        pipeline = made.load(Source(str(folder / "model")), torch.bfloat16)
    own = sum(
        tensor.numel() * tensor.element_size()
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in part.state_dict().values()
    )
    return {
        "model_bytes": own,
        **memory,
        "anonymous_ratio": round(memory["anonymous_bytes"] / own, 3),
        "resident_ratio": round(memory["resident_bytes"] / own, 3),
    }


def step(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Two steps of a LoRA, planned for what is free here."""
    import numpy as np
    from PIL import Image

    pictures, runs = folder / "pictures", folder / "runs"
    pictures.mkdir(exist_ok=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"noise number {number}")
    overrides = {
        "model.source": folder / "model",
        "data.path": pictures,
        "data.resolution": SIDE,
        "train.max_steps": 2,
        "train.warmup_steps": 0,
        "memory.device": "cpu",
        "memory.precision": "bf16",
        "memory.approximate": "never",
        "runs": runs,
        "name": family,
    }
    command = [sys.executable, "-m", "tunekit", "run", f"{family}/lora"]
    subprocess.run(
        [*command, *(f"{key}={value}" for key, value in overrides.items())], check=True, stdout=sys.stderr
    )
    plan = json.loads((runs / family / "plan.json").read_text())
    rows = [json.loads(line) for line in (runs / family / "metrics.jsonl").read_text().splitlines()]
    phases = {
        name: {key: phase.get(key) for key in ("peak_allocated_bytes", "measured", "error")}
        for name, phase in plan["phases"].items()
    }
    return {
        "levers": plan["levers"],
        "phases": phases,
        "steps": [{key: row.get(key) for key in ("step", "loss", "seconds")} for row in rows],
    }


def export(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Exports all graphs, or some."""
    from tunekit import families
    from tunekit.passes import export_onnx

    drawn, made = export_onnx.check_inputs, type(families.get(family))
    listed = made.export_components

    def one_row(component: Any) -> dict[str, torch.Tensor]:
        side = DRAWN if component.name == "vae_encoder" else DRAWN // 8
        return {
            name: value[:1, ..., :side, :side] if value.ndim == 4 else value[:1]
            for name, value in drawn(component).items()
        }

    def some(self: Any, pipeline: Any) -> Any:
        return [one for one in listed(self, pipeline) if not asked.graphs or one.name in asked.graphs]

    export_onnx.check_inputs = one_row  # type: ignore[assignment]
    made.export_components = some  # type: ignore[method-assign]
    return _passed("export_onnx", {}, folder / "model", family, folder / "exported")


def quantize(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Quantizes them."""
    settings = {"mode": asked.mode, "target": "cpu"} if asked.mode else {"target": "cpu"}
    return _passed("quantize", settings, _only(folder / "exported"), family, folder / "quantized")


def draw(family: str, folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Draws a picture with either."""
    from tunekit.diffusion.metrics import psnr_db
    from tunekit.runtime import generate_pixels, open_runtime

    found: dict[str, Any] = {}
    pixels = {}
    for kind in ("exported", "quantized"):
        started = time.perf_counter()
        with watched() as memory:
            runtime = open_runtime(_only(folder / kind), device="cpu", provider="cpu")
            pixels[kind] = generate_pixels(runtime, ["a red apple"], _sampling(), seeds=[0])[0]
            runtime.close()
            del runtime
            gc.collect()
        found[kind] = {"seconds": round(time.perf_counter() - started, 1), **memory}
    return found | {"psnr_db": round(psnr_db(pixels["quantized"], pixels["exported"]), 1)}


def _sampling() -> Any:
    from tunekit.config import SamplingConfig

    return SamplingConfig(steps=2, height=DRAWN, width=DRAWN)


def _only(run: Path) -> Path:
    """The folder of a run's one step."""
    (record,) = run.glob("*/artifact.json")
    return record.parent


def _passed(kind: str, settings: dict[str, Any], source: Path, family: str, run: Path) -> dict[str, Any]:
    """One pass on what lies in a folder, and what it says of each component."""
    from tunekit.artifacts import open_artifact
    from tunekit.passes.base import Context, parse_chain, run_chain

    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    context = Context(run_dir=run, device="cpu", prompts=("a red apple",), sampling=_sampling(), say=say)
    passes = parse_chain([{kind: settings}])
    with watched() as memory:
        made = run_chain(passes, open_artifact(source, family=family), context)
    assert made.step is not None
    keys = ("component", "mode", "nodes", "computed", "size_bytes", "relative_error")
    rows = made.step.details["components"]
    return {**memory, "components": [{key: row[key] for key in keys if key in row} for row in rows]}


# Running them -----------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the parts, each in a process of its own, and writes down what they give."""
    parts = {part.__name__: part for part in (write, load, step, export, quantize, draw)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model and all that is made of it")
    parser.add_argument("family", choices=("sd15", "sd2", "sdxl"))
    parser.add_argument("parts", nargs="*", metavar="part", help=f"default: {' '.join(CHAIN)}")
    parser.add_argument("--graphs", nargs="+", default=[], help="of export; default: all")
    parser.add_argument("--mode", default="", help="of quantize; default: its own")
    parser.add_argument("--spare", type=float, default=4.0, metavar="GB", help="memory that stays free")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {' '.join(parts)}")
    family, folder = arguments.family, arguments.work.resolve() / arguments.family
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.inside:
        (name,) = arguments.parts
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _guard(int(arguments.spare * 1e9))
        started = time.perf_counter()
        found = parts[name](family, folder, arguments)
        print(json.dumps({"seconds": round(time.perf_counter() - started, 1), **found}))
        return
    target = ROOT / "benchmarks" / f"{family}_real_size.json"
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in arguments.parts or CHAIN:
        command = [sys.executable, __file__, str(arguments.work), family, name, "--inside"]
        options = ["--mode", arguments.mode, "--spare", str(arguments.spare)]
        options += ["--graphs", *arguments.graphs] if arguments.graphs else []
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
        known = json.loads(target.read_text()) if target.is_file() else {}
        today = datetime.date.today().isoformat()
        known[name] = {"date": today, "threads": int(threads), **json.loads(done.stdout.splitlines()[-1])}
        known["machine"] = measuring.machine("torch", "diffusers", "onnxruntime", threads=int(threads))
        target.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(known[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
