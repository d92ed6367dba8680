"""The page of a comparison: one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunekit.comparison.configs import MEASURED_BY, Differing
from tunekit.comparison.contestants import Contestant
from tunekit.comparison.grid import Cell, Table, Wanted
from tunekit.comparison.thumbnails import side_for, thumbnail
from tunekit.config import SamplingConfig
from tunekit.provenance import shown
from tunekit.records import finite
from tunekit.registry import PASSES
from tunekit.report.curve import Line, chart, lowest, thinned, training_loss
from tunekit.report.material import plain_number
from tunekit.report.page import style
from tunekit.resources import ASSETS
from tunekit.units import format_bytes, format_count, format_seconds

COLOURS = ("#2f6fde", "#d9730d", "#159957", "#b0479c", "#8a6d00", "#0e93a8", "#d1373f", "#7a68d8")
DASHES = ("", "7 4", "2 4", "10 4 2 4")
"""Of lines beyond as many as there are colours."""
OPEN = 150
"""Pictures up to which all tables are open at once."""
MOST_LINES = 40
"""Runs whose curves are drawn over one another."""


def render(
    contestants: Sequence[Contestant],
    differing: Differing,
    tables: Sequence[Table],
    wanted: Wanted,
    out: Path,
) -> str:
    """The page.

    Args:
        contestants: what is compared.
        differing: what differs in their configs.
        tables: their pictures.
        wanted: how they were drawn.
        out: folder that the pictures lie in.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((ASSETS / "compare.html.j2").read_text(encoding="utf-8"))
    names = [one.name for one in contestants if one.material and one.material.config]
    cells = [cell for table in tables for cell in table.cells if cell.file]
    side = side_for([out / str(cell.file) for cell in cells]) if cells else 0
    facts = [one.facts() for one in contestants]
    return template.render(
        style=style(),
        title=", ".join(one.name for one in contestants[:6])
        + (f" and {len(contestants) - 6} more" if len(contestants) > 6 else ""),
        count=len(contestants),
        overviews=[
            {"title": title, "heads": list(columns), "rows": _rows(contestants, facts, columns)}
            for title, columns in (
                ("What became of them", _training(facts)),
                ("What the passes measured of the last model", _passes(facts)),
            )
            if columns
        ],
        notes=_notes(contestants, differing),
        trouble=[
            f"{one.name}: {line}" for one in contestants if one.material for line in one.material.trouble
        ],
        names=names,
        differing=[(key, [values[name] for name in names]) for key, values in differing.items()],
        curves=[
            {**one, "svg": Markup(one["svg"])}  # noqa: S704 - made here, of numbers
            for one in _curves(contestants)
        ],
        tables=[_table(table, out, side, number, len(cells)) for number, table in enumerate(tables)],
        drawn=_drawn(contestants, tables, wanted, len(cells)),
        why=_why_none(contestants, wanted) if not tables else "",
    )


def _why_none(contestants: Sequence[Contestant], wanted: Wanted) -> str:
    if not any(one.entries for one in contestants):
        return "Nothing has been trained yet that could draw."
    if not wanted.prompts:
        return "The runs have no preview.prompts; --prompt says what to draw."
    return ""


Columns = Mapping[str, Sequence[tuple[str, str, str]]]
"""Head -> (text, note, tone) for each contestant."""


def _training(facts: Sequence[Mapping[str, Any]]) -> Columns:
    """How they were trained; columns that at least one has something in."""
    best, fastest = _lowest(facts, "val_loss"), _lowest(facts, "seconds_per_step")
    return _some(
        {
            "steps": [_steps(found) for found in facts],
            "held-out loss": [_held_out(found, best) for found in facts],
            "best step": [(_text(found, "best_step", format_count), "", "") for found in facts],
            "training loss": [(_text(found, "loss", "{:.4f}".format), "", "") for found in facts],
            "took": [(_text(found, "seconds", format_seconds), "", "") for found in facts],
            "a step": [_pace(found, fastest) for found in facts],
            "memory": [_memory(found) for found in facts],
            "trained": [(_text(found, "parameters", format_count), "", "") for found in facts],
            "size": [(_text(found, "size_bytes", format_bytes), "", "") for found in facts],
        }
    )


def _passes(facts: Sequence[Mapping[str, Any]]) -> Columns:
    """What passes found out, as a report's table has it."""
    found = {}
    for metric in _declared():
        values = [one.get("figures", {}).get(metric.name) for one in facts]
        found[metric.column] = [
            (metric.format(value) if plain_number(value) else "", "", "") for value in values
        ]
    return _some(found)


def _some(columns: Columns) -> Columns:
    return {head: cells for head, cells in columns.items() if any(text for text, *_ in cells)}


def _rows(
    contestants: Sequence[Contestant], facts: Sequence[Mapping[str, Any]], columns: Columns
) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "what": shown(str(found["base"])) if found["base"] else "",
            "cells": [
                dict(zip(("text", "note", "tone"), cells[index], strict=True)) for cells in columns.values()
            ],
        }
        for index, (one, found) in enumerate(zip(contestants, facts, strict=True))
        if any(cells[index][0] for cells in columns.values())
    ]


def _declared() -> list[Any]:
    """What passes measure of a whole model, in the order that a report shows it."""
    found = {metric.name: metric for _, cls in PASSES.items() for metric in cls.metrics}
    known = [metric for metric in found.values() if metric.column and metric.name != "size_bytes"]
    return sorted(known, key=lambda metric: metric.rank)


def _lowest(facts: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [found[name] for found in facts if plain_number(found.get(name))]
    return min(values) if len(values) > 1 else None


def _text(found: Mapping[str, Any], name: str, write: Any) -> str:
    value = found.get(name)
    return write(value) if plain_number(value) else ""


def _steps(found: Mapping[str, Any]) -> tuple[str, str, str]:
    if not found.get("steps"):
        return "", "", ""
    taken = found["taken"]
    note = "not finished" if not found["finished"] else ""
    if taken and taken != found["steps"]:
        note = f"result: {format_count(taken)}"
    return format_count(found["steps"]), note, ""


def _held_out(found: Mapping[str, Any], best: float | None) -> tuple[str, str, str]:
    value = found.get("val_loss")
    if not plain_number(value):
        return "", "", ""
    first, last = found.get("val_loss_first"), found.get("last_val_loss")
    notes = [f"from {first:.4f}"] if plain_number(first) else []
    if plain_number(last) and last != value:
        notes.append(f"last {last:.4f}")
    return f"{value:.4f}", ", ".join(notes), "good" if value == best else ""


def _pace(found: Mapping[str, Any], fastest: float | None) -> tuple[str, str, str]:
    is_fastest = fastest is not None and found.get("seconds_per_step") == fastest
    return _text(found, "seconds_per_step", format_seconds), "", "good" if is_fastest else ""


def _memory(found: Mapping[str, Any]) -> tuple[str, str, str]:
    peak, planned = found.get("peak_bytes"), found.get("planned_bytes")
    if plain_number(peak):
        return format_bytes(peak or 0), f"planned {format_bytes(planned or 0)}" if planned else "", ""
    return (format_bytes(planned), "as planned", "") if plain_number(planned) and planned else ("", "", "")


def _notes(contestants: Sequence[Contestant], differing: Differing) -> list[str]:
    measured = sum(1 for one in contestants if one.held_out)
    keys = [key for key in MEASURED_BY if key in differing]
    if measured > 1 and keys:
        return [
            f"The runs differ in {', '.join(keys)}, so their losses are not of the same pictures: compare"
            " their shape, not their height."
        ]
    return []


# Curves -----------------------------------------------------------------------------------------------------


def _curves(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Held-out and training loss of all runs, over one another; of one colour in both."""
    runs = [one for one in contestants if one.material and one.material.rows][:MOST_LINES]
    held_out, training = [], []
    for index, one in enumerate(runs):
        assert one.material is not None
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        points = finite(one.material.rows, "val_loss")
        if len(points) > 1:
            held_out.append(Line(one.name, colour, thinned(points), lowest(points), dashes=dashes))
        if found := training_loss(one.material.rows):
            training.append(Line(one.name, colour, found[1], dashes=dashes))
    made = []
    for title, lines in (
        ("Loss on held-out pictures", held_out),
        ("Training loss, running mean", training),
    ):
        if lines:
            legend = [
                {
                    "colour": line.colour,
                    "dashed": bool(line.dashes),
                    "label": line.label,
                    "note": f"lowest {line.mark[1]:.4f} at step {line.mark[0]:.0f}" if line.mark else "",
                }
                for line in lines
            ]
            made.append({"title": title, "legend": legend, "svg": chart(lines, title)})
    return made


# Pictures ---------------------------------------------------------------------------------------------------


def _drawn(contestants: Sequence[Contestant], tables: Sequence[Table], wanted: Wanted, count: int) -> str:
    """How the pictures were drawn, in a line."""
    if not tables:
        return ""
    seeds = f"seed{'s' * (len(wanted.seeds) > 1)} {', '.join(map(str, wanted.seeds))}"
    told = f"{format_count(count)} pictures; every row has the same prompts and {seeds}."
    by_run: dict[str, list[str]] = {}
    for table in tables:
        for cell in table.cells:
            runs = by_run.setdefault(_sampled(cell.sampling), [])
            if cell.entry.run not in runs:
                runs.append(cell.entry.run)
    if len(by_run) == 1:
        return f"{told} Drawn with {next(iter(by_run))}."
    ways = "; ".join(f"{', '.join(runs)}: {way}" for way, runs in by_run.items())
    return f"{told} They are not drawn alike: {ways}."


def _sampled(sampling: SamplingConfig) -> str:
    parts = []
    if sampling.steps is not None:
        parts.append(f"{sampling.steps} steps")
    if sampling.guidance is not None:
        parts.append(f"guidance {sampling.guidance:g}")
    if sampling.height and sampling.width:
        parts.append(f"{sampling.width} x {sampling.height} pixels")
    return ", ".join(parts) or "the settings of the model"


def _table(table: Table, out: Path, side: int, number: int, count: int) -> dict[str, Any]:
    def shown_cell(name: str, note: str, head: str, cell: Cell | None) -> dict[str, Any] | None:
        if cell is None:
            return None
        alt = ", ".join(part for part in (name, note, head, table.title) if part)
        made = thumbnail(out / cell.file, side) if cell.file else None
        if made is None:
            return {"alt": alt, "image": "", "problem": cell.problem or "the picture cannot be read"}
        image, width, height = made
        return {"alt": alt, "image": image, "width": width, "height": height, "problem": ""}

    return {
        "title": table.title,
        "open": count <= OPEN or number < 2,
        "heads": table.heads,
        "rows": [
            {
                "name": name,
                "note": note,
                "cells": [
                    shown_cell(name, note, head, cell) for head, cell in zip(table.heads, cells, strict=True)
                ],
            }
            for name, note, cells in table.rows
        ],
    }
