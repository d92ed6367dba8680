"""The loss over the steps as an SVG whose size does not grow with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from tunekit.records import finite

Point = tuple[float, float]
BUCKETS = 300
"""Of each line; of each bucket four points are kept at most."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 280, 74, 16, 10, 30


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: what it is.
        colour: as CSS has it.
        points: (step, loss), in the order of the steps.
        mark: one of them that stands out, in a circle.
        mark_label: what is written beside the mark; "" is nothing.
        dashes: of an SVG's stroke; "" is a line without gaps.
    """

    label: str
    colour: str
    points: Sequence[Point]
    mark: Point | None = None
    mark_label: str = ""
    dashes: str = ""


def draw(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The running mean of the training loss, and the held-out loss with its lowest value.

    Args:
        rows: of metrics.jsonl, in the order of their steps.

    Returns:
        `{"svg", "lines": [Line]}`; None for fewer than two steps.
    """
    training = training_loss(rows)
    if training is None:
        return None
    label, points = training
    lines = [Line(label, "#2f6fde", points)]
    held_out = finite(rows, "val_loss")
    if len(held_out) > 1:
        step, loss = lowest(held_out)
        told = f"lowest: {loss:.4f} (step {step:.0f})"
        lines.append(Line("loss on held-out pictures", "#d9730d", thinned(held_out), (step, loss), told))
    return {"svg": chart(lines), "lines": lines}


def training_loss(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[Point]] | None:
    """What the running mean of the training loss is called, and its points; None for fewer than two steps."""
    training = [(step, loss) for step, loss in finite(rows, "loss") if step > 0]
    if len(training) < 2:
        return None
    window = max(1, len(training) // 30)
    label = "training loss" + (f" (mean of {window} steps)" if window > 1 else "")
    return label, thinned(running_mean(training, window))


def lowest(held_out: Sequence[Point]) -> Point:
    """The lowest of some losses; the untrained model does not count where there is another."""
    trained = [point for point in held_out if point[0] > 0]
    return min(trained or held_out, key=lambda point: point[1])


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Each value replaced by the mean of the last `window` ones."""
    means, total = [], 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        means.append((step, total / min(index + 1, window)))
    return means


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most four points of each bucket: its first and last, its lowest and highest. No peak is lost."""
    if len(points) <= 4 * buckets:
        return list(points)
    kept = []
    for bucket in range(buckets):
        start, end = bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets
        part = range(start, end)
        low = min(part, key=lambda index: points[index][1])
        high = max(part, key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({start, low, high, end - 1})]
    return kept


def chart(lines: Sequence[Line], title: str = "loss over steps") -> str:
    """Lines over one another as an SVG without a script; at least one point."""
    every = [point for line in lines for point in line.points]
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    last = max(step for step, _ in every) or 1
    margin = (high - low) * 0.08 or 0.01
    low, high = max(low - margin, min(low, 0.0)), high + margin  # a loss is not below zero

    def at(step: float, loss: float) -> Point:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, TOP + (HEIGHT - BOTTOM - TOP) * (high - loss) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in range(5):
        loss = low + (high - low) * tick / 4
        y = at(0, loss)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884" />')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
        step, anchor = round(last * tick / 4), "end" if tick == 4 else "middle"
        parts.append(
            f'<text x="{at(step, low)[0]:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step}</text>'
        )
    for line in lines:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dashes} />'
        )
    for line in lines:
        if line.mark is not None:
            parts.append(_mark(line, *at(*line.mark)))
    return "".join([*parts, "</svg>"])


def _mark(line: Line, x: float, y: float) -> str:
    """A circle around a point; what it is stands below, where a lowest point has room, else above."""
    anchor, aside = ("end", -8) if x > 0.7 * WIDTH else ("start", 8)
    level = y + 22 if y < HEIGHT - BOTTOM - 26 else y - 12
    told = escape(f"{line.label}: {line.mark_label}" if line.mark_label else line.label)
    circle = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{line.colour}" stroke-width="2.5">'
        f"<title>{told}</title></circle>"
    )
    if not line.mark_label:
        return circle
    where = f'x="{x + aside:.1f}" y="{level:.1f}" text-anchor="{anchor}"'
    return f"{circle}<text {where}>{escape(line.mark_label)}</text>"
