"""Schedules against a closed form, written without torch."""

from __future__ import annotations

import math

import pytest
import torch

from fnrecipe.optim.schedule import cosine_annealing, wsd
from fnrecipe.transforms import jit


def rate(step: int, peak: float, warmup: int, steps: int, final: float) -> float:
    """Linear to `peak` at step max(warmup, 1), half a cosine to `final * peak` at `steps`."""
    top = max(warmup, 1)
    if step <= top:
        return peak * step / top
    if step >= steps:
        return peak * final
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * (step - top) / (steps - top))) / 2)


def values(peak: float, warmup: int, steps: int, final: float, last: int) -> list[float]:
    schedule = cosine_annealing(peak, num_warmup_steps=warmup, num_steps=steps, final_scale=final)
    return [schedule(torch.tensor(step)).item() for step in range(1, last + 1)]


CASES = [(2e-3, 40, 600, 0.1), (1.0, 0, 50, 0.0), (3e-4, 1, 20, 0.5), (0.5, 9, 10, 0.1), (1e-2, 5, 100, 1.0), (0.0, 3, 9, 0.1)]


@pytest.mark.parametrize(("peak", "warmup", "steps", "final"), CASES)
def test_every_step_has_the_closed_form(peak: float, warmup: int, steps: int, final: float) -> None:
    found = values(peak, warmup, steps, final, last=steps + 20)
    expected = [rate(step, peak, warmup, steps, final) for step in range(1, steps + 21)]
    assert found == pytest.approx(expected, rel=1e-12, abs=0)
    assert max(found) == peak
    assert found[max(warmup, 1) - 1] == peak
    assert found[steps - 1 :] == [peak * final] * 21
    if peak:
        assert found[0] > 0


def test_golden_values() -> None:
    assert values(1.0, 2, 6, 0.1, last=7) == pytest.approx([0.5, 1.0, 0.8681980515339464, 0.55, 0.2318019484660536, 0.1, 0.1])


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert values(0.7, 0, 10, 0.1, last=1) == [0.7]


def test_a_schedule_is_a_function_of_the_step_in_any_order_and_when_traced() -> None:
    schedule = cosine_annealing(1.0, num_warmup_steps=3, num_steps=30, final_scale=0.1)
    traced = jit(schedule)
    forward = [schedule(torch.tensor(step)) for step in range(1, 40)]
    backward = [traced(torch.tensor(step)) for step in reversed(range(1, 40))]
    assert [x.item() for x in forward] == [x.item() for x in reversed(backward)]
    assert all(x.dtype == torch.float64 and x.shape == () for x in forward)


def test_a_longer_schedule_has_the_same_warmup_and_then_its_own_values() -> None:
    short, long = values(1.0, 5, 20, 0.1, last=40), values(1.0, 5, 40, 0.1, last=40)
    assert short[:5] == long[:5]
    assert all(a < b for a, b in zip(short[5:39], long[5:39], strict=True))


def stable_rate(step: int, peak: float, warmup: int, decay: int, steps: int, final: float) -> float:
    """Linear to `peak` at step max(warmup, 1), `peak` up to `decay` steps before the end, linear to `final * peak` there."""
    top = max(warmup, 1)
    last = max(steps - decay, top)
    if step <= top:
        return peak * step / top
    if decay == 0 or step <= last:
        return peak
    if step >= steps:
        return peak * final
    return peak * (final * (step - last) + steps - step) / (steps - last)


STABLE = [(2e-3, 40, 120, 600, 0.0), (1.0, 0, 50, 50, 0.1), (3e-4, 1, 1, 20, 0.5), (0.5, 9, 1, 10, 0.0), (1e-2, 5, 0, 9, 0.1)]


@pytest.mark.parametrize(("peak", "warmup", "decay", "steps", "final"), STABLE)
def test_every_step_of_wsd_has_the_closed_form(peak: float, warmup: int, decay: int, steps: int, final: float) -> None:
    schedule = wsd(peak, num_warmup_steps=warmup, num_decay_steps=decay, num_steps=steps, final_scale=final)
    traced = jit(schedule)
    found = [schedule(torch.tensor(step)) for step in range(1, steps + 20)]
    expected = [stable_rate(step, peak, warmup, decay, steps, final) for step in range(1, steps + 20)]
    assert [rate.item() for rate in found] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert [traced(torch.tensor(step)).item() for step in range(1, steps + 20)] == [rate.item() for rate in found]
    assert all(rate.dtype == torch.float64 and rate.shape == () for rate in found)
    assert max(found) == found[max(warmup, 1) - 1] == peak
    assert all(rate == peak for rate in found[max(warmup, 1) : steps - decay])


def test_a_longer_wsd_has_the_same_rates_before_its_decay() -> None:
    rates = [wsd(1.0, num_warmup_steps=5, num_decay_steps=10, num_steps=steps, final_scale=0.0) for steps in (30, 90)]
    short, long = ([rate(torch.tensor(step)).item() for step in range(1, 21)] for rate in rates)
    assert short == long
