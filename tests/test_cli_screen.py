"""Tables at the width of a terminal: no figure is folded or cut."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tunekit.cli import plans, screen

BENCH = ("", "denoiser p50", "p95", "picture p50", "size", "peak memory", "speed", "of its size")
FIGURES = ("12.3 ms", "14.5 ms", "1,234.5 ms", "21.3 MiB", "1.2 GiB", "0.50x SLOWER", "0.30x")
LEDGER = ("VAE", "text encoders", "inputs", "activations", "workspace", "base weights", "optimizer state")
PHASES = ("load", "class pictures", "encode", "first step", "step", "preview", "save")


def printed(*arguments: object, width: int = 80, **options: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    screen.show_table(console, *arguments, **options)  # type: ignore[arg-type]
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(
    "names", [["tiny\ntorch fp32"], ["runs/mine/03-export_onnx-12345678\nONNX", "runs/other", "a/b/c"]]
)
def test_figures_of_bench_are_whole(names: list[str], width: int):
    lines = printed(BENCH, [(name, *FIGURES) for name in names], width=width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for figure in FIGURES:
        assert text.count(f" {figure} ") == len(names)
    for title in BENCH[1:]:
        assert title in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_figures_of_six_phases_are_whole(width: int):
    rows = [(name, *(f"{index}.{place} GiB" for place in range(7))) for index, name in enumerate(LEDGER)]
    lines = printed(("", *PHASES), rows, width=width)
    assert max(map(len, lines)) <= width
    found = re.findall(r"\b\d\.\d GiB", "\n".join(lines))
    assert sorted(found) == sorted(cell for row in rows for cell in row[1:])


def test_words_are_folded_between_figures():
    figures = ", ".join(f"size {index}.5 GiB, PSNR 4{index}.1 dB" for index in range(9))
    lines = printed(("folder", "seconds", "figures"), [("a" * 30, "1.5 s", figures)], width=80, words=True)
    assert max(map(len, lines)) <= 80
    for index in range(9):
        assert any(f"{index}.5 GiB" in line for line in lines)
        assert any(f"4{index}.1 dB" in line for line in lines)
    assert screen.fold("needs 12.0 GiB of 3 ms", 10) == ["needs", "12.0 GiB", "of 3 ms"]
    assert screen.fold("", 10) == [""]


def plan(device: str, needs: int, words: list[str]) -> Any:
    """A plan as far as it is shown; `needs` in MiB."""
    return SimpleNamespace(
        device=device,
        device_bytes=needs << 20,
        budget_bytes=12 << 30,
        context_bytes=300 << 20,
        ram_bytes=21 << 30,
        fits=needs < 12_000,
        relative_step_time=1.25,
        notes=(),
        words=", ".join(words),
    )


@pytest.mark.parametrize("width", [80, 200])
def test_all_cards_are_a_line_each(width: int):
    kinds = [["bf16"], ["bf16, nf4 base", "micro-batch 1 x 4", "12 of 16 blocks checkpointed", "x" * 20]]
    cards = [plan(f"card-{index}", 9_000 + 100 * index, kinds[index % 2]) for index in range(40)]
    console = Console(file=io.StringIO(), width=width)
    plans._show_cards(console, cards)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert len(lines) < 50
    for card in cards:
        (line,) = (line for line in lines if line.startswith(f" {card.device} "))
        assert f"{card.device_bytes / 2**30:.1f} GiB" in line and ("x1.25" in line) == card.fits
    assert any(", ".join(kinds[1]) in line for line in lines) or width == 80
    assert "12 of 16 blocks checkpointed" in " ".join(" ".join(lines).split())


def test_a_sweep_is_one_table():
    tried = [
        ([f"data.resolution={size}", f"train.batch_size={batch}", "train.lr=1"], size * batch)
        for size in (512, 768)
        for batch in (1, 4)
    ]
    one = [(words, [plan("rtx-3060", needs, ["bf16"])]) for words, needs in tried]
    many = [(words, [plan(f"card-{n}", needs + n, ["bf16"]) for n in range(20)]) for words, needs in tried]
    for made, rows in ((one, 4), (many, 20)):
        console = Console(file=io.StringIO(), width=80)
        plans._show_sweep(console, "sd15/lora", made)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= 80
        assert lines[1] == "sd15/lora train.lr=1"
        assert (
            len([line for line in lines if line.startswith(" ") and ("GiB" in line or "MiB" in line)]) == rows
        )
        assert rows > 4 or lines[2] == "rtx-3060, 12.0 GiB"
        assert "resolution=768" in "".join(lines)
