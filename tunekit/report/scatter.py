"""Quality against cost, one point per model, as an SVG; what nothing beats is joined by a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from tunekit.report.material import plain_number

if TYPE_CHECKING:
    from tunekit.passes.metrics import Metric

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 360, 74, 24, 16, 44
MOST_POINTS = 300
PLAIN, BEST, WINNER = "#8a93a3", "#2f6fde", "#d9730d"


def _ceiling(values: Sequence[float]) -> float:
    """The highest, but of one that stands far above all others (a model compared with itself) the next."""
    lowest, *_ = ordered = sorted(values)
    if len(ordered) < 4:
        return ordered[-1]
    highest, following = ordered[-1], ordered[-2]
    return following if highest - following > following - lowest > 0 else highest


def draw(rows: Sequence[Mapping[str, Any]], across: Metric, up: Metric) -> str | None:
    """The SVG; None where fewer than two rows have both figures.

    A point far above all others stands at the upper edge, with its figures beside it.

    Args:
        rows: of a table: the figures named by `across` and `up`; `passes`, what a point is; `front`, true of
            those that nothing beats; `kept`, "winner" of the one that was taken.
        across: figure on the horizontal axis.
        up: figure on the vertical one.
    """
    points = [
        (float(row[across.name]), float(row[up.name]), row)
        for row in rows[:MOST_POINTS]
        if plain_number(row.get(across.name)) and plain_number(row.get(up.name))
    ]
    if len(points) < 2:
        return None
    lowest = (min(x for x, _, _ in points), min(y for _, y, _ in points))
    highest = (max(x for x, _, _ in points), _ceiling([y for _, y, _ in points]))
    spans = [(high - low) or abs(high) or 1.0 for low, high in zip(lowest, highest, strict=True)]
    (left, right), (bottom, top) = (
        (low - 0.05 * span, high + 0.05 * span)
        for low, high, span in zip(lowest, highest, spans, strict=True)
    )

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left),
            TOP + (HEIGHT - BOTTOM - TOP) * (top - min(y, top)) / (top - bottom),
        )

    title = f"{up.title} against {across.title}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in range(5):
        x, y = left + (right - left) * tick / 4, bottom + (top - bottom) * tick / 4
        height, place = at(left, y)[1], at(x, bottom)[0]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#8884" />'
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{escape(up.format(y))}</text>'
            f'<text x="{place:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{escape(across.format(x))}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(title)}</text>')
    front = sorted((x, y) for x, y, row in points if row.get("front"))
    if len(front) > 1:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in front))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{BEST}" stroke-width="1.5" />')
    for x, y, row in points:
        winner = row.get("kept") == "winner"
        colour, size = (WINNER, 8) if winner else (BEST, 5) if row.get("front") else (PLAIN, 4)
        told = f"{row.get('passes', '')}: {across.format(x)}, {up.format(y)}"
        place, height = at(x, y)
        if winner or y > top:
            # Above and to the right of a front there is nothing; the edges are left free.
            anchor, aside = ("end", -12) if place > 0.8 * WIDTH else ("start", 12)
            label = f"{'taken: ' if winner else ''}{across.format(x)}, {up.format(y)}"
            level = height + (24 if y > top else -8)
            where = f'x="{place + aside:.1f}" y="{level:.1f}" text-anchor="{anchor}"'
            parts.append(f"<text {where}>{escape(label)}</text>")
        parts.append(
            f'<circle cx="{place:.1f}" cy="{height:.1f}" r="{size}" fill="{colour}">'
            f"<title>{escape(told)}</title></circle>"
        )
    return "".join([*parts, "</svg>"])
