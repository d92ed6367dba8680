#!/usr/bin/env python
"""How many trials a search takes: ours, and optuna's samplers, on combinations that were all measured before.

    scripts/measure_search.py record WORK     draws every combination on the bundled model, once: 4 min
    scripts/measure_search.py replay WORK     who finds the best in how many trials: 1 min; pip install optuna

A combination: how it is quantized, calls of the denoiser, cached steps. Its cost is processor
time of four pictures on one thread, its error that against the model in torch in its own 30 steps. A replay
looks combinations up, so that it costs nothing; samplers of optuna are told the same bound, as a constraint,
and their means are over ten seeds, or three. Writes benchmarks/search.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tunekit.artifacts import Artifact, open_artifact
from tunekit.config import CacheConfig, SamplingConfig
from tunekit.passes.base import Context, parse_chain, run_chain
from tunekit.passes.samplers import candidates
from tunekit.passes.tradeoff import GAIN, Found, Point, Rungs, Tradeoff
from tunekit.passes.tune_sampler import Pictures, _Search
from tunekit.runtime import open_runtime

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("red apple", "hamburger", "red heart", "cat face")
OWN = SamplingConfig(steps=30, guidance=4, negative_prompt="")
QUANTIZED: tuple[list[Any], ...] = ([], [{"quantize": {"keep": {"share": 0.2}}}], ["quantize"])
CALLS = (60, 32, 24, 16, 12, 10, 8, 7, 6, 5)
CACHED = (1, 2, 3)
AXES = (len(QUANTIZED), len(CALLS), len(CACHED))
LIMITS = (28.0, 33.0, 36.0)
SEEDS = {"TPE": 10, "GP": 3}
MOST = 24
"""Trials of a replay."""
Table = dict[Point, Found]


def models(work: Path) -> Iterator[tuple[int, Artifact]]:
    """Each chain of passes that change files."""
    context = Context(work / "models", device="cpu", prompts=PROMPTS, sampling=OWN)
    start = open_artifact("builtin/emoji-64", family="sd15")
    for number, quantized in enumerate(QUANTIZED):
        yield number, run_chain(parse_chain(["export_onnx", *quantized]), start, context)


def record(work: Path) -> None:
    """Draws; what was drawn before is not drawn again."""
    torch.set_num_threads(1)
    file = work / "search.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    known = {tuple(row["point"]) for row in rows}
    base = open_runtime("builtin/emoji-64", family="sd15", device="cpu")
    own = OWN.over(base.sampling)
    wanted = Pictures(base, own, PROMPTS, 700, len(PROMPTS))
    ways: list[SamplingConfig] | None = None
    for one, model in models(work):
        runtime = open_runtime(model, family="sd15", device="cpu", provider="cpu", threads=1)
        pictures = Pictures.__new__(Pictures)
        other = own.model_copy(update={"height": (own.height or 0) + 8})  # so that nothing counts as drawn
        pictures.__dict__.update(wanted.__dict__ | {"runtime": runtime, "own": other, "_told": {}})
        if ways is None:  # of the first, for all: how calls are shared out is no part of what is compared
            found, _ = candidates(runtime, own, ["ddim", "unipc"], None)
            search = _Search(pictures, 0.0, math.inf, lambda line: None)
            ways = [own, *(search.within(found, count, guidance=True).sampling for count in CALLS[1:])]
        pictures.compare(ways[-1])  # warms up
        for (two, way), (three, interval) in itertools.product(enumerate(ways), enumerate(CACHED)):
            if (one, two, three) in known:
                continue
            cache = CacheConfig(interval=interval, order=1) if interval > 1 else None
            started = time.process_time()
            near = pictures.compare(way.model_copy(update={"cache": cache}))
            seconds = time.process_time() - started
            rows.append({"point": [one, two, three], "psnr_db": near.mean, "ms": 1e3 * seconds})
        file.write_text(json.dumps(rows))
        print(model.path.name if model.path else "", flush=True)
        runtime.close()


def ours(table: Table, limit: float) -> list[Point]:
    """The order in which tunekit tries."""
    tried: list[Point] = []
    efforts = (1, 0, 0)
    rungs = [Rungs(axis, range(1, count), efforts[axis]) for axis, count in enumerate(AXES)]
    search = Tradeoff(AXES, {"psnr": limit}, rungs)
    while len(tried) < MOST and (point := search.next()) is not None:
        tried.append(point)
        search.known[point] = table[point]
    return tried


def optunas(table: Table, limit: float, name: str, seed: int) -> list[Point]:
    """The order in which a sampler of optuna tries; it begins where ours does, and repeats cost nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # optuna 5 has another way, and 4 has this one

    def missed(trial: Any) -> tuple[float]:
        return (trial.user_attrs["missed"],)

    made: Any = {"TPE": optuna.samplers.TPESampler, "GP": optuna.samplers.GPSampler}[name]
    sampler = made(seed=seed, constraints_func=missed)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({str(axis): 0 for axis in range(len(AXES))})
    tried: list[Point] = []

    def objective(trial: Any) -> float:
        point = tuple(trial.suggest_int(str(axis), 0, count - 1) for axis, count in enumerate(AXES))
        found = table[point]
        trial.set_user_attr("missed", math.log10(found.errors["psnr"] / limit))
        if point not in tried:
            tried.append(point)
        return math.log(found.cost)

    for _ in range(3 * MOST):
        study.optimize(objective, n_trials=1)
        if len(tried) >= MOST:
            break
    return tried


def replay(work: Path) -> None:
    """Compares, and writes what came out."""
    rows = json.loads((work / "search.json").read_text())
    table = {tuple(row["point"]): Found({"psnr": 10 ** (-row["psnr_db"] / 10)}, row["ms"]) for row in rows}
    assert len(table) == math.prod(AXES), f"{len(table)} of {math.prod(AXES)} are recorded"
    out = []
    for bound in LIMITS:
        limit = 10 ** (-bound / 10)
        kept = [found.cost for found in table.values() if found.keeps({"psnr": limit})]
        best = min(kept) / (1 - GAIN)

        def told(
            tried: list[Point], limit: float = limit, best: float = best, kept: list[float] = kept
        ) -> dict[str, Any]:
            own = [table[point].cost if table[point].keeps({"psnr": limit}) else math.inf for point in tried]
            found = next((number for number, cost in enumerate(own, start=1) if cost <= best), None)
            within = {count: round(min(own[:count]) / min(kept), 3) for count in (6, 9, 12, 18, 24)}
            return {"trials": len(tried), "best_after": found, "cost_over_best": within}

        row: dict[str, Any] = {"keep_db": bound, "best_ms": min(kept), "ours": told(ours(table, limit))}
        for name, seeds in SEEDS.items():
            each = [told(optunas(table, limit, name, seed)) for seed in range(seeds)]
            after = [one["best_after"] or MOST for one in each]
            row[name] = {
                "best_after": statistics.mean(after),
                "found_by": sum(one["best_after"] is not None for one in each) / seeds,
                "cost_over_best": {
                    count: round(statistics.mean(one["cost_over_best"][count] for one in each), 3)
                    for count in (6, 9, 12, 18, 24)
                },
            }
        out.append(row)
        print(json.dumps(row), flush=True)
        told_all = {"axes": AXES, "limits": out, "table": rows}
        (ROOT / "benchmarks/search.json").write_text(json.dumps(told_all, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["record", "replay"])
    parser.add_argument("work", metavar="WORK", type=Path, help="folder for models and what was drawn")
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    {"record": record, "replay": replay}[told.what](told.work)
