#!/usr/bin/env python3
"""What encoding ahead costs: pictures a second, bytes, and what a large cache takes to open.

    .venv/bin/python scripts/measure_encode.py --sizes 10000 100000 1000000 --out benchmarks/encode

Each figure is of a process of its own, so that its peak memory is known. The pictures are small and the model
is the tiny one: what is measured is all but the VAE, whose time per picture is a property of the card.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine

from tunekit.data.samples import Indexed, Sample

SIZES = 100
"""Sizes of pictures that differ."""


class Samples(Indexed):
    """So many samples, each made when it is asked for, as an index of rows gives them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return map(self.__getitem__, range(*index.indices(self.count)))
        if not 0 <= index < self.count:
            raise IndexError(index)
        width, height = 32 + index % SIZES, 32 + index * 7 % SIZES
        return Sample(
            f"{index}", f"a picture with the number {index}", width, height, f"{index:032x}", "", bytes
        )

    @property
    def sizes(self) -> Any:
        """See `Indexed`."""
        order = np.arange(self.count)
        return np.stack([32 + order % SIZES, 32 + order * 7 % SIZES], axis=1).astype(np.int32)

    digest = hashes = contents = ranks = take = None  # nobody asks for them


def peak() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    made = make()
    return time.perf_counter() - began, made


def keys_of(count: int) -> list[str]:
    """Keys as hashes are."""
    raw = np.random.default_rng(0).bytes(16 * count)
    return [raw[at : at + 16].hex() for at in range(0, len(raw), 16)]


def write(folder: Path, count: int, size: int) -> dict[str, Any]:
    """Entries into shards."""
    from tunekit.data.store import Shards

    keys, content, shards = keys_of(count), os.urandom(size), Shards(folder)

    def all_of_them() -> None:
        for key in keys:
            shards.put(key, content)
        shards.close()

    seconds, _ = timed(all_of_them)
    stored = sum(path.stat().st_size for path in folder.glob("*.shard"))
    return {"write_seconds": seconds, "overhead_bytes": stored / count - size}


def files(folder: Path, count: int, size: int) -> dict[str, Any]:
    """The same into files."""
    from tunekit.data.store import Store, write_tensors

    keys, content, store = keys_of(count), os.urandom(size), Store(folder)

    def all_of_them() -> None:
        for key in keys:
            write_tensors(store.path(key), content)

    seconds, _ = timed(all_of_them)
    blocks = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
    return {"write_seconds": seconds, "overhead_bytes": blocks / count - size}


def opened(folder: Path, count: int, index: bool) -> dict[str, Any]:
    """What it takes to know all entries, and to find them."""
    from tunekit.data.store import Shards, pairs_of

    if not index:
        for path in folder.glob("*.shard"):
            os.truncate(path, path.stat().st_size - 1)
    keys = keys_of(count)
    pairs, before = pairs_of(bytes.fromhex("".join(keys))), peak()
    shards = Shards(folder)
    seconds, _ = timed(shards.refresh)
    held = peak() - before
    assert len(shards) == count
    looking, found = timed(lambda: shards.holds(pairs))
    assert found.all()
    chosen = [keys[at] for at in np.random.default_rng(1).integers(0, count, 2000)]
    reading, _ = timed(lambda: [shards.read(key) for key in chosen])
    return {
        "open_seconds": seconds,
        "open_bytes": held,
        "find_seconds": looking,
        "read_ms": reading / len(chosen) * 1e3,
    }


def dataset(folder: Path, count: int) -> dict[str, Any]:
    """What a training takes until its first batch is drawn, where all is encoded: its own part."""
    from accelerate import Accelerator

    from tunekit import families
    from tunekit.config import DataConfig
    from tunekit.data.cache import Draws, Encoder, Stream

    family = families.get("sd15")
    pipeline = family.tiny()
    accelerator = Accelerator(cpu=True)
    data, samples = DataConfig(path="x", resolution=32), Samples(count)

    def encoder() -> Encoder:
        return Encoder(family, pipeline, cache=folder, accelerator=accelerator, say=lambda line: None)

    first = encoder()
    for work in (first.pictures(samples, data, seed=0), first.captions([""], samples)):
        for keys in work.each(0, work.count):
            for key in keys:
                work.store._shards.put(key, b"")
        work.store.close()
    del first
    child = os.fork()  # whose peak is its own
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("it has failed")
        return json.loads((folder / "figures.json").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    seconds, made = timed(lambda: encoder().dataset(samples, data, seed=0))
    held = high_water() - before
    stream = Stream(made, family.objective(pipeline), Draws(batch_size=8), seed=0)
    ordering, _ = timed(lambda: stream.ids(0))
    figures = {
        "dataset_seconds": seconds,
        "dataset_bytes": held,
        "order_seconds": ordering,
        "all_bytes": high_water() - before,
    }
    (folder / "figures.json").write_text(json.dumps(figures))
    os._exit(0)


def high_water() -> int:
    """Bytes that this process has had in memory at most since that was cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def command(folder: Path, count: int, processes: int) -> dict[str, Any]:
    """`tunekit encode` of small pictures with the tiny model."""
    from PIL import Image

    photos = folder / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photos / f"{index:05d}.png")
        (photos / f"{index:05d}.txt").write_text(f"number {index % 10}")
    (folder / "mine.yaml").write_text(
        "recipe: lora\nmodel: {family: sd15, source: tiny}\ndata: {path: photos, resolution: 64}\n"
        "train: {max_steps: 2, lr: 1e-3}\nmemory: {device: cpu}\n"
    )
    words = [sys.executable, "-m", "tunekit", "encode", "mine.yaml", "--json", f"--processes={processes}"]

    def run() -> dict[str, Any]:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        made: dict[str, Any] = json.loads(done.stdout)
        return made

    whole, told = timed(run)
    again, found = timed(run)
    assert told["pictures"]["encoded"] == found["pictures"]["found"] == count
    return {
        "pictures": count,
        "processes": processes,
        "seconds": whole,
        "encoding_seconds": told["seconds"],
        "pictures_per_second": count / told["seconds"],
        "bytes_per_picture": told["written_bytes"] / count,
        "again_seconds": again,
    }


def alone(name: str, *given: Any) -> dict[str, Any]:
    """A figure, in a process and a folder of its own."""
    words = [sys.executable, __file__, "--one", json.dumps([name, *given])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, *given, made, flush=True)
    return made


def one(name: str, given: list[Any]) -> None:
    """What `alone` starts."""
    known = {"write": write, "files": files, "opened": opened, "dataset": dataset, "command": command}
    if name in ("write", "files", "opened"):
        made = known[name](Path(given[0]), *given[1:])
    else:
        with tempfile.TemporaryDirectory(prefix="tunekit-encode-") as folder:
            made = known[name](Path(folder), *given)
    print(json.dumps(made))


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    host = found["machine"]
    lines = [
        "# Encoding ahead",
        "",
        f"{host['device']}, {host['threads']} thread, {host['date']}; tiny model, CPU, others at work beside."
        " `scripts/measure_encode.py` writes this page.",
        "",
        "## A cache of so many entries",
        "",
        f"Entries of {found['entry_bytes']} bytes, which stand for any: larger ones only take longer to read"
        " and to write. Memory is what the process has in addition, at most.",
        "",
        "| entries | put in shards | each more than its content | open | memory | find all | read one"
        " | open without its index |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["entries"]:
        lines.append(
            f"| {row['count']:,} | {row['count'] / row['write_seconds']:,.0f}/s |"
            f" {row['overhead_bytes']:.0f} bytes |"
            f" {row['open_seconds']:.2f} s | {row['open_bytes'] / 1e6:.0f} MB | {row['find_seconds']:.2f} s |"
            f" {row['read_ms']:.3f} ms | {row['scan_seconds']:.2f} s |"
        )
    row = found["files"]
    lines += [
        "",
        f"As a file each, {row['count']:,} are written at {row['count'] / row['write_seconds']:,.0f}/s, and"
        f" take {row['overhead_bytes']:,.0f} bytes more each than their content. So from 4,096 missing ones"
        " on, a training writes shards too; below, a file each, which any tool can read and remove.",
        "",
        "## A training that finds all encoded",
        "",
        "From the list of samples to the first batch: keys of all pictures and of all captions (no two alike)"
        " are made and looked for.",
        "",
        "| samples | time | memory | the order of an epoch | memory with it |",
        "|---|---|---|---|---|",
    ]
    for row in found["datasets"]:
        lines.append(
            f"| {row['count']:,} | {row['dataset_seconds']:.1f} s | {row['dataset_bytes'] / 1e6:.0f} MB |"
            f" {row['order_seconds']:.2f} s | {row['all_bytes'] / 1e6:.0f} MB |"
        )
    lines += [
        "",
        "## The command",
        "",
        "| pictures, 64 x 64 | processes | encoding | rate | bytes each | all, with starting | again |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["commands"]:
        lines.append(
            f"| {row['pictures']:,} | {row['processes']} | {row['encoding_seconds']:.1f} s |"
            f" {row['pictures_per_second']:.0f}/s | {row['bytes_per_picture']:.0f} | {row['seconds']:.1f} s |"
            f" {row['again_seconds']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--entry-bytes", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/encode"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, *rest = json.loads(given.one)
        one(name, rest)
        return
    found: dict[str, Any] = {
        "machine": machine("torch", "numpy", "safetensors"),
        "entry_bytes": given.entry_bytes,
        "entries": [],
        "datasets": [],
        "commands": [],
    }
    for count in given.sizes:
        folder = tempfile.mkdtemp(prefix="tunekit-shards-")
        row = {"count": count, **alone("write", folder, count, given.entry_bytes)}
        row |= alone("opened", folder, count, True)
        row["scan_seconds"] = alone("opened", folder, count, False)["open_seconds"]
        shutil.rmtree(folder)
        found["entries"].append(row)
        found["datasets"].append({"count": count, **alone("dataset", count)})
    folder = tempfile.mkdtemp(prefix="tunekit-files-")
    found["files"] = {
        "count": min(given.sizes),
        **alone("files", folder, min(given.sizes), given.entry_bytes),
    }
    shutil.rmtree(folder)
    found["commands"] = [alone("command", given.pictures, processes) for processes in (1, 2)]
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    given.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
