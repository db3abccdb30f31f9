"""Spikes: which steps are skipped, against numpy on the list of all steps; in the step, traced, compiled, and over ranks."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe import optim, random, tree
from fnrecipe.compiler import inductor
from fnrecipe.optim.loss_scale import LossScaling
from fnrecipe.optim.spikes import SpikeGuard, init_window, limits, update_window
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit, unshard
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits, compiles
from tests.ranks import mesh_of, on_ranks

KEY = random.key(2)
GUARD = SpikeGuard(window=5, bound=4.0)
VALUES = [1.0, 1.1, 0.9, 1.2, 1.0, 1.1, 9.0, 0.8, 9.5, 1.3, 0.0, 1.2, 2.6]


def expected_limit(values: list[float], guard: SpikeGuard) -> float:
    if len(values) < guard.window:
        return np.inf
    last = np.array(values[-guard.window :])
    median = np.percentile(last, 50, method="lower")
    spread = np.percentile(np.abs(last - median), 50, method="lower")
    return float(median + guard.bound * max(spread, abs(median) / 100))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 100), max_size=20), st.integers(1, 6), st.floats(0.5, 20))
def test_limits_are_those_of_numpy_on_the_steps_that_were_made(values: list[float], size: int, bound: float) -> None:
    guard = SpikeGuard(size, bound)
    window, made = init_window(guard, torch.device("cpu")), list[float]()
    for value in values:
        loss, norm = limits(guard, window)
        assert (loss.item(), norm.item()) == pytest.approx(
            (expected_limit(made, guard), expected_limit([2 * v for v in made], guard))
        )
        accept = value <= loss.item()
        window = update_window(window, torch.tensor(value).double(), torch.tensor(2 * value).double(), torch.tensor(accept))
        made += [value] * accept
    assert window.count == len(made)


def linear(params: Tree, batch: Tensor, key: Tensor | None) -> tuple[Tensor, Any]:
    """The sums of a loss that is the mean of the batch; the gradient has that norm, whatever the parameters are."""
    weight = unshard(params)["w"][0]
    total = weight * batch.sum()
    return total, {"loss": batch.sum(), "targets": torch.tensor(batch.numel())}


def constant(rate: float) -> Any:
    return lambda step: torch.tensor(rate, dtype=torch.float64)


ADAMW = optim.adamw(constant(0.1))


def fresh(**options: Any) -> State:
    return init_state({"w": torch.ones(16)}, ADAMW, KEY, guard=GUARD, **options)


def run(step: Any, state: State, values: list[float]) -> tuple[State, list[dict[str, float]]]:
    found = []
    for value in values:
        state, metrics = step(state, torch.full((8,), value))
        found.append({name: metric.item() for name, metric in metrics.items()})
    return state, found


def spikes_of(values: list[float]) -> list[int]:
    made, flags = list[float](), []
    for value in values:
        flags.append(int(value > expected_limit(made, GUARD)))
        made += [value] * (not flags[-1])
    return flags


@pytest.mark.parametrize("wrap", [lambda step: step, lambda step: jit(step, donate=1)], ids=["eager", "traced"])
def test_a_spike_leaves_no_trace_and_is_counted(wrap: Any) -> None:
    step = wrap(train_step(linear, ADAMW, 2, guard=GUARD))
    state, found = run(step, fresh(), VALUES)
    assert [row["spike"] for row in found] == spikes_of(VALUES)
    assert sum(spikes_of(VALUES)) == 3
    assert [row["skipped"] for row in found] == spikes_of(VALUES)
    kept = [value for value, spike in zip(VALUES, spikes_of(VALUES), strict=True) if not spike]
    without, _ = run(wrap(train_step(linear, ADAMW, 2, guard=GUARD)), fresh(), kept)
    assert_same_bits((state.params, state.optimizer, state.spikes), (without.params, without.optimizer, without.spikes))
    assert (state.step, state.skipped) == (len(VALUES), 1)


def test_without_a_guard_the_state_and_the_metrics_are_as_ever() -> None:
    step, state = train_step(linear, ADAMW, 2), init_state({"w": torch.ones(16)}, ADAMW, KEY)
    state, found = run(step, state, VALUES)
    assert not any("spike" in row or "loss_limit" in row for row in found)
    assert not any(path.startswith("spikes") for path in tree.paths(state))


def test_what_is_not_finite_is_no_spike_and_not_remembered() -> None:
    values = [*VALUES[:6], np.nan, np.inf, 1.0]
    state, found = run(train_step(linear, ADAMW, 2, guard=GUARD), fresh(), values)
    assert [row["spike"] for row in found] == [0] * 9
    assert [row["skipped"] for row in found] == [0] * 6 + [1, 2, 0]
    assert state.spikes.count == 7


def test_a_spike_does_not_move_the_loss_scale() -> None:
    scaling = LossScaling(8.0, 1.0)
    step = train_step(linear, ADAMW, 2, scaling=scaling, guard=GUARD)
    state, found = run(step, fresh(scaling=scaling), VALUES)
    assert [row["spike"] for row in found] == spikes_of(VALUES)
    assert {row["loss_scale"] for row in found} == {8.0}
    assert state.loss_scale.good == len(VALUES)


@compiles
@pytest.mark.slow
def test_compiled_spikes_are_skipped_too() -> None:
    without_fused = attrs.evolve(ADAMW, fused_update=None)
    step = jit(train_step(linear, without_fused, 1, guard=GUARD), donate=1, backend=inductor)
    _, found = run(step, fresh(), VALUES)
    assert [row["spike"] for row in found] == spikes_of(VALUES)


def over_ranks(rank: int, size: int, sharding: str, expected: list[dict[str, float]]) -> None:
    mesh = mesh_of(rank, size, sharding=sharding, num_microbatches=2)
    state = init_state({"w": mesh.cut("w", torch.ones(32))}, ADAMW, KEY, guard=GUARD)
    step, found = train_step(linear, ADAMW, 1, mesh, guard=GUARD), []
    for value in VALUES:
        state, metrics = step(state, torch.full((4,), value))
        found.append({name: metric.item() for name, metric in metrics.items()})
    assert found == expected


@pytest.mark.parametrize("sharding", ["replicate", "fsdp"])
def test_ranks_see_the_same_spikes(sharding: str) -> None:
    state = init_state({"w": torch.ones(32)}, ADAMW, KEY, guard=GUARD)
    _, expected = run(train_step(linear, ADAMW, 2, guard=GUARD), state, VALUES)
    on_ranks(2, over_ranks, sharding, expected)
