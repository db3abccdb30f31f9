"""The line about a step."""

from __future__ import annotations

import attrs
import pytest

from fnrecipe.cost import TokenFlops
from fnrecipe.display import step_facts
from fnrecipe.speed import Speed, Work, speed

METRICS = {"step": 20, "loss": 1.2345, "learning_rate": 2e-3, "skipped": 0}
TIMED = speed(Work(8000, TokenFlops(60, 40), 1e6), [7500, 7900], [0.1, 0.1], 2.0)


@pytest.mark.parametrize(
    ("timed", "line"),
    [
        (TIMED, "loss 1.234  lr 2.0e-03  7,700 tokens/s  48.0% MFU  eta 1m20s"),
        (attrs.evolve(TIMED, mfu=None), "loss 1.234  lr 2.0e-03  7,700 tokens/s  eta 1m20s"),
    ],
)
def test_the_share_of_the_peak_is_shown_where_it_is_known(timed: Speed, line: str) -> None:
    assert step_facts(METRICS, timed, 100) == line
