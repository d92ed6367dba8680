"""Contact sheets: the tables of a comparison as PNG files, to be shown where no page can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.comparison.grid import Table
from tunekit.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image

SIDE, GAP, LEFT, LINE = 256, 6, 170, 17
"""Of a picture at most, between two, for the names of rows, and of a line of text; in pixels."""
MOST_SIDE = 12_000
"""Of a sheet; more rows make pictures smaller, down to a fourth."""
NAME = re.compile(r"sheet-\d{2,}-[\w-]*\.png")


def write(tables: Sequence[Table], out: Path) -> list[Path]:
    """Write a sheet for each table, and remove those of an earlier comparison there.

    Raises:
        OutputError: one cannot be written.
    """
    made = []
    for number, table in enumerate(tables, start=1):
        if not any(cell.file for cell in table.cells):
            continue
        slug = re.sub(r"[^\w]+", "-", table.title.lower()).strip("-")[:50] or "all"
        path = out / f"sheet-{number:02d}-{slug}.png"
        with atomic_file(path) as aside:
            draw(table, out).save(aside, "png")
        made.append(path)
    for path in out.glob("sheet-*.png") if out.is_dir() else ():
        if NAME.fullmatch(path.name) and path not in made:
            path.unlink()
    return made


def draw(table: Table, out: Path) -> Image.Image:
    """A table as a picture: names on the left, heads above."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    pictures = [[_open(out, cell) for cell in cells] for *_, cells in table.rows]
    sizes = [picture.size for row in pictures for picture in row if picture]
    side = min(SIDE, max(max(size) for size in sizes))
    side = max(side // 4, min(side, (MOST_SIDE - 200) // len(table.rows) - GAP))
    side = max(side, 64)
    title = _lines(table.title, LEFT + len(table.heads) * (side + GAP), font)[:3] if table.title else []
    heads = [_lines(head, side, font)[:4] for head in table.heads]
    top = LINE * (len(title) + max(len(head) for head in heads)) + 2 * GAP
    width = LEFT + len(table.heads) * (side + GAP)
    whole = Image.new("RGB", (width, top + len(table.rows) * (side + GAP)), "white")
    pen = ImageDraw.Draw(whole)
    _write(pen, (GAP, GAP), title, font, "black")
    for column, head in enumerate(heads):
        _write(pen, (LEFT + column * (side + GAP), GAP + LINE * len(title)), head, font, "black")
    for index, ((name, note, cells), row) in enumerate(zip(table.rows, pictures, strict=True)):
        y = top + index * (side + GAP)
        told = [
            *_lines(name, LEFT - 2 * GAP, font)[:2],
            *(_lines(note, LEFT - 2 * GAP, font) if note else []),
        ]
        _write(pen, (GAP, y), told[: max(1, side // LINE)], font, "black")
        for column, (cell, picture) in enumerate(zip(cells, row, strict=True)):
            place = (LEFT + column * (side + GAP), y)
            if picture:
                picture.thumbnail((side, side))
                whole.paste(picture, place)
            elif cell:
                _write(pen, place, _lines(cell.problem, side, font)[: side // LINE], font, "#b00")
    return whole


def _open(out: Path, cell: Any) -> Image.Image | None:
    from PIL import Image

    if cell is None or cell.file is None:
        return None
    with Image.open(out / cell.file) as picture:
        return picture.convert("RGB")


def _lines(text: str, width: int, font: Any) -> list[str]:
    """Text in lines that are no wider than `width` pixels; a word that is, is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            part = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:part])
            word = word[part:]
        lines.append(word)
    return lines


def _write(pen: Any, place: tuple[int, int], lines: Sequence[str], font: Any, colour: str) -> None:
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + number * LINE), line, fill=colour, font=font)
