"""Speeds by hand counts, and what waits for data."""

from __future__ import annotations

import time
from itertools import islice

import attrs
import pytest
import torch

from fnrecipe.data import Cursor, Stream
from fnrecipe.models.flops import TokenFlops
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.position import Position
from fnrecipe.shell.recording.throughput import Work, speed, timed, work_of


def test_speeds_are_sums_over_seconds() -> None:
    found = speed(Work(100, TokenFlops(6000, 5000), 1e6), [90, 80], [0.5, 0.0], 4.0)
    assert attrs.astuple(found) == (42.5, 50.0, 0.5, 0.125, 300e3, 250e3, 0.3, 0.25)


def test_what_is_not_known_is_not_told() -> None:
    no_peak = speed(Work(100, TokenFlops(6000, 5000), None), [90], [0.0], 1.0)
    assert (no_peak.model_flops_per_second, no_peak.mfu, no_peak.causal_mfu) == (600e3, None, None)
    no_flops = speed(Work(100, None, 1e6), [90], [0.0], 1.0)
    assert (no_flops.model_flops_per_second, no_flops.causal_model_flops_per_second, no_flops.mfu) == (None, None, None)


@pytest.mark.parametrize(("device", "peak"), [("NVIDIA A100-SXM4-80GB", 4 * 312e12), ("cpu", None)])
def test_the_peak_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch, device: str, peak: float | None) -> None:
    monkeypatch.setattr("fnrecipe.runtime.host.device_name", lambda _: device)
    work = work_of(recipe, recipe.config, torch.device("cpu"), 4)
    assert (work.positions, work.peak) == (8 * 256, peak)
    assert work.flops is not None


def test_the_wait_is_the_consumers_not_what_it_does_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(cursor: Cursor) -> Stream[int]:
        for number in range(cursor or 0, 4):
            now[0] += 2.0
            yield number, number + 1

    items = []
    for entry in islice(timed(slow, 1), 2):
        now[0] += 10.0
        items.append(entry)
    assert items == [(1, Position(2, 2.0)), (2, Position(3, 2.0))]
