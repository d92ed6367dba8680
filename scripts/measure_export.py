#!/usr/bin/env python3
"""ONNX at a model's real size with random weights, on the CPU; writes benchmarks/export_real_size.json.

    .venv/bin/python scripts/measure_export.py WORK sd15                # all; WORK needs 12 GB of disk
    .venv/bin/python scripts/measure_export.py WORK sd15 unet           # one of them
    .venv/bin/python scripts/measure_export.py WORK sdxl                # 35 GB of disk

Of each component, one after the other, each stage in a process of its own:

write     its weights, drawn at random in fp16, shard by shard
export    the graph in fp32, as `export_onnx` writes it
compare   ONNX Runtime against torch on the same inputs, of 256 px; torch's weights go before the graph comes
quantize  as `quantize` does by default where nothing is measured: the denoiser's products in int8 with ranges
          of the moment (mode dynamic), the weights of the others in float16
call      one run of that graph, of two rows at the model's own size (what guidance asks for), and its error
          against the fp32 graph

Figures are seconds and the peak of resident memory of the whole process, libraries and mapped files included.
What is written goes when its component is done; --keep keeps it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import write_shards

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "export_real_size.json"
STAGES = ("write", "export", "compare", "quantize", "call")
SIDE = 256
"""Pixels of the pictures that graphs are compared on: the graph is judged, and not this processor."""


def names(family: str) -> dict[str, str]:
    """Graphs of a family, with the row of its table that each is a part of."""
    from tunekit import families

    facts = families.get(family).facts
    found = {row.name: row.name for row in (*facts.encoders, facts.denoiser)}
    return {**found, "vae_encoder": "vae", "vae_decoder": "vae"}


def component(family: str, graph: str, weights: Path | None) -> Any:
    """A graph's module: its own weights from disk in fp32, and nothing of the other components but shapes."""
    from tunekit import families
    from tunekit.families import tiny

    made, own = families.get(family), names(family)[graph]
    parts: dict[str, Any] = {"config": SimpleNamespace()}
    for row in made.facts.components:
        part = row.build()
        if row.name == own and weights is not None:
            part = type(part).from_pretrained(weights).float().eval()
        parts[row.name] = part
        if row.tokenizer:
            parts[row.tokenizer] = tiny.clip_tokenizer(max_length=row.tokens)
    exported = {one.name: one for one in made.export_components(SimpleNamespace(**parts))}
    return exported[graph]


def write(family: str, graph: str, folder: Path) -> dict[str, Any]:
    """Writes the weights of one component."""
    from safetensors.torch import save_file

    from tunekit import families

    row = next(r for r in families.get(family).facts.components if r.name == names(family)[graph])
    part, place = row.build(), folder / "weights"
    place.mkdir(parents=True, exist_ok=True)
    part.config.save_pretrained(place) if row.tokenizer else part.save_config(place)
    stem = "model" if row.tokenizer else "diffusion_pytorch_model"
    return {"bytes": write_shards(part.state_dict(), place, stem, save_file)}


def export(family: str, graph: str, folder: Path) -> dict[str, Any]:
    """Exports it."""
    from tunekit.artifacts import directory_size
    from tunekit.passes.export_onnx import export_component, graph_config

    made, target = component(family, graph, folder / "weights"), folder / "fp32" / graph
    nodes = export_component(made, target)
    (target / "config.json").write_text(json.dumps(graph_config(made)))
    return {"nodes": nodes, "bytes": directory_size(target)}


def compare(family: str, graph: str, folder: Path) -> dict[str, Any]:
    """Runs it in torch, lets that go, and runs the graph."""
    from tunekit.passes.export_onnx import as_tuple, check_inputs, graph_error

    made = component(family, graph, folder / "weights")
    side = SIDE if graph == "vae_encoder" else SIDE // 8
    inputs = {
        name: value[:1, ..., :side, :side] if value.ndim == 4 else value[:1]
        for name, value in check_inputs(made).items()
    }
    with torch.no_grad():
        expected = as_tuple(made.module(*inputs.values()))
    del made
    gc.collect()
    return {"relative_error": graph_error(folder / "fp32" / graph / "model.onnx", inputs, expected)}


def quantize(family: str, graph: str, folder: Path) -> dict[str, Any]:
    """Writes it in int8, or float16."""
    from tunekit import families
    from tunekit.passes.onnx_int8 import Graph
    from tunekit.passes.paths import under
    from tunekit.runtime.onnx_files import weight_bytes

    facts, target = families.get(family).facts, folder / "int8" / graph
    made = Graph(folder / "fp32" / graph / "model.onnx")
    layers, computed = made.layers(), 0
    if graph == facts.denoiser_name:
        paths = [layer.path.removeprefix(f"{graph}.") for layer in layers]
        kept = [
            layer
            for layer, path in zip(layers, paths, strict=True)
            if under(path, facts.denoiser.sensitive, paths)
        ]
        made.halve(kept)
        computed = made.compute_dynamic([layer for layer in layers if layer not in kept])
    else:
        made.halve(layers)
    made.save(target / "model.onnx")
    return {"layers": len(layers), "computed": computed, "bytes": weight_bytes(target / "model.onnx")}


def call(family: str, graph: str, folder: Path) -> dict[str, Any]:
    """Runs both graphs once, one after the other."""
    import numpy as np

    from tunekit.diffusion.metrics import relative_error
    from tunekit.runtime.onnx import OrtGraph

    made = component(family, graph, None)
    inputs = {name: value.numpy() for name, value in _example(made).items()}
    cpu: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
    found, seconds = {}, {}
    for kind in ("fp32", "int8"):
        opened = OrtGraph(folder / kind / graph / "model.onnx", cpu, None)
        feeds = {name: inputs[name].astype(opened.inputs[name][0]) for name in opened.inputs}
        started = time.perf_counter()
        outputs = opened.run(feeds)
        seconds[kind] = round(time.perf_counter() - started, 2)
        found[kind] = [torch.from_numpy(np.asarray(value, np.float32)) for value in outputs.values()]
        del opened
        gc.collect()
    errors = [relative_error(a, b) for a, b in zip(found["int8"], found["fp32"], strict=True)]
    return {"call_seconds": seconds, "relative_error": max(errors)}


def _example(made: Any) -> dict[str, torch.Tensor]:
    """The inputs that it was exported with, as numbers; two rows, or those that stand for all."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=draw)
        if value.is_floating_point() and value.ndim > 1
        else torch.zeros(value.shape, dtype=value.dtype) + (10 if value.is_floating_point() else 1)
        for name, value in made.inputs.items()
    }


def main() -> None:
    """Runs the stages, each in a process of its own, and writes down what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for all that is made")
    parser.add_argument("family", choices=("sd15", "sd2", "sdxl"))
    parser.add_argument("graphs", nargs="*", help="components; default: all")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in order")
    parser.add_argument("--keep", action="store_true", help="leave what is written")
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve() / arguments.family
    if arguments.inside:
        stage, (graph,) = globals()[arguments.inside], arguments.graphs
        started = time.perf_counter()
        found = stage(arguments.family, graph, work / graph)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak, **found}))
        return
    known = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    known["machine"] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for graph in arguments.graphs or names(arguments.family):
        try:
            for stage in arguments.stages:
                command = [sys.executable, __file__, str(arguments.work), arguments.family, graph]
                done = subprocess.run(
                    [*command, "--inside", stage], stdout=subprocess.PIPE, text=True, check=True
                )
                row = json.loads(done.stdout.splitlines()[-1])
                known.setdefault(arguments.family, {}).setdefault(graph, {})[stage] = row
                print(graph, stage, json.dumps(row), flush=True)
        finally:
            if not arguments.keep:
                shutil.rmtree(work / graph, ignore_errors=True)
        rows = [
            row for one in known[arguments.family].values() if isinstance(one, dict) for row in one.values()
        ]
        known[arguments.family]["largest_peak_bytes"] = max(row["peak_bytes"] for row in rows)
        TARGET.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
