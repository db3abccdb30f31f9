"""Averages of parameters against their closed forms, and against those of torch.optim.swa_utils."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fnrecipe import tree
from fnrecipe.optim.average import Average, Averaging, init_average, update_average
from fnrecipe.step import averaged
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, draw
from tests.ranks import assembled, mesh_of, on_ranks
from tests.transforms.test_gradients import FUSED, HALF, PURE, chosen, train

YES, NO = torch.tensor(True), torch.tensor(False)


def params(step: int, dtype: torch.dtype = torch.float64) -> Tree:
    like = {"layers": {"0": torch.zeros(3, 4, dtype=dtype)}, "norm": torch.zeros(5, dtype=dtype)}
    return draw(like, seed=step)


def average_of(averaging: Averaging, steps: int, dtype: torch.dtype = torch.float64, skipped: int = 0) -> Average:
    """That of the parameters of so many steps; one may be skipped."""
    average = init_average(params(0, dtype))
    for step in range(1, steps + 1):
        made = NO if step == skipped else YES
        average = update_average(averaging, average, params(step, dtype), torch.tensor(step), made)
    return average


def by_torch(function: object, steps: list[int], start: Tree) -> Tree:
    means = [leaf.clone() for leaf in tree.leaves(start)]
    for number, step in enumerate(steps):
        function(means, tree.leaves(params(step)), number)  # type: ignore[operator]
    return tree.like(start, means)


def test_a_tail_average_is_that_of_torch_and_the_mean() -> None:
    steps = [5, 7, 9]
    found = average_of(Averaging(start=3, every=2), 10)
    assert found.count == 3
    zeros = tree.map(torch.zeros_like, params(0))
    assert_close(found.mean, by_torch(get_swa_multi_avg_fn(), steps, zeros), 1e-12)
    assert_close(found.mean, tree.map(lambda *leaves: torch.stack(leaves).mean(0), *map(params, steps)), 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_an_exponential_average_is_that_of_torch_without_its_bias(decay: float) -> None:
    found = average_of(Averaging(decay), 9)
    zeros = tree.map(torch.zeros_like, params(0))
    biased = by_torch(get_ema_multi_avg_fn(decay), [*range(1, 10)], zeros)
    assert_close(found.mean, tree.map(lambda leaf: leaf / (1 - decay**9), biased), 1e-9)
    weights = [decay ** (9 - step) * (1 - decay) / (1 - decay**9) for step in range(1, 10)]
    by_weights = [tree.map(lambda leaf, w=weight: leaf * w, params(step)) for step, weight in enumerate(weights, 1)]
    assert_close(found.mean, tree.map(lambda *leaves: sum(leaves), *by_weights), 1e-9)


def test_up_to_its_beginning_it_is_the_parameters() -> None:
    averaging = Averaging(0.9, start=3, every=2)
    for steps in (1, 3, 4, 5):
        found = average_of(averaging, steps)
        assert_same_bits(found.mean, params(steps))
        assert found.count == (steps == 5)


def test_a_skipped_step_leaves_it_as_it_was() -> None:
    averaging = Averaging(0.9)
    found = update_average(averaging, average_of(averaging, 3), params(9), torch.tensor(4), NO)
    assert_same_bits(found, average_of(averaging, 3))
    assert average_of(averaging, 6, skipped=4).count == 5


def test_of_half_precision_it_is_float32() -> None:
    found = average_of(Averaging(), 4, torch.bfloat16)
    assert {leaf.dtype for leaf in tree.leaves(found.mean)} == {torch.float32}
    expected = tree.map(
        lambda *leaves: torch.stack(leaves).float().mean(0), *(params(step, torch.bfloat16) for step in range(1, 5))
    )
    assert_close(found.mean, expected, 1e-6)


def test_traced_it_gives_the_same_bits() -> None:
    averaging = Averaging(0.99)
    average, step = average_of(averaging, 2, torch.float32), torch.tensor(3)

    def function(average: Average, params: Tree, step: Tensor, made: Tensor) -> Average:
        return update_average(averaging, average, params, step, made)

    expected = function(average, params(3, torch.float32), step, YES)
    assert_same_bits(jit(function)(average, params(3, torch.float32), step, YES), expected)


def test_a_step_averages_what_it_trains_and_changes_nothing_else() -> None:
    def trains(path: str, parameter: Tensor) -> bool:
        return not path.startswith("layers.0.")

    plain, metrics = train(mesh_of(0, 1), FUSED, False, trains=trains)
    state, found = train(mesh_of(0, 1), FUSED, False, trains=trains, averaging=Averaging(0.5))
    assert_same_bits((state.params, state.optimizer, found), (plain.params, plain.optimizer, metrics))
    assert state.average.count == 4, "the third of five steps is skipped"
    assert averaged(plain) is plain.params
    shown, latest = tree.paths(averaged(state)), tree.paths(state.params)
    assert list(shown) == list(latest)
    for path, leaf in shown.items():
        assert torch.equal(leaf, latest[path]) is path.startswith("layers.0."), path


def check_ranks(rank: int, size: int) -> None:
    for options in ({}, HALF, PURE):
        alone, _ = train(mesh_of(0, 1), FUSED, False, averaging=Averaging(0.9), **options)
        for mode in chosen("zero1", "fsdp").values() if not options else chosen("fsdp").values():
            state, _ = train(mesh_of(rank, size, **mode), FUSED, False, averaging=Averaging(0.9), **options)
            assert_same_bits(assembled(size, state), tree.paths(alone))


@pytest.mark.slow
def test_it_is_the_same_bits_on_two_ranks() -> None:
    on_ranks(2, check_ranks)
