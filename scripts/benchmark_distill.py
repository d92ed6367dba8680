#!/usr/bin/env python3
"""Measure how well the bundled model draws in few calls: as it is, and distilled.

    python scripts/benchmark_distill.py train --steps 4            # in pieces: run it again, it goes on
    python scripts/benchmark_distill.py train --steps 2
    python scripts/benchmark_distill.py measure --json benchmarks/distill.json    # and distill.md
    python scripts/benchmark_distill.py --table                     # distill.md of what distill.json has

Pictures and names are those that `builtin/emoji-64` was trained on; `scripts/pretrain_emoji.py` gets them
from npm. Of 200 names (fixed seeds) each sampler and each student draws a picture from the same noise; it is
compared with the model's own 30 DDIM steps at guidance 4, and with all 1636 training pictures: the share
whose nearest picture, by distance of VAE latents, is the name's own. One call is one run of the network on
one picture, so that a step with guidance is two.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tunekit
from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import AdapterConfig, DataConfig, SamplingConfig
from tunekit.diffusion.metrics import psnr_db, ssim
from tunekit.passes.base import Context, run_chain
from tunekit.passes.distill import Distill
from tunekit.runtime import Runtime, generate_pixels, open_runtime, to_images

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_emoji

ROOT = Path(__file__).resolve().parent.parent
FILE, TABLE = ROOT / "benchmarks" / "distill.json", ROOT / "benchmarks" / "distill.md"
FAMILY, BASE = "sd15", "builtin/emoji-64"
TEACHER = SamplingConfig(steps=30, guidance=4.0, height=64, width=64)
NAMES, SEED, BATCH = 200, 1000, 20
DDIM = {"class": "DDIMScheduler", "timestep_spacing": "trailing"}
DPM = {"class": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
PLAIN: tuple[tuple[str, int, float, dict[str, Any] | None], ...] = tuple(
    (title, steps, guidance, scheduler)
    for calls in (8, 4, 2)
    for title, steps, guidance, scheduler in (
        ("DDIM", calls // 2, 4.0, None),
        ("DDIM, trailing", calls // 2, 4.0, DDIM),
        ("DPM++ 2M, trailing", calls // 2, 4.0, DPM),
        ("LCM's sampler", calls, 1.0, {"class": "LCMScheduler"}),
    )
)
"""Title, steps, guidance and sampler of the model as it is."""


HEAD = """# Few calls of `builtin/emoji-64`

{date}, {device}, {versions}. By

    python scripts/benchmark_distill.py train --method pcm --steps 4 --max-steps 400 --solver-steps 16 --lr 3e-4 --ema 0.9
    python scripts/benchmark_distill.py train --method pcm --steps 2 --max-steps 400 --solver-steps 8 --lr 3e-4 --ema 0.9
    python scripts/benchmark_distill.py train --method pcm --steps 2 --max-steps 300 --solver-steps 16 --lr 2e-4 --ema 0.95
    python scripts/benchmark_distill.py measure --json benchmarks/distill.json

{names} names, each against the model's own 30 steps at guidance 4 from the same noise: mean PSNR in dB (the worst picture), SSIM, and the share of pictures
whose nearest of all 1,636 training pictures is the name's own. LPIPS was not measured: no weights were at hand. Other jobs ran on the machine
meanwhile, which the times of training tell.
"""  # noqa: E501
COLUMNS = ("", "steps", "guidance", "calls", "PSNR", "SSIM", "own picture", "training")
NOTES = """
- A student of 4 calls is 5 dB nearer to its teacher than the model's own sampler in 8, and one of 2 calls 8 to 11 dB nearer than that in 4.
- **The model needs no student**: latent consistency's sampler without guidance, on the model as it is, is nearer still. This model knows its
  pictures by heart and draws a name alike from any noise (other seeds give 48 dB), so its first prediction is nearly the picture. On a model
  trained to another style it was not so (25 dB in 4 steps at guidance 1.5). `tune_sampler` tries it before anything is trained.
- The two students of 2 steps differ in solver's steps, rate and EMA; which of these made 3 dB was not taken apart.
"""  # noqa: E501
"""What somebody saw in the table; whoever measures anew looks whether it still holds."""


def table(report: dict[str, Any]) -> str:
    """benchmarks/distill.md of benchmarks/distill.json."""
    versions = ", ".join(f"{name} {own}" for name, own in report["versions"].items() if name != "tunekit")
    head = HEAD.format(**{**report, "versions": versions})
    lines = [f"| {' | '.join(COLUMNS)} |".replace("|  |", "| |", 1), "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        cells = [row["title"], f"{row['steps']}", f"{row['guidance']:g}", f"{row['calls']}"]
        cells += [f"{row['psnr_db']:.1f} ({row['psnr_db_worst']:.1f})", f"{row['ssim']:.3f}"]
        cells += [f"{row['nearest_share']:.1%}".replace("%", " %"), training(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *lines]) + "\n" + NOTES


def training(row: dict[str, Any]) -> str:
    """How a student was made, in words; "" for a model as it is."""
    if "settings" not in row:
        return ""
    told, rank = row["settings"], (row["adapter"] or {}).get("rank")
    return (
        f"{told['max_steps']} steps of batch {told['batch_size']}, lr {told['lr']:g}, {told['solver_steps']}"
        f" solver's steps, EMA {told['ema']:g}, {f'rank {rank}' if rank else 'all weights'}:"
        f" {row['training_seconds'] / 60:.0f} min"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("train", "measure"), nargs="?")
    parser.add_argument("--table", action="store_true", help="write benchmarks/distill.md anew, and no more")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-distill"))
    parser.add_argument("--data", type=Path, help="tarball or folder of the npm package")
    parser.add_argument("--method", default="pcm", choices=("pcm", "lcm"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--solver-steps", type=int, default=16)
    parser.add_argument("--ema", type=float, default=0.95)
    parser.add_argument("--rank", type=int, default=0, help="of an adapter; 0 trains all weights")
    parser.add_argument("--names", type=int, default=NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="writes a sheet of pictures")
    options = parser.parse_args()
    if options.table:
        TABLE.write_text(table(json.loads(FILE.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if options.what is None:
        parser.error("say train, measure or --table")
    pretrain_emoji.run_data(options)
    torch.set_num_threads(int(torch.get_num_threads()))
    if options.what == "train":
        _train(options)
    else:
        _measure(options)


def _train(options: argparse.Namespace) -> None:
    """One student; a piece of work that was killed goes on."""
    folder = options.work / "pictures"
    if not (folder / "complete").exists():
        pixels, names = pretrain_emoji.load_data(options.work)
        folder.mkdir(exist_ok=True)
        seen = set()
        for number, (row, name) in enumerate(zip(pixels, names, strict=True)):
            if (content := row.numpy().tobytes()) in seen:
                continue  # one picture may be told once
            seen.add(content)
            to_images(((row + 1) / 2)[None])[0].save(folder / f"{number:04d}.png")
            (folder / f"{number:04d}.txt").write_text(name, encoding="utf-8")
        (folder / "complete").touch()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    targets += ["conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_out"]
    step = Distill(
        method=options.method,
        steps=options.steps,
        solver_steps=options.solver_steps,
        max_steps=options.max_steps,
        batch_size=options.batch,
        lr=options.lr,
        ema=options.ema,
        adapter=AdapterConfig(rank=options.rank, alpha=options.rank, targets=targets)
        if options.rank
        else None,
        checkpoint_every=20,
    )
    context = Context(
        run_dir=options.work / "runs",
        device="cpu",
        sampling=TEACHER,
        data=DataConfig(path=str(folder), resolution=64, cache=str(options.work / "cache")),
        say=lambda line: print(line, flush=True),
    )
    run_chain([step], open_artifact(BASE, family=FAMILY), context)


def _measure(options: argparse.Namespace) -> None:
    """All of it."""
    pixels, captions = pretrain_emoji.load_data(options.work)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = order[: options.names]
    names, seeds = [captions[index] for index in chosen], [SEED + index for index in chosen]
    torch.manual_seed(0)
    began = time.perf_counter()
    with _opened(open_artifact(BASE, family=FAMILY)) as runtime:
        vae = runtime.pipeline.vae
        known = pretrain_emoji.encode(vae, pixels).flatten(1)

        def nearest(drawn: Tensor) -> float:
            found = pretrain_emoji.encode(vae, drawn * 2 - 1).flatten(1)
            return float((torch.cdist(found, known).argmin(1) == torch.tensor(chosen)).double().mean())

        def drawn(runtime: Runtime, sampling: SamplingConfig, kept: Path | None = None) -> Tensor:
            if kept and kept.exists():
                return torch.load(kept, weights_only=True)
            made = generate_pixels(runtime, names, sampling, seeds=seeds, batch=BATCH)
            if kept:
                torch.save(made, kept)
            return made

        wanted = drawn(runtime, TEACHER, options.work / f"teacher-{len(names)}.pt")
        rows, sheet = [], [wanted[:16]]

        def note(title: str, sampling: SamplingConfig, calls: int, made: Tensor) -> None:
            values = [psnr_db(one, other) for one, other in zip(made, wanted, strict=True)]
            likeness = [ssim(one[None], other[None]) for one, other in zip(made, wanted, strict=True)]
            row = {
                "title": title,
                "steps": sampling.steps,
                "guidance": sampling.guidance,
                "calls": calls,
                "psnr_db": round(sum(values) / len(values), 2),
                "psnr_db_worst": round(min(values), 2),
                "ssim": round(sum(likeness) / len(likeness), 4),
                "nearest_share": round(nearest(made), 3),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)

        note("DDIM (the teacher)", TEACHER, 60, wanted)
        for title, steps, guidance, scheduler in PLAIN:
            sampling = SamplingConfig(steps=steps, guidance=guidance, scheduler=scheduler).over(TEACHER)
            calls = steps * (2 if guidance > 1 else 1)
            made = drawn(runtime, sampling, options.work / f"plain-{len(names)}-{len(rows)}.pt")
            note(f"as it is: {title}", sampling, calls, made)
    for path in sorted((options.work / "runs").glob("*-distill-*/artifact.json")):
        student = Artifact.load(path.parent)
        settings = student.lineage[-1].settings
        own = (student.sampling or SamplingConfig()).over(TEACHER)
        kept = {
            key: settings[key] for key in ("method", "max_steps", "batch_size", "lr", "solver_steps", "ema")
        }
        with _opened(student) as runtime:
            counts = [own.steps] if settings["method"] == "pcm" else [1, 2, 4, 8]
            for steps in counts:
                sampling = own.model_copy(update={"steps": steps})
                made = drawn(runtime, sampling)
                assert steps is not None
                note(
                    f"distilled: {settings['method']}, made for {settings['steps']} steps",
                    sampling,
                    steps,
                    made,
                )
                seconds = round(student.lineage[-1].seconds)
                rows[-1].update(settings=kept, adapter=settings["adapter"], training_seconds=seconds)
                sheet.append(made[:16])
    if options.pictures:
        _sheet(sheet).save(options.pictures)
    if options.json:
        report = {
            "what": "few calls of builtin/emoji-64, as it is and distilled, against its own 30 steps",
            "date": datetime.now(UTC).date().isoformat(),
            "names": len(names),
            "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
            "versions": {
                "tunekit": tunekit.__version__,
                **{n: version(n) for n in ("torch", "diffusers", "peft")},
            },
            "measuring_seconds": round(time.perf_counter() - began),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.json.with_suffix(".md").write_text(table(report), encoding="utf-8")


def _opened(artifact: Artifact) -> Any:
    from contextlib import closing

    return closing(open_runtime(artifact, family=FAMILY, device="cpu"))


def _sheet(rows: list[Tensor]) -> Image.Image:
    """A row of pictures for each."""
    width, height = len(rows[0]) * 64, len(rows) * 64
    sheet = Image.new("RGB", (width, height), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(to_images(row)):
            sheet.paste(picture, (left * 64, top * 64))
    return sheet


if __name__ == "__main__":
    main()
