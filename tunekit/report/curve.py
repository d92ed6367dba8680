"""The loss over the steps as an SVG whose size does not grow with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.records import finite

Point = tuple[float, float]
BUCKETS = 300
"""Of each line; of each bucket four points are kept at most."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 280, 74, 16, 10, 30


def draw(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The running mean of the training loss, and the held-out loss.

    Args:
        rows: of metrics.jsonl, in the order of their steps.

    Returns:
        `{"svg", "lines": [{"label", "colour", "points"}]}`; None for fewer than two steps.
    """
    training = [(step, loss) for step, loss in finite(rows, "loss") if step > 0]
    held_out = finite(rows, "val_loss")
    if len(training) < 2:
        return None
    window = max(1, len(training) // 30)
    label = "training loss" + (f" (mean of {window} steps)" if window > 1 else "")
    lines = [{"label": label, "colour": "#2f6fde", "points": thinned(running_mean(training, window))}]
    if len(held_out) > 1:
        label = "loss on held-out pictures"
        lines.append({"label": label, "colour": "#d9730d", "points": thinned(held_out)})
    return {"svg": _svg(lines), "lines": lines}


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


def _svg(lines: Sequence[Mapping[str, Any]]) -> str:
    every = [point for line in lines for point in line["points"]]
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    last = max(step for step, _ in every) or 1
    margin = (high - low) * 0.08 or 0.01
    low, high = max(low - margin, min(low, 0.0)), high + margin  # a loss is not below zero

    def at(step: float, loss: float) -> Point:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, TOP + (HEIGHT - BOTTOM - TOP) * (high - loss) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">']
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
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line["points"]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line["colour"]}" stroke-width="2" />')
    return "".join([*parts, "</svg>"])
