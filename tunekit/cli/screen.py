"""What a command prints: headings, tables, JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """Where tables and coloured lines go."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)  # a path may hold [brackets]


def heading(console: Console, text: str) -> None:
    """A line in bold, with an empty one before it."""
    console.print(f"\n{text}", style="bold")


def table(*columns: str) -> Table:
    """A table without a frame."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def print_json(value: Any) -> None:
    """A value as JSON; in ASCII where stdout is not UTF-8, so that a program reads the same text."""
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8()))


def is_utf8() -> bool:
    """Whether stdout has every letter."""
    return (sys.stdout.encoding or "").lower().replace("-", "").replace("_", "") == "utf8"
