#!/usr/bin/env python3
"""How large the page of `tunekit compare` is for many pictures, and how long a browser takes to show it.

    python scripts/measure_compare.py --pictures 500 --browser chromium

Pictures of 512 x 512 with as much detail as photos have are made up; nothing is drawn by a model. The time is
that of a browser which starts, loads the page and saves what it shows, beside the same for an empty page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageChops

from tunekit.artifacts import Artifact
from tunekit.comparison import grid, page
from tunekit.comparison.contestants import Contestant, Entry
from tunekit.config import SamplingConfig

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
PROMPTS = tuple(f"prompt {number}" for number in range(10))
SIDE = 512


def picture(number: int) -> Image.Image:
    """Soft shapes with grain, another one for each number."""
    channels, smooth = [], Image.Resampling.BICUBIC
    for channel in range(3):
        shape = Image.effect_noise((8 + number % 5, 8 + channel), 90).resize((SIDE, SIDE), smooth)
        texture = Image.effect_noise((SIDE // 4, SIDE // 4), 24).resize((SIDE, SIDE), smooth)
        channels.append(ImageChops.add(shape, texture, scale=1.3))
    return Image.merge("RGB", channels)


def render(folder: Path, count: int) -> tuple[Path, float]:
    """A page of so many pictures, and the seconds that it took."""
    steps = -(-count // (len(PROMPTS) * len(STRENGTHS)))
    adapter = Artifact(None, None, "adapter", "sd15", "adapter", base="base")
    entries = [Entry("run", 100 * step, f"step {100 * step}", adapter) for step in range(1, steps + 1)]
    one = Contestant("run", "run", None, entries)
    wanted = grid.Wanted(prompts=PROMPTS, seeds=(0,), strengths=STRENGTHS)
    cells = []
    for entry in entries:
        for strength in STRENGTHS:
            for prompt, seed in wanted.shots:
                file = f"{grid.PICTURES}/{len(cells)}.png"
                (folder / file).parent.mkdir(exist_ok=True)
                picture(len(cells)).save(folder / file)
                cells.append(grid.Cell(entry, strength, prompt, seed, file, SamplingConfig(steps=30)))
    began = time.perf_counter()
    text = page.render([one], {}, grid.tables([one], wanted, cells), wanted, folder)
    seconds = time.perf_counter() - began
    made = folder / "compare.html"
    made.write_text(text, encoding="utf-8")
    return made, seconds


def shown(browser: str, made: Path) -> float:
    """The least seconds, of three, in which a browser starts, loads a page and saves what it shows."""
    shot = made.with_suffix(".png")
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=980,945",
        f"--screenshot={shot}",
    ]
    found = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([browser, *options, made.as_uri()], check=True, capture_output=True, timeout=300)
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=500, help="rounded up to whole steps, of 50 each")
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, seconds = render(folder, options.pictures)
        figures = {
            "pictures": len(list((folder / grid.PICTURES).iterdir())),
            "pictures_bytes": sum(path.stat().st_size for path in (folder / grid.PICTURES).iterdir()),
            "page_bytes": made.stat().st_size,
            "written_seconds": round(seconds, 1),
        }
        if shutil.which(options.browser):
            empty = folder / "empty.html"
            empty.write_text("<!doctype html><p>nothing")
            figures |= {
                "shown_seconds": round(shown(options.browser, made), 2),
                "shown_seconds_empty": round(shown(options.browser, empty), 2),
            }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
