"""The lora recipe on the same pictures as a folder, as shards and as parquet files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

RunHere = Callable[..., Path]
Configured = Callable[..., Path]


def as_shards(folder: Path, to: Path) -> Path:
    """Members have the paths of the files as their names, and their order."""
    to.mkdir()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, at in enumerate(range(0, len(files), 6)):
        with tarfile.open(to / f"{number:03d}.tar", "w") as tar:
            for file in files[at : at + 6]:
                member = tarfile.TarInfo(file.relative_to(folder).as_posix())
                member.size = file.stat().st_size
                tar.addfile(member, io.BytesIO(file.read_bytes()))
    return to


def as_parquet(folder: Path, to: Path) -> Path:
    """Cells have the paths of the files in `path`."""
    import pyarrow
    import pyarrow.parquet

    pictures = sorted(folder.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": file.relative_to(folder).as_posix()} for file in pictures]
    texts = [file.with_suffix(".txt").read_text() for file in pictures]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": texts}), to)
    return to


def learned(run: Path) -> tuple[list[Any], dict[str, bytes]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    return (
        [[line.get(key) for key in ("step", "loss", "grad_norm", "val_loss")] for line in lines],
        {name: value.numpy().tobytes() for name, value in weights.items()},
    )


@pytest.mark.slow  # three runs; tests/data/test_sources.py compares the batches
def test_shards_and_parquet_train_as_the_folder_does(
    tmp_path: Path, lora_tree: dict[str, Any], mixed_pictures: Path, run_here: RunHere, configured: Configured
) -> None:
    sources = {
        "folder": mixed_pictures,
        "shards": as_shards(mixed_pictures, tmp_path / "shards"),
        "parquet": as_parquet(mixed_pictures, tmp_path / "all.parquet"),
    }
    train = {"max_steps": 3, "lr": 0.002, "batch_size": 4, "validate_every": 3}
    made = {}
    for name, path in sources.items():
        tree = {
            **lora_tree,
            "data": {**lora_tree["data"], "path": str(path)},
            "train": train,
            "preview": {},
            "name": name,
        }
        made[name] = learned(run_here(configured(tmp_path, tree, name)))
    assert len(made["folder"][0]) == 4 and made["folder"][1]
    assert made["shards"] == made["folder"]
    assert made["parquet"] == made["folder"]
