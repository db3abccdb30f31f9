"""Casts that undo each other are dropped from a graph, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe.compiler import trace
from fnrecipe.compiler.casts import read_narrow
from fnrecipe.ops import norms
from fnrecipe.transforms import jit
from tests.helpers import assert_same_bits

HALF, OTHER = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))


def casts(function: Any, *args: Tensor, donate: int = 0) -> int:
    """How many casts are left in the graph, whose results are those of the function."""
    graph, _ = trace(function, args, donate=donate)
    expected = function(*args)
    assert_same_bits(jit(function, donate=donate)(*map(torch.clone, args)), expected)
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default))


def round_trip(x: Tensor) -> Tensor:
    return x.float().bfloat16()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: round_trip(x) @ y,
        lambda x, y: round_trip(x).t() @ y,
        lambda x, y: round_trip(round_trip(x)) @ round_trip(y),
        lambda x, y: round_trip(x @ y).sin(),
        lambda x, y: x.double().bfloat16() @ y,
    ],
)
def test_a_value_that_was_widened_and_narrowed_is_itself(function: Any) -> None:
    assert casts(function, HALF, OTHER) == 0


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (lambda x, y: x.float().half() @ y.half(), 3),
        (lambda x, y: x.float() @ y.float(), 2),
        (lambda x, y: (x.float().bfloat16() @ y).sum() + x.float().sum(), 1),
    ],
)
def test_other_casts_stay(function: Any, number: int) -> None:
    assert casts(function, HALF, OTHER) == number


def test_a_cast_that_narrows_first_stays() -> None:
    assert casts(lambda x: x.bfloat16().float().sin(), HALF.float() + 1e-4) == 2


def test_a_result_stays_a_copy() -> None:
    assert casts(round_trip, HALF) == 2
    assert casts(lambda x: round_trip(x).t(), HALF) == 2


def test_what_is_written_into_a_donated_buffer_stays_a_copy() -> None:
    assert casts(lambda x, y: (round_trip(y), round_trip(x)), HALF, OTHER, donate=2) == 4


def norm_of(x: Tensor) -> Tensor:
    return norms([x], 2, torch.float32)


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (lambda x, y: (norm_of((x @ y).float()), x.sin()), 0),
        (lambda x, y: (norm_of((x @ y).float()), (x @ y).float().sin()), 1),
        (lambda x, y: (norm_of((x @ y).float().t().t()), x), 1),
        (lambda x, y: (norm_of((x @ y).float().add_(1)), x), 1),
        (lambda x, y: (norm_of(x.half().float()), y), 1),
    ],
)
def test_a_norm_is_taken_of_what_was_widened_for_it(function: Any, number: int) -> None:
    graph, _ = trace(function, (HALF, OTHER))
    expected = graph(HALF, OTHER)
    read_narrow(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)) == number
    assert_same_bits(graph(HALF, OTHER), expected)
