"""Lines over a logarithmic plane, as an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 320, 240, 48
"""Of a panel, in pixels, and of what is around its lines."""


def log_log(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str) -> str:
    """A panel for each title, with a line for each name, through points of positive numbers; darker lines come later.

    All panels have their x axis, called `x`, in common; each has a tick at each point of its first line.
    """
    drawn = [_panel(title, lines, x, number * WIDTH) for number, (title, lines) in enumerate(panels.items())]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" text-anchor="middle" fill="black"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *drawn, "</svg>", ""])


def _panel(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x: str, left: int) -> str:
    points = [point for line in lines.values() for point in line]
    xs, ys = (list(values) for values in zip(*points, strict=True))
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys) * 1.001))

    def across(value: float) -> float:
        return MARGIN + _share(value, min(xs), max(xs)) * (WIDTH - 1.5 * MARGIN)

    def down(value: float) -> float:
        return HEIGHT - MARGIN - _share(value, low, high) * (HEIGHT - 1.75 * MARGIN)

    parts = [f'<g transform="translate({left})">', f'<text x="{WIDTH / 2}" y="20">{escape(title)}</text>']
    for value in sorted(set(xs)):
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - MARGIN + 16}">{value:g}</text>')
    for value in (low, high):
        parts.append(f'<text x="{MARGIN - 8}" y="{down(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        ends = f'x1="{MARGIN}" x2="{WIDTH - MARGIN / 2}" y1="{down(value):.1f}" y2="{down(value):.1f}"'
        parts.append(f'<line {ends} stroke="#bbb"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}">{escape(x)}</text>')
    for number, (name, line) in enumerate(lines.items()):
        stroke = f'stroke="#2a5fa5" stroke-opacity="{(number + 1) / len(lines):.2f}"'
        path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in line)
        parts.append(f'<polyline points="{path}" fill="none" {stroke} stroke-width="2">')
        parts.append(f"<title>{escape(name)}</title></polyline>")
    return "\n".join([*parts, "</g>"])


def _share(value: float, low: float, high: float) -> float:
    """How far between them it is, by logarithms."""
    return math.log(value / low) / math.log(high / low)
