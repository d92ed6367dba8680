"""The memory of one optimizer step as a picture: categories stacked over time, and the budget above."""

from __future__ import annotations

from html import escape
from itertools import groupby

from tunekit.memory.plan import Plan
from tunekit.units import format_bytes

COLOURS = {
    "base weights": "#4c6a92",
    "weights": "#4c6a92",
    "VAE": "#6d7f9c",
    "visiting weights": "#7d97bb",
    "adapter": "#2f9e8f",
    "adapter in float32": "#5bb8ab",
    "optimizer state": "#8e6bbf",
    "inputs": "#9aa3b2",
    "gradients": "#c9803d",
    "activations": "#e0a83a",
    "workspace": "#c0564b",
}
"""From the bottom of the stack to its top."""
LETTER = 5.8
"""Width of a letter of the legend, about."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 320, 74, 12, 34, 42


def draw(plan: Plan) -> str:
    """An SVG of what is allocated during a step, by category, from left to right in the order of events."""
    moments = plan.moments
    names = [name for name in COLOURS if any(name in ledger for _, ledger in moments)]
    top = max((sum(ledger.values()) for _, ledger in moments), default=1)
    limit = plan.budget_bytes if plan.budget_bytes < 3 * top else None
    high = 1.06 * max(top, limit or 0)
    count = max(1, len(moments) - 1)

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * index / count

    def y(size: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - size / high)

    title = escape(f"{plan.device}: {plan.words}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" '
        f'font-family="system-ui, sans-serif" aria-label="memory of a step, {title}">',
        f'<text x="{LEFT}" y="14" font-size="13" fill="#777">{title}</text>',
    ]
    across = f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
    for tick in range(5):
        size = high * tick / 4
        parts.append(
            f'<line {across} y1="{y(size):.1f}" y2="{y(size):.1f}" stroke="#8884" />'
            f'<text x="{LEFT - 8}" y="{y(size) + 4:.1f}" text-anchor="end" fill="#777">'
            f"{format_bytes(size)}</text>"
        )
    below = [0] * len(moments)
    for name in names:
        above = [low + ledger.get(name, 0) for low, (_, ledger) in zip(below, moments, strict=True)]
        edge = [f"{x(i):.1f},{y(size):.1f}" for i, size in enumerate(above)]
        edge += [f"{x(i):.1f},{y(size):.1f}" for i, size in reversed(list(enumerate(below)))]
        parts.append(f'<polygon points="{" ".join(edge)}" fill="{COLOURS[name]}" />')
        below = above
    start = 0
    for phase, group in groupby(phase for phase, _ in moments):
        length = len(list(group))
        middle = x(start + (length - 1) / 2)
        parts.append(
            f'<text x="{middle:.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#777">{phase}</text>'
        )
        if start:
            parts.append(
                f'<line x1="{x(start):.1f}" x2="{x(start):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                'stroke="#fff" stroke-dasharray="3 3" />'
            )
        start += length
    if limit is not None:
        parts.append(
            f'<line {across} y1="{y(limit):.1f}" y2="{y(limit):.1f}" stroke="#c81e1e" '
            f'stroke-dasharray="6 3" /><text x="{WIDTH - RIGHT}" y="{y(limit) - 4:.1f}" text-anchor="end" '
            f'fill="#c81e1e">budget {format_bytes(limit)}</text>'
        )
    left = float(LEFT)
    for name in names:
        parts.append(
            f'<rect x="{left:.1f}" y="{HEIGHT - 14}" width="10" height="10" fill="{COLOURS[name]}" />'
            f'<text x="{left + 14:.1f}" y="{HEIGHT - 5}" fill="#777">{name}</text>'
        )
        left += 34 + LETTER * len(name)
    parts.append("</svg>")
    return "".join(parts)
