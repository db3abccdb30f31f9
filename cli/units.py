"""Numbers formatted with units."""

from __future__ import annotations


def si(value: float, unit: str) -> str:
    """`0 B`, `12.3 kB`, `1.0 GFLOP/s`: one decimal and a prefix from a thousand on."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:,.1f} {prefix}{unit}" if prefix else f"{value:,.0f} {unit}".rstrip()
        value /= 1000
    return f"{value:,.1f} P{unit}"


def duration(seconds: float) -> str:
    """`1.20 s`, `35.0 ms`, `120 µs`: three digits."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"
