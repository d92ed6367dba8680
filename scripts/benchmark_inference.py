#!/usr/bin/env python3
"""Models side by side in one run, each in turn, every runtime and other programs among them.

    .venv/bin/python scripts/benchmark_inference.py WORK --models emoji
    .venv/bin/python scripts/benchmark_inference.py WORK --models unet142 --rounds 3
    .venv/bin/python scripts/benchmark_inference.py WORK --models sd15 --rounds 3      # idle machine
    .venv/bin/python scripts/benchmark_inference.py WORK --only "torch eager fp32" --only "tunekit cpu"

Models   emoji: the bundled one, whose pictures are compared with its own in torch and 30 steps
         unet142: a U-Net of 142 M parameters of Stable Diffusion's shape, random weights, at 256 px
         sd15: Stable Diffusion 1.5 at 256 px, random weights: speed alone
Peers    --python optimum=.venv-optimum/bin/python   another Python, in which a program is installed
         --site cyllama=FOLDER                       a folder of packages (pip install --target) before others
         optimum (optimum-onnx), optimum-intel and cyllama (stable-diffusion.cpp); who is not there is a line
Also     --also NAME=FOLDER: any artifact, such as a distilled one, drawn as it says itself (emoji)

One thread. Who is measured runs in a process of its own (contestants.py) and is asked in turns: a round gives
each some calls of its denoiser (a guidance pair) and a picture, and starts with another one. Processor time,
which other programs disturb least, and wall time; ratios are medians over the rounds, against torch eager
fp32 of the same round. Large models are opened anew in each turn, for they do not fit side by side. WORK
keeps what was made and every round: a run that was stopped goes on, and one that fails for a contestant goes
on with the others. Writes benchmarks/inference.json and benchmarks/inference.md; other models' figures stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).resolve().parent.parent
BASELINE = "torch eager fp32"
CALIBRATION = ("a dog", "a smiling face", "a house", "a green apple", "a bus", "a flower")
PROMPTS = ("cat face", "house", "banana", "airplane", "crying face", "blue book", "tiger", "pizza")
"""Of the bundled model's names; no range was measured on them."""
SEED = 700
FAMILY = "sd15"
PACKAGES = ("torch", "diffusers", "onnxruntime", "openvino", "nncf")
BF16 = {"export_openvino": {"precision": "bf16"}}
HEAD = """Made by `scripts/benchmark_inference.py`: one thread, each contestant in a process of its own, asked
in turns. Medians of processor time, and how many times faster than torch eager fp32 of the same round (in
wall time in brackets). A step is one call of the denoiser on a guidance pair. PSNR is of whole pictures
against those of torch in fp32, mean and worst; the runtime's column says in how many steps."""
SENSITIVE = ["conv_in", "conv_out", "time_embedding"]


@dataclass(frozen=True)
class Model:
    """What is run.

    Attributes:
        title: in the table.
        pixels: of both sides.
        steps: of a picture.
        pictures: whether whole pictures are drawn and compared.
        together: all contestants fit in memory side by side.
        calls: of the denoiser, in each turn.
        quantize: settings of tunekit's pass; layers of random weights are not worth a measurement.
    """

    title: str
    pixels: int
    steps: int = 30
    guidance: float = 4.0
    pictures: bool = False
    together: bool = True
    calls: int = 4
    quantize: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "emoji": Model("builtin/emoji-64, 64 px", 64, pictures=True),
    "unet142": Model(
        "U-Net of 142 M parameters, random weights, 256 px", 256, steps=4, calls=2,
        quantize={"keep": SENSITIVE, "samples": 8},
    ),
    "sd15": Model(
        "Stable Diffusion 1.5, random weights, 256 px", 256, steps=2, together=False, calls=1,
        quantize={"keep": SENSITIVE, "samples": 4},
    ),
}  # fmt: skip


def contestants(model: Model, name: str, also: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Who is measured, by name, and what each is told besides what all are."""
    quantize = {"quantize": dict(model.quantize)}
    found: dict[str, dict[str, Any]] = {
        BASELINE: {"kind": "tunekit", "dtype": "fp32"},
        "torch eager bf16": {"kind": "tunekit", "dtype": "bf16"},
        "torch.compile fp32": {"kind": "tunekit", "dtype": "fp32", "compile": True},
        "torch.compile bf16": {"kind": "tunekit", "dtype": "bf16", "compile": True},
        "ONNX Runtime fp32": {"kind": "tunekit", "chain": ["export_onnx"], "provider": "cpu"},
        "tunekit cpu": {"kind": "tunekit", "chain": ["export_onnx", quantize], "provider": "cpu"},
        "tunekit openvino": {"kind": "tunekit", "chain": [BF16]},
    }
    if model.pictures:
        tune = {"tune_sampler": {"keep": {"psnr": 30}}}
        found |= {
            "tunekit cpu, fewer steps": {
                "kind": "tunekit", "chain": [tune, "export_onnx", quantize], "provider": "cpu", "own": True,
            },
            "tunekit openvino, fewer steps": {"kind": "tunekit", "chain": [tune, BF16], "own": True},
        }  # fmt: skip
    hybrid = {"quantize_openvino": {"method": "hybrid", "samples": model.quantize.get("samples", 32)}}
    found |= {
        "tunekit openvino, hybrid (nncf)": {"kind": "tunekit", "chain": [BF16, hybrid]},
        "nncf PTQ": {"kind": "nncf", "chain": ["export_openvino"]},
        "optimum (ONNX Runtime)": {"kind": "optimum"},
        "optimum-intel": {"kind": "optimum_intel"},
        "optimum-intel, hybrid": {"kind": "optimum_intel", "hybrid": True},
    }
    if name == "sd15":
        found |= {
            f"stable-diffusion.cpp {kind.lower()}": {"kind": "cyllama", "type": kind}
            for kind in ("F16", "Q8_0")
        }
    if model.pictures:
        found |= {title: {"kind": "tunekit", "of": folder, "own": True} for title, folder in also.items()}
    return found


# Processes -------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A contestant that cannot be measured, and why."""


class Worker:
    """A contestant's process."""

    def __init__(self, told: Mapping[str, Any], python: str, site: str | None, log: Path) -> None:
        own = "" if told["kind"].startswith("optimum") else str(ROOT)
        path = os.pathsep.join(filter(None, [site, own, os.environ.get("PYTHONPATH") if own else None]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(log.parent / "inductor")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a", encoding="utf-8")
        script = str(Path(__file__).parent / "contestants.py")
        self._process = subprocess.Popen(
            [python, script, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, seconds: float, **request: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            Failed: it says no, ends, or is silent for so long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed("its process has ended") from None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise Failed(f"no answer to {request['do']} within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"its process ended in {request['do']} ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe:
                pipe.close()


# A model ---------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A contestant, and what is known of it; kept in a file beside what it has made.

    Attributes:
        name: in the table.
        told: what its process is told.
        found: `title`, `size_bytes`, `made`, `rounds` (each `step` and `picture`, of `cpu_ms`, `wall_ms`),
            `psnr_db`, `psnr_db_worst`; `missing`, why it is not measured.
    """

    name: str
    told: dict[str, Any]
    python: str
    site: str | None
    file: Path
    found: dict[str, Any] = field(default_factory=dict)
    worker: Worker | None = None

    def make(self, patience: float) -> None:
        """Has what it runs on disk; in a process of its own, for that takes most memory."""
        if "made" in self.found and "size_bytes" in self.found:
            return
        print(f"  making: {self.name}", flush=True)
        maker = self._process()
        try:
            made = maker.ask(patience, do="make")
        finally:
            maker.close()
        self.found |= {"made": made["folder"], "size_bytes": made["size_bytes"]}
        self.save()

    def start(self, patience: float) -> Worker:
        """Its process, opened."""
        if self.worker is None:
            self.told["made"] = self.found["made"]
            self.worker = self._process()
            self.found["title"] = self.worker.ask(patience, do="open")["title"]
        return self.worker

    def _process(self) -> Worker:
        return Worker(self.told, self.python, self.site, self.file.with_suffix(".log"))

    def stop(self) -> None:
        """Ends its process."""
        if self.worker:
            self.worker.close()
            self.worker = None

    def fail(self, why: str) -> None:
        """Notes why it is not measured."""
        print(f"  {self.name}: {why}", flush=True)
        self.stop()
        self.found["missing"] = why
        self.save()

    def save(self) -> None:
        """Keeps what is known."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


def sides(name: str, work: Path, options: argparse.Namespace) -> list[Side]:
    """All contestants of a model."""
    model, folder = MODELS[name], work / name
    pythons, sites = (dict(one.split("=", 1) for one in given) for given in (options.python, options.site))
    also = dict(one.split("=", 1) for one in options.also)
    shared = {
        "source": str(_source(name, folder)),
        "single_file": str(folder / "source" / "single.safetensors"),
        "family": FAMILY,
        "height": model.pixels,
        "width": model.pixels,
        "steps": model.steps,
        "guidance": model.guidance,
        "seed": SEED,
        "calibration": list(CALIBRATION),
        "latents": str(folder / "latents.npy"),
        "step": str(folder / "step.npz"),
    }
    made = []
    for title, own in contestants(model, name, also).items():
        if options.only and title not in options.only and title != BASELINE:
            continue
        slug = re.sub(r"\W+", "-", title.lower()).strip("-")
        # Chains share steps; how a step's model is drawn is that of the chain that ran last.
        chains = "chains-own" if own.get("own") else "chains"
        place = folder / (chains if own["kind"] in ("tunekit", "nncf") else slug)
        program = own["kind"].replace("_", "-")
        side = Side(
            title,
            {**shared, **own, "folder": str(place)},
            pythons.get(program, sys.executable),
            sites.get(program),
            folder / "found" / f"{slug}.json",
        )
        if side.file.is_file():
            side.found = json.loads(side.file.read_text(encoding="utf-8"))
            for key in ("missing", *(("rounds", "psnr_db", "psnr_db_worst") if options.again else ())):
                side.found.pop(key, None)
            if options.again:
                side.file.with_suffix(".npy").unlink(missing_ok=True)
        if "of" in own:
            side.told["source"] = own["of"]
        made.append(side)
    return made


def _source(name: str, folder: Path) -> Path:
    """The model in torch, and the inputs of a step; made once."""
    import torch

    from tunekit import families
    from tunekit.artifacts import open_artifact
    from tunekit.diffusion.sampling import initial_latents

    there = folder / "source"
    if name == "emoji":
        there = Path(open_artifact("builtin/emoji-64", family=FAMILY).source)
    elif not (there / "model_index.json").is_file():
        if name == "unet142":
            families.get(FAMILY).save(_unet142(), there)
        else:
            import measuring

            measuring.write_random(FAMILY, "StableDiffusionPipeline", there)
    if name == "sd15" and not (there / "single.safetensors").is_file():
        _single_file(there)
    if not (folder / "step.npz").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((there / "unet" / "config.json").read_text(encoding="utf-8"))
        scale = 2 ** (len(json.loads((there / "vae/config.json").read_text())["block_out_channels"]) - 1)
        side = MODELS[name].pixels // scale
        noise = initial_latents(range(SEED, SEED + len(PROMPTS)), (config["in_channels"], side, side))
        np.save(folder / "latents.npy", noise.numpy())
        length = json.loads((there / "text_encoder/config.json").read_text())["max_position_embeddings"]
        states = torch.randn(
            (2, length, config["cross_attention_dim"]), generator=torch.Generator().manual_seed(0)
        )
        np.savez(
            folder / "step.npz",
            latents=noise[:2].numpy(),
            states=states.numpy(),
            timestep=np.array([500, 500], dtype=np.int64),
        )
    return there


def _unet142() -> Any:
    """Stable Diffusion's U-Net with fewer channels; text encoder and VAE small, for they are not measured."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from tunekit.families import tiny

    torch.manual_seed(0)
    tokenizer = tiny.clip_tokenizer(max_length=77)
    return StableDiffusionPipeline(
        vae=tiny.autoencoder(
            4, 0,
            block_out_channels=(16, 16, 32, 32), down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=8, use_quant_conv=True,
            use_post_quant_conv=True, shift_factor=None,
        ),
        text_encoder=tiny.clip_text_encoder(tokenizer, width=768, heads=12),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=32, block_out_channels=(128, 256, 512, 512), cross_attention_dim=768
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _single_file(folder: Path) -> None:
    """All of it in a file with the names of the original code, which stable-diffusion.cpp reads."""
    import torch

    from tunekit import families
    from tunekit.families.single_file import save_single_file
    from tunekit.resources import Source

    family = families.get(FAMILY)
    pipeline = family.load(Source(str(folder)), torch.float16)
    dtypes = {part.name: torch.float16 for part in family.facts.components if part.role != "scheduler"}
    save_single_file(pipeline, folder / "single.safetensors", family.facts, dtypes)


def measure(name: str, everyone: Sequence[Side], rounds: int, patience: float) -> None:
    """Fills what is missing of all rounds, each contestant in its turn, then compares pictures."""
    model = MODELS[name]
    for side in everyone:
        try:
            side.make(patience)
        except Failed as failed:
            side.fail(str(failed))
    for number in range(rounds):
        shift = number % len(everyone)
        for side in [*everyone[shift:], *everyone[:shift]]:
            done = side.found.setdefault("rounds", [])
            if "missing" in side.found or len(done) > number:
                continue
            try:
                worker = side.start(patience)
                if not done and model.pictures:
                    worker.ask(patience, do="picture", prompt=PROMPTS[-1], number=0)  # warms up
                found = {"step": worker.ask(patience, do="step", calls=model.calls)}
                if model.pictures:
                    one = number % len(PROMPTS)
                    found["picture"] = worker.ask(patience, do="picture", prompt=PROMPTS[one], number=one)
            except Failed as failed:
                side.fail(str(failed))
                continue
            done.append(found)
            side.save()
            cpu = statistics.median(found["step"]["cpu_ms"])
            print(f"  round {number + 1}, {side.name}: {cpu:.1f} ms a step", flush=True)
            if not model.together:
                side.stop()
    if model.pictures:
        _compare(everyone, patience)
    for side in everyone:
        side.stop()


def _compare(everyone: Sequence[Side], patience: float) -> None:
    """Pictures of each against those of the baseline."""
    import measuring
    import torch

    wanted: torch.Tensor | None = None
    for side in everyone:
        if "missing" in side.found:
            continue
        out = side.file.with_suffix(".npy")
        try:
            if not out.is_file():
                side.start(patience).ask(patience, do="draw", prompts=PROMPTS, out=str(out))
        except Failed as failed:
            side.fail(str(failed))
            continue
        drawn = torch.from_numpy(np.load(out).astype(np.float32)).permute(0, 3, 1, 2)
        if wanted is None:
            wanted = drawn  # the baseline is the first
            continue
        mean, worst = measuring.fidelity(drawn, wanted)
        side.found |= {"psnr_db": mean, "psnr_db_worst": worst}
        side.save()


# Tables ----------------------------------------------------------------------------------------------------


def rows(everyone: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each contestant.

    Args:
        everyone: what was found of each, by name, the baseline first; see `Side.found`.

    Returns:
        `name`, and either `missing` or `title`, `size_bytes`, `rounds`, and for `step` and `picture` where
        they were measured `<what>_cpu_ms` and `<what>_wall_ms`, medians of the rounds, and `<what>_faster`,
        against the baseline in processor time, and `<what>_faster_wall`.
    """
    import measuring

    base = everyone[BASELINE].get("rounds", [])
    made: list[dict[str, Any]] = []
    for name, found in everyone.items():
        if "missing" in found or not found.get("rounds"):
            made.append({"name": name, "missing": found.get("missing", "not measured yet")})
            continue
        row: dict[str, Any] = {"name": name, "title": found["title"], "size_bytes": found["size_bytes"]}
        row["rounds"] = len(found["rounds"])
        shared = min(len(base), len(found["rounds"]))
        for what in ("step", "picture"):
            if what not in found["rounds"][0]:
                continue
            for clock, suffix in (("cpu_ms", ""), ("wall_ms", "_wall")):
                own = [_middle(one[what][clock]) for one in found["rounds"]]
                row[f"{what}_{clock}"] = round(statistics.median(own), 2)
                other = [_middle(one[what][clock]) for one in base[:shared]]
                if other:
                    ratio = measuring.median_ratio(own[:shared], other)
                    row[f"{what}_faster{suffix}"] = round(ratio, 2)
        row |= {key: round(found[key], 1) for key in ("psnr_db", "psnr_db_worst") if key in found}
        made.append(row)
    return made


def _middle(times: float | list[float]) -> float:
    return statistics.median(times) if isinstance(times, list) else times


def markdown(content: Mapping[str, Any]) -> str:
    """benchmarks/inference.md, of what inference.json holds."""
    lines = ["# Inference, side by side", "", *HEAD.splitlines()]
    for entry in content["models"].values():
        about = ", ".join(f"{name} {value}" for name, value in entry["machine"].items())
        lines += ["", f"## {entry['title']}", "", f"{about}.", ""]
        measured = [row for row in entry["rows"] if "missing" not in row]
        pictures = any("picture_cpu_ms" in row for row in measured)
        head = ["", "runtime", "step", "faster", *(["picture", "faster", "PSNR"] if pictures else []), "size"]
        lines += [_line(head), _line(["---"] * len(head))]
        for row in measured:
            cells = [row["name"], row["title"], *_speed(row, "step")]
            if pictures:
                cells += _speed(row, "picture")
                known = "psnr_db" in row
                cells.append(f"{row['psnr_db']:.1f} ({row['psnr_db_worst']:.1f}) dB" if known else "")
            lines.append(_line([*cells, f"{row['size_bytes'] / 1e6:.1f} MB"]))
        if missing := [row for row in entry["rows"] if "missing" in row]:
            lines += ["", "Not measured:", ""]
            lines += [f"- {row['name']}: {row['missing']}" for row in missing]
    return "\n".join(lines) + "\n"


def _speed(row: Mapping[str, Any], what: str) -> list[str]:
    if f"{what}_cpu_ms" not in row:
        return ["", ""]
    faster = row.get(f"{what}_faster"), row.get(f"{what}_faster_wall")
    told = f"{faster[0]:.2f} x ({faster[1]:.2f})" if None not in faster else ""
    return [f"{row[f'{what}_cpu_ms']:,.1f} ms", told]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures what is asked for, writes the figures, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default="emoji", help=f"of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", action="append", default=[], help="contestants by name; the baseline always"
    )
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--site", action="append", default=[], metavar="PEER=FOLDER")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--again", action="store_true", help="measure anew; what was made stays")
    parser.add_argument("--patience", type=float, default=1800, help="seconds that an answer may take")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "inference.json")
    options = parser.parse_args()
    import measuring

    names = options.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    content: dict[str, Any] = {"version": 1, "models": {}}
    if options.out.is_file():
        content = json.loads(options.out.read_text(encoding="utf-8"))
    for name in names:
        began = time.perf_counter()
        print(MODELS[name].title, flush=True)
        everyone = sides(name, options.work.resolve(), options)
        try:
            measure(name, everyone, options.rounds, options.patience)
        finally:
            for side in everyone:
                side.stop()
        content["models"][name] = {
            "title": MODELS[name].title,
            "machine": {**measuring.machine(*PACKAGES), "load": round(os.getloadavg()[0], 1)},
            "seconds": round(time.perf_counter() - began),
            "rows": rows({side.name: side.found for side in everyone}),
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        text = markdown(content)
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
