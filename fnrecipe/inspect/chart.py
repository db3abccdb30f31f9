"""Lines in a picture: SVG, which browsers and Git forges show, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import attrs

from fnrecipe.errors import UsageError

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 190, 16, 48
"""Of the picture, and what is left free around the lines: numbers below and at the left, names at the right."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#000000", "#8c564b", "#7f7f7f")


@attrs.frozen
class Line:
    """Points (x, y) in the order in which they are joined; those that have no place are left out."""

    name: str
    points: Sequence[tuple[float, float]]


@attrs.frozen(kw_only=True)
class Chart:
    """Lines over axes called `x` and `y`, each logarithmic if so said; at the values `marks` of x stand broken lines."""

    lines: Sequence[Line]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] = {}


def svg(*charts: Chart) -> str:
    """The charts, in as many rows as columns if there are enough of them, as SVG.

    Raises:
        UsageError: if one has no point that is finite, and positive on a logarithmic axis.
    """
    columns = math.ceil(math.sqrt(len(charts)))
    rows = math.ceil(len(charts) / columns)
    width, height = columns * _WIDTH, rows * _HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    parts = [head, f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, chart in enumerate(charts):
        row, column = divmod(number, columns)
        parts += [f'<g transform="translate({column * _WIDTH} {row * _HEIGHT})">', *_body(chart), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _body(chart: Chart) -> Iterator[str]:
    kept = [[point for point in line.points if _has_place(chart, *point)] for line in chart.lines]
    if not any(kept):
        raise UsageError(f"chart: expected a point that has a place, found none in {chart.y}")
    xs, ys = zip(*(point for points in kept for point in points), strict=True)
    across = _Axis.over(xs, (_LEFT, _WIDTH - _RIGHT), log=chart.log_x)
    up = _Axis.over(ys, (_HEIGHT - _BOTTOM, _TOP), log=chart.log_y)
    yield from _grid(across, up, chart.x, chart.y)
    for number, (line, points) in enumerate(zip(chart.lines, kept, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{across.place(a):.1f},{up.place(b):.1f}" for a, b in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        yield _text(line.name, _WIDTH - _RIGHT + 14, _TOP + 12 + 17 * number, fill=colour)
    for number, (name, value) in enumerate(chart.marks.items()):
        at = across.place(value)
        yield f'<path d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#555" stroke-dasharray="4 3"/>'
        yield _text(name, at + 4, _TOP + 12 + 15 * number, fill="#555")


def _has_place(chart: Chart, x: float, y: float) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)


@attrs.frozen
class _Axis:
    """Values from `low` to `high` at the places from `first` to `last`; both as `scale` makes them."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], places: tuple[float, float], *, log: bool = False) -> _Axis:
        scale: Callable[[float], float] = math.log10 if log else float
        low, high = scale(min(values)), scale(max(values))
        margin = 0 if high > low else 0.5
        return cls(low - margin, high + margin, *places, log)

    def place(self, value: float) -> float:
        scaled = math.log10(value) if self.log else value
        return self.first + (self.last - self.first) * (scaled - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """Round values: powers of ten where they are enough, else multiples of 1, 2 or 5 times one."""
        if self.log and self.high - self.low >= 2:
            yield from (10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1))
            return
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        size = 10 ** math.floor(math.log10((high - low) / 4))
        step = next(size * each for each in (1, 2, 5, 10) if size * each >= (high - low) / 7)
        yield from (step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1))


def _grid(across: _Axis, up: _Axis, x: str, y: str) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in across.ticks():
        at = across.place(value)
        yield f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#e4e4e4"/>'
        yield _text(f"{value:.4g}", at, bottom + 16, anchor="middle")
    for value in up.ticks():
        at = up.place(value)
        yield f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#e4e4e4"/>'
        yield _text(f"{value:.4g}", _LEFT - 6, at + 4, anchor="end")
    yield f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" fill="none" stroke="#999"/>'
    yield _text(x, (_LEFT + right) / 2, _HEIGHT - 10, anchor="middle")
    yield f'<g transform="translate(14 {(_TOP + bottom) / 2:.0f}) rotate(-90)">{_text(y, 0, 0, anchor="middle")}</g>'


def _text(text: str, x: float, y: float, *, anchor: str = "start", fill: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
