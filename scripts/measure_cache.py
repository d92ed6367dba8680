#!/usr/bin/env python
"""How much faster a picture is with cached steps, and how near it stays; one thread, processor time.

    scripts/measure_cache.py runs/quickstart/04-export_onnx-* [MORE FOLDERS]

The first folder's pictures are what those of the others are compared with, too.
"""

from __future__ import annotations

import argparse
import time

import torch

from tunekit.config import CacheConfig
from tunekit.diffusion.metrics import psnr_db
from tunekit.runtime import generate_pixels, open_runtime

PROMPTS = ("a red apple", "a house")
WAYS = ((0, 0), (2, 1), (3, 0), (3, 1), (5, 1), (6, 1), (8, 1))


def main(sources: list[str]) -> None:
    """Prints a line for each way."""
    torch.set_num_threads(1)
    first: dict[str, torch.Tensor] = {}
    for source in sources:
        runtime = open_runtime(source, device="cpu", threads=1)
        print(f"{source}: {runtime.title}, {runtime.sampling.steps} steps")
        own: torch.Tensor | None = None
        for interval, order in WAYS:
            cache = CacheConfig.model_validate({"interval": interval, "order": order}) if interval else None
            sampling = runtime.sampling.model_copy(update={"cache": cache})
            for _ in range(2):  # the first opens and warms up
                started = time.process_time()
                pixels = generate_pixels(runtime, PROMPTS, sampling, seeds=[1, 2], batch=1)
                milliseconds = (time.process_time() - started) * 1e3 / len(PROMPTS)
            name = f"whole every {interval}, order {order}" if interval else "every step whole"
            own = pixels if own is None else own
            near, other = psnr_db(pixels, own), psnr_db(pixels, first.setdefault(name, pixels))
            print(f"  {name}: {milliseconds:.0f} ms a picture, {near:.1f} dB; {other:.1f} dB from the first")
        runtime.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="FOLDER", help="a model of any format")
    main(parser.parse_args().sources)
