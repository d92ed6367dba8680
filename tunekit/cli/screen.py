"""What a command prints: headings, tables, JSON."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tunekit.files import json_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    Cell: TypeAlias = str | Text

LEAST = 24
"""Columns that text keeps beside figures."""
_UNITS = re.compile(r"(?<=\d) (?=([kKMGT]i?)?B\b|ms\b|s\b|min\b|h\b|dB\b|px\b|[x%]( |$))")


def console(*, stderr: bool = False) -> Console:
    """Where tables and coloured lines go."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)  # a path may hold [brackets]


def heading(console: Console, text: str) -> None:
    """A line in bold, with an empty one before it."""
    console.print(f"\n{text}", style="bold")


def say(console: Console, text: str, style: str = "") -> None:
    """Prints text, folded between words; a figure stays with its unit."""
    for line in text.splitlines() or [""]:
        for folded in fold(line, console.width):
            console.print(folded, style=style, soft_wrap=True)


def fold(text: str, width: int) -> list[str]:
    """Text in lines of at most `width` columns, where its words allow it: "1.2 GiB" is one word."""
    whole = _UNITS.sub("\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(whole, max(width, 1), break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [""]


def show_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, words: bool = False
) -> None:
    """Prints rows so that no figure is folded or cut: a table that is too wide is turned over, or parted.

    Args:
        columns: titles; the first column names the rows.
        rows: a cell for each column, which may have several lines.
        words: the last column holds text, which may be folded.
    """
    widths = _widths(columns, rows)
    room = console.width - _whole_width([*widths[:-1], 0])
    if words and widths[-1] > room >= LEAST:
        widths[-1] = room
    if _whole_width(widths) <= console.width:
        _print(console, columns, rows, widths)
        return
    turned = _turned([columns, *rows])
    if not words and max(map(_width, columns)) < widths[0]:  # what repeats in every part is narrower so
        columns, rows = [str(cell) for cell in turned[0]], turned[1:]
        widths = _widths(columns, rows)
    begin = 1
    while begin < len(columns):
        part = [0, begin]
        while part[-1] + 1 < len(columns) and _whole_width([widths[i] for i in (*part, part[-1] + 1)]) <= (
            console.width
        ):
            part.append(part[-1] + 1)
        begin = part[-1] + 1
        own = [widths[index] for index in part]
        if words and part[-1] == len(columns) - 1:
            own[-1] = min(own[-1], max(LEAST, console.width - _whole_width([*own[:-1], 0])))
        _print(console, [columns[i] for i in part], [[row[i] for i in part] for row in rows], own)


def fits(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bool:
    """Whether a table can be printed as it is."""
    return _whole_width(_widths(columns, rows)) <= console.width


def _turned(rows: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _widths(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[int]:
    return [max(map(_width, column)) for column in _turned([columns, *rows])]


def _width(cell: Cell) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, str(cell).splitlines() or [""]))


def _whole_width(widths: Sequence[int]) -> int:
    """Of a table: each column has a blank on either side, and another parts it from the next."""
    return sum(widths) + 3 * len(widths) - 1


def _print(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]], widths: Sequence[int]
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for title in columns:
        table.add_column(title, no_wrap=True)
    for row in rows:
        cells = []
        for cell, width in zip(row, widths, strict=True):
            lines = [part for line in str(cell).splitlines() or [""] for part in fold(line, width)]
            cells.append(Text("\n".join(lines), cell.style if isinstance(cell, Text) else ""))
        table.add_row(*cells)
    console.print(table, crop=False)


def print_json(value: Any) -> None:
    """A value as JSON; in ASCII where stdout is not UTF-8, so that a program reads the same text."""
    print(json_text(value, ascii_only=not is_utf8()))


def is_utf8() -> bool:
    """Whether stdout has every letter."""
    return (sys.stdout.encoding or "").lower().replace("-", "").replace("_", "") == "utf8"
