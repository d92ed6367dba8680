#!/usr/bin/env python3
"""What int8 gains and costs on the CPU: benchmarks/quantize_cpu.json, and a table.

    .venv/bin/python scripts/measure_quantize.py runs/quickstart/01-merge-* WORK

The model is exported and quantized in several ways below WORK (what is there already is taken). Speed:
processor time of one call of the denoiser on one guidance pair, one thread, median of rounds in which every
way has its turn. Fidelity: PSNR of pictures drawn from prompts of the base, which no range was measured on,
against the model in floats with the same seeds.

    .venv/bin/python scripts/measure_quantize.py --torch runs/quickstart/01-merge-*

measures packed layers of torch instead, beside torchao's where that is installed, and writes
benchmarks/quantize_torch.json: relative error and processor time of the model, and of a block of SD 3.5
medium, with random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import DataConfig, SamplingConfig
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.runtime import generate_pixels, open_runtime

sys.path.insert(0, str(Path(__file__).parent))
import measuring

ROOT = Path(__file__).resolve().parent.parent
STYLE = ("red apple", "panda face", "hamburger", "rocket", "red heart", "soccer ball")
BASE = ("cat face", "house", "banana", "airplane", "crying face", "blue book", "tiger", "pizza")
"""Prompts of the base; the style's, with `, 3d style`, are what ranges are measured on."""
PARTS = ["unet", "vae_decoder", "vae_encoder"]
SENSITIVE = ["conv_in", "conv_out", "time_embedding"]
WAYS: dict[str, dict[str, Any]] = {
    "weight_only": {"mode": "weight_only", "components": PARTS},
    "scheme: int4": {"scheme": "int4"},
    "dynamic": {"mode": "dynamic"},
    "named layers in floats": {"keep": SENSITIVE},
    "named layers, mse": {"keep": SENSITIVE, "ranges": "mse"},
    "default": {},
    "keep: {share: 0.2}": {"keep": {"share": 0.2}},
    "target: openvino": {"target": "openvino"},
}
RUNS = (("default", "openvino"), ("target: openvino", "openvino"))
"""Ways that are measured in OpenVINO too."""
STEPS, GUIDANCE, ROUNDS = 20, 4.0, 15


def made(model: Path, work: Path) -> dict[str, Artifact]:
    """The model in floats and in each way, by name."""
    context = Context(
        run_dir=work,
        family="sd15",
        device="cpu",
        prompts=tuple(f"{name}, 3d style" for name in STYLE),
        sampling=SamplingConfig(steps=30, guidance=GUIDANCE),
        data=DataConfig(path="builtin/pictures/style", resolution=64),
    )
    start = open_artifact(model, family="sd15")
    found = {"torch fp32": start, "fp32": run_chain(parse_chain(["export_onnx"]), start, context)}
    for name, settings in WAYS.items():
        found[name] = run_chain(parse_chain([{"quantize": settings}]), found["fp32"], context)
    return found


def measure(models: dict[str, Artifact]) -> list[dict[str, Any]]:
    """A row per way and runtime."""
    sampling = SamplingConfig(steps=STEPS, guidance=GUIDANCE)
    seeds = list(range(len(BASE)))
    opened: dict[tuple[str, str], Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    wanted: torch.Tensor | None = None
    names = [
        *((name, "cpu" if artifact.format == "onnx" else "torch") for name, artifact in models.items()),
        ("fp32", "openvino"),
        *RUNS,
    ]
    for name, provider in names:
        runtime = open_runtime(
            models[name],
            family="sd15",
            device="cpu",
            provider=None if provider == "torch" else provider,
            threads=1,
        )
        pixels = generate_pixels(runtime, list(BASE), sampling, seeds=seeds)
        wanted = pixels if wanted is None else wanted
        mean, worst = measuring.fidelity(pixels, wanted)
        size = (2, *runtime.latent_shape(*runtime.default_size))
        conditioning = runtime.conditioning([BASE[0], ""], sampling.over(runtime.sampling))
        latents, steps = (
            torch.randn(size, generator=torch.Generator().manual_seed(0)),
            torch.tensor([500, 500]),
        )
        opened[name, provider] = lambda r=runtime, x=latents, t=steps, c=conditioning: r.denoise(x, t, c)
        rows.append(
            {
                "way": name,
                "runtime": runtime.title,
                "psnr_db": mean,
                "psnr_db_worst": worst,
                "size_bytes": models[name].size_bytes,
            }
        )
        print(f"{name} in {runtime.title}: {rows[-1]['psnr_db']:.1f} dB", flush=True)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in opened}
    for _ in range(ROUNDS):
        for key, call in opened.items():
            started = time.process_time()
            call()
            times[key].append(1000 * (time.process_time() - started))
    first = statistics.median(times[names[0]])
    for row, key in zip(rows, names, strict=True):
        row["denoiser_ms"] = statistics.median(times[key])
        row["faster"] = first / row["denoiser_ms"]
    return rows


PACKINGS = ("int8", "int8_dynamic", "int8_rotated", "fp8", "int4", "int4_svd", "nf4")


def torchao_ways() -> dict[str, Any]:
    """Settings of torchao by name; none where it is not installed."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return {}
    return {
        "torchao int8": ao.Int8WeightOnlyConfig(),
        "torchao int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
        "torchao int4": ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),
    }


def packed(network: torch.nn.Module, call: Callable[[torch.nn.Module], Any], keep: list[str]) -> list[Any]:
    """A row per packing of a network's layers, but for those that are kept, ours and torchao's.

    torchao packs matrix products alone; beside it, ours are measured with these alone, too.
    """
    from tunekit import layers
    from tunekit.diffusion.metrics import relative_error

    plain = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    products = {name for name in plain if not layers.under(name, network, keep)}
    made: dict[str, torch.nn.Module] = {"floats": network}
    for kind in PACKINGS:
        for suffix, only in (("", None), (", products alone", products)):
            if suffix and (not keep or kind not in ("int8", "int8_dynamic", "int4")):
                continue
            made[kind + suffix] = copy.deepcopy(network)
            layers.quantize(made[kind + suffix], kind, keep=keep, only=only)
    for name, settings in torchao_ways().items():
        from torchao.quantization import quantize_

        made[name] = copy.deepcopy(network)
        quantize_(made[name], settings, filter_fn=lambda _, path: path in products)
    wanted, rows = call(network), []
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS // 2):
        for name, model in made.items():
            started = time.process_time()
            call(model)
            times[name].append(1000 * (time.process_time() - started))
    for name, model in made.items():
        error = relative_error(call(model), wanted)
        row = {"way": name, "call_ms": statistics.median(times[name]), "relative_error": error}
        rows.append({**row, "bytes": stored(model)})
    return rows


def stored(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a model, within torchao's too."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        inner = getattr(tensor, "__tensor_flatten__", None)
        parts = [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]
        total += sum(part.nbytes for part in parts if part is not None)
    return total


def measure_torch(model: Path) -> None:
    """Measures packed layers, prints a table for each network and writes the record."""
    from diffusers.models.attention import JointTransformerBlock

    runtime = open_runtime(model, family="sd15", device="cpu", threads=1)
    sampling = SamplingConfig(steps=STEPS, guidance=GUIDANCE).over(runtime.sampling)
    told = runtime.conditioning([BASE[0], ""], sampling)
    drawn = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *runtime.latent_shape(*runtime.default_size), generator=drawn)

    def of_model(network: torch.nn.Module) -> torch.Tensor:
        runtime.pipeline.unet = network
        steps = (torch.tensor([at, at]) for at in (900, 300))
        return torch.cat([runtime.denoise(latents, step, told) for step in steps])

    torch.manual_seed(0)
    wide = JointTransformerBlock(1536, 24, 64).eval()
    tokens, text, times = (
        torch.randn(1, *size, generator=drawn) for size in ((256, 1536), (77, 1536), (1536,))
    )

    def of_block(block: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(block(tokens, text, times), dim=1)

    found = {
        "the model, two calls": packed(runtime.pipeline.unet, of_model, SENSITIVE),
        "a block of 1536, 333 tokens": packed(wide, of_block, []),
    }
    record = {**measuring.machine("torch", "torchao", "diffusers"), "rounds": ROUNDS // 2, "networks": found}
    (ROOT / "benchmarks" / "quantize_torch.json").write_text(json.dumps(record, indent=2) + "\n")
    for title, rows in found.items():
        print(f"\n| {title} | call | against floats | error | weights |")
        print("| --- | --- | --- | --- | --- |")
        for row in rows:
            faster = rows[0]["call_ms"] / row["call_ms"]
            print(
                f"| {row['way']} | {row['call_ms']:.1f} ms | {faster:.2f}x | {row['relative_error']:.4f} |"
                f" {row['bytes'] / 1e6:.1f} MB |"
            )


def main() -> None:
    """Measures, prints the table and writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--torch", action="store_true", help="packed layers of torch instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.torch:
        measure_torch(options.model)
        return
    if options.work is None:
        parser.error("say where models may be written (WORK)")
    models = made(options.model, options.work)
    rows = measure(models)
    found = measuring.machine("torch", "onnxruntime", "openvino", "onnx")
    record = {
        "date": found.pop("date"),
        "machine": platform.processor() or platform.machine(),
        "cpu": found.pop("device"),
        "versions": {name: value for name, value in found.items() if name != "threads"},
        "what": {"steps": STEPS, "guidance": GUIDANCE, "prompts": BASE, "rounds": ROUNDS, "threads": 1},
        "rows": rows,
    }
    target = ROOT / "benchmarks" / "quantize_cpu.json"
    target.write_text(json.dumps(record, indent=2) + "\n")
    print("\n| way | runtime | denoiser | against torch | PSNR mean (worst) | size |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['way']} | {row['runtime']} | {row['denoiser_ms']:.1f} ms | {row['faster']:.2f}x |"
            f" {row['psnr_db']:.1f} ({row['psnr_db_worst']:.1f}) dB | {row['size_bytes'] / 1e6:.1f} MB |"
        )


if __name__ == "__main__":
    main()
