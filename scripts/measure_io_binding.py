#!/usr/bin/env python3
"""What binding inputs and outputs is worth in ONNX Runtime on the CPU: a denoiser's calls, in turns.

    .venv/bin/python scripts/measure_io_binding.py runs/quickstart/*/unet/model.onnx

Each graph is given two rows of noise, in one thread. Bound, its inputs and its output lie where they lay in
the call before, and nothing is made or copied around it. Processor time; the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort
from measuring import median_ratio

SIZES = {"batch": 2, "height": 16, "width": 16, "sequence": 77}


def measure(path: Path, rounds: int) -> str:
    """One graph, both ways."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    draw, feeds = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else SIZES[size] for size in value.shape]
        feeds[value.name] = draw.standard_normal(shape).astype(np.float32)
    wanted = session.run(None, feeds)[0]
    made, binding = np.empty_like(wanted), session.io_binding()
    for name, fed in feeds.items():
        binding.bind_input(name, "cpu", 0, fed.dtype, fed.shape, fed.ctypes.data)
    output = session.get_outputs()[0].name
    binding.bind_output(output, "cpu", 0, made.dtype, made.shape, made.ctypes.data)
    ways: list[Callable[[], object]] = [
        lambda: session.run(None, feeds),
        lambda: session.run_with_iobinding(binding),
    ]
    ways[1]()
    assert np.array_equal(made, wanted)
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for side in ((0, 1), (1, 0))[number % 2]:
            started = time.process_time()
            ways[side]()
            times[side].append((time.process_time() - started) * 1e3)
    plain, bound = times
    given = sum(fed.nbytes for fed in feeds.values())
    return (
        f"{path.parent.parent.name}/{path.parent.name}: {median(plain):.2f} ms, bound {median(bound):.2f} ms,"
        f" {median_ratio(bound, plain):.3f} x; {given / 1e3:.0f} kB go in, {made.nbytes / 1e3:.0f} come out"
    )


def main() -> None:
    """Measures each graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("graphs", nargs="+", type=Path, help="model.onnx of denoisers")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    for path in arguments.graphs:
        print(measure(path, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
