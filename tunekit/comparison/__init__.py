"""Runs side by side: what differs in them, how they learned, and the same pictures drawn by each.

    from tunekit.comparison import Wanted, compare

    compare(["runs/low", "runs/high"], Wanted(prompts=("a red fox",), strengths=(0.6, 1.0)), Path("compare"))

`contestants.py` finds what is compared, `configs.py` what differs in the configs, `grid.py` draws,
`page.py` and `sheets.py` show it. Pictures that an earlier comparison drew into the same folder stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunekit.comparison.configs import differences
from tunekit.comparison.contestants import gather
from tunekit.comparison.grid import Wanted
from tunekit.errors import ConfigError
from tunekit.files import write_json, write_text
from tunekit.provenance import public

__all__ = ["PAGE", "RECORD", "Wanted", "compare"]

VERSION = 1
PAGE, RECORD = "compare.html", "compare.json"


def compare(
    sources: Sequence[str],
    wanted: Wanted,
    out: Path,
    *,
    say: Callable[[str], object] = lambda line: None,
    on_step: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Compare runs, and write `compare.html`, `compare.json`, contact sheets and pictures into a folder.

    Args:
        sources: run folders, adapter files and folders, models.
        wanted: what is drawn.
        out: the folder; pictures that are there already are kept.
        say: takes lines about what is left out.
        on_step: called with (what draws, pictures done, all of them).

    Returns:
        The content of compare.json.

    Raises:
        ConfigError: there is nothing to compare, or an option has no effect on any of the sources.
        TunekitError: a source cannot be opened, or the folder cannot be written.
    """
    from tunekit.comparison import grid, page, sheets

    contestants = gather(sources, wanted, say)
    if len(contestants) == 1 and len(wanted.strengths) < 2 and len(contestants[0].entries) < 2:
        raise ConfigError(
            f"{contestants[0].name} alone has nothing to be compared with",
            hint="name another run, or add --checkpoints (adapters by step) or --strengths 0.6,0.8,1",
        )
    wanted = wanted.settled(contestants)
    cells = grid.draw(contestants, wanted, out, say=say, on_step=on_step) if wanted.draws else []
    differing = differences(contestants)
    tables = grid.tables(contestants, wanted, cells)
    made = sheets.write(tables, out)
    content = {
        "version": VERSION,
        "runs": [contestant.facts() for contestant in contestants],
        "differs": {key: dict(values) for key, values in differing.items()},
        "pictures": [cell.as_json() for cell in cells],
        "sheets": [path.name for path in made],
    }
    write_text(out / PAGE, page.render(contestants, differing, tables, wanted, out))
    write_json(out / RECORD, public(content))
    return content
