#!/usr/bin/env python
"""Time and memory of opening 10,000 to 1,000,000 pictures in shards, parquet files and a stream; one machine.

    scripts/measure_index.py                                  # all, about half an hour and 6 GB of disk
    scripts/measure_index.py --sources shards --rows 1000000  # one line; the others stay as they are

The pictures are JPEGs of 64 to 96 pixels with a caption each, made here, 10,000 in a file. The first opening
looks at every picture; the second, in a process of its own, finds the index. Memory is the most that a
process had above what it had before it opened anything. Writes benchmarks/index.json and benchmarks/index.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks"
ROWS = (10_000, 100_000, 1_000_000)
SOURCES = ("shards", "parquet", "stream")
IN_A_FILE = 10_000


# Making -----------------------------------------------------------------------------------------------------


def pictures(first: int, count: int) -> Iterator[tuple[str, bytes, str]]:
    """Name, JPEG and caption; no two pictures have the same bytes, for each says its number in a comment."""
    import numpy as np
    from PIL import Image

    drawn = random.Random(0)
    whole = []
    for width, height in ((64, 64), (96, 64), (64, 96), (80, 64)):
        noise = np.frombuffer(drawn.randbytes(width * height // 64 * 3), np.uint8).reshape(height // 8, -1, 3)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=80
        )
        whole.append(buffer.getvalue())
    for number in range(first, first + count):
        comment = f"{number:012d}".encode()
        data = whole[number % len(whole)]
        data = data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]
        yield f"{number:08d}", data, f"a picture of noise, the one with the number {number}"


def make(source: str, rows: int, folder: Path) -> None:
    """Write a source of so many pictures."""
    folder.mkdir(parents=True)
    for number in range(rows // IN_A_FILE):
        some = pictures(number * IN_A_FILE, IN_A_FILE)
        if source == "shards":
            with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
                for name, data, text in some:
                    for suffix, content in (("jpg", data), ("txt", text.encode())):
                        member = tarfile.TarInfo(f"{name}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        else:
            import pyarrow
            import pyarrow.parquet

            rows_ = [
                {"image": {"bytes": data, "path": f"{name}.jpg"}, "text": text} for name, data, text in some
            ]
            file = folder / f"train-{number:05d}-of-{rows // IN_A_FILE:05d}.parquet"
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows_), file, row_group_size=1000, compression="none"
            )


# Measuring --------------------------------------------------------------------------------------------------


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last `reset`."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) * 1024


def measured(source: str, folder: Path, *, reads: bool) -> dict[str, Any]:
    """Open a source once; `reads` asks for pictures, too."""
    from tunekit.config import DataConfig
    from tunekit.data.images import scan_data

    data = DataConfig(path=str(folder), resolution=64, streaming=source == "stream", validation=0.01)
    if source in ("parquet", "stream"):
        import datasets  # noqa: F401 - what is imported is not what the pictures need
        import pyarrow.parquet  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, began = memory("VmRSS"), time.perf_counter()
    scan = scan_data(data)
    found: dict[str, Any] = {"seconds": time.perf_counter() - began}
    scan.check()
    found |= {"peak_bytes": memory("VmHWM") - before, "pictures": len(scan.samples) + len(scan.held_out)}
    if not reads:
        return found
    began = time.perf_counter()
    for _ in scan.samples:
        pass
    found["all_in_order_seconds"] = time.perf_counter() - began
    found["peak_bytes"] = memory("VmHWM") - before
    places = random.Random(0).sample(range(len(scan.samples)), 1000)
    began = time.perf_counter()
    for place in places:
        scan.samples[place]
    found["one_seconds"] = (time.perf_counter() - began) / len(places)
    return found


def in_a_process(source: str, folder: Path, home: Path, *, reads: bool) -> dict[str, Any]:
    """`measured`, in a process of its own."""
    command = [sys.executable, __file__, "--one", source, str(folder), *(["--reads"] if reads else [])]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    made = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return dict(json.loads(made.stdout.splitlines()[-1]))


def line(source: str, rows: int, work: Path) -> dict[str, Any]:
    """One line of the table."""
    folder, home = work / f"{source}-{rows}", work / f"cache-{source}-{rows}"
    shutil.rmtree(home, ignore_errors=True)
    if source == "stream":
        folder = work / f"parquet-{rows}"
    if not folder.exists():
        make("parquet" if source == "stream" else source, rows, work / "making")
        (work / "making").rename(folder)
    first = in_a_process(source, folder, home, reads=False)
    second = in_a_process(source, folder, home, reads=True)
    if first["pictures"] != rows or second["pictures"] != rows:
        raise SystemExit(f"{source}: {first['pictures']:,} of {rows:,} pictures found")
    index = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    found = {"source": source, "rows": rows, "source_bytes": size, "index_bytes": index}
    found |= {f"first_{key}": first[key] for key in ("seconds", "peak_bytes")}
    found |= {f"second_{key}": second[key] for key in ("seconds", "peak_bytes")}
    return found | {key: second[key] for key in ("all_in_order_seconds", "one_seconds")}


# Telling ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """benchmarks/index.md."""
    mib = 2**20
    lines = [
        "# Opening many pictures",
        "",
        "JPEGs of 64 to 96 pixels with a caption each, 10,000 in a file, the files in the system's memory.",
        "The first opening looks at every picture (size from its header, hash of its bytes, caption), the",
        "second finds the index. A hundredth is held out. Peak: the most memory that the process had above",
        "what it had before (the second: all samples read in order, too).",
        f"{result['machine']['device']}, {result['machine']['cores']} cores, shared with other work:",
        "",
        "    scripts/measure_index.py",
        "",
        "| source | pictures | on disk | index | first opening | peak | second opening | peak | all in order"
        " | one at random |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["lines"]:
        lines.append(
            f"| {row['source']} | {row['rows']:,} | {row['source_bytes'] / mib:,.0f} MiB"
            f" | {row['index_bytes'] / mib:,.1f} MiB | {row['first_seconds']:.2f} s"
            f" | {row['first_peak_bytes'] / mib:,.0f} MiB | {row['second_seconds']:.2f} s"
            f" | {row['second_peak_bytes'] / mib:,.0f} MiB | {row['all_in_order_seconds']:.2f} s"
            f" | {row['one_seconds'] * 1e6:,.0f} µs |"
        )
    lines += ["", *growth(result["lines"]), ""]
    return "\n".join(lines)


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """How time and memory grow from the second largest to the largest of each source."""
    told = []
    for source in SOURCES:
        own = sorted((row for row in rows if row["source"] == source), key=lambda row: row["rows"])
        if len(own) < 2:
            continue
        less, more = own[-2:]
        count = more["rows"] - less["rows"]

        def per(
            key: str, less: dict[str, Any] = less, more: dict[str, Any] = more, count: int = count
        ) -> float:
            return float(more[key] - less[key]) / count

        told.append(
            f"- {source}: from {less['rows']:,} to {more['rows']:,} pictures, each more takes"
            f" {per('first_seconds') * 1e6:.0f} µs and {per('first_peak_bytes'):.0f} bytes of memory at the"
            " first opening,"
            f" {per('second_seconds') * 1e6:.2f} µs and {per('second_peak_bytes'):.0f} bytes at the second,"
            f" {per('index_bytes'):.0f} bytes of the index."
        )
    return told


def main() -> None:
    """Measure what was asked for, and write it beside what is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="multiples of 10,000")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    parser.add_argument(
        "--work", type=Path, help="where pictures are made, and kept; else a temporary folder"
    )
    parser.add_argument("--one", nargs=2, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--reads", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one[0], Path(given.one[1]), reads=given.reads)))
        return
    from measuring import machine

    file = OUT / "index.json"
    known = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.is_file() else []
    with tempfile.TemporaryDirectory(prefix="tunekit-measure-") as temporary:
        for source in given.sources:
            for rows in given.rows:
                made = line(source, rows, given.work or Path(temporary))
                print(json.dumps(made))
                known = [row for row in known if (row["source"], row["rows"]) != (source, rows)] + [made]
    known.sort(key=lambda row: (SOURCES.index(row["source"]), row["rows"]))
    about = machine("pillow", "pyarrow", "datasets") | {"cores": os.cpu_count()}
    result = {"machine": about, "lines": known}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (OUT / "index.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
