"""Numbers as people read them."""

from __future__ import annotations

import pytest

from fnrecipe.cli.units import duration, si


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12345, "12.3 kB"),
        (3.2e9, "3.2 GB"),
        (5e12, "5.0 TB"),
        (2e18, "2,000.0 PB"),
    ],
)
def test_sizes(value: float, shown: str) -> None:
    assert si(value, "B") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 µs"),
        (12e-6, "12 µs"),
        (0.0035, "3.50 ms"),
        (0.0353, "35.3 ms"),
        (0.353, "353 ms"),
        (1.234, "1.23 s"),
        (99.5, "99.5 s"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_without_a_unit_end_in_no_space() -> None:
    assert (si(512, ""), si(36.5e9, "")) == ("512", "36.5 G")
