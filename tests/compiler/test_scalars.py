"""Numbers that all elements of a tensor need are computed once: which ones, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe.compiler import inductor, trace
from fnrecipe.compiler.scalars import materialize_scalars
from fnrecipe.ops import opaque_clone
from fnrecipe.transforms import jit
from tests.helpers import compiles

X, COUNT = torch.linspace(-1, 1, 64), torch.tensor(3)


def corrected(x: Tensor, count: Tensor) -> Tensor:
    return x / (1 - 0.9 ** count.double()).sqrt()


def kept(function: Callable[..., Any], *args: Tensor) -> list[str]:
    """The operations whose numbers are kept; the graph must give what it gave."""
    graph, _ = trace(function, args)
    (before,) = graph(*args)
    materialize_scalars(graph)
    assert torch.equal(graph(*args)[0], before)
    numbers = graph.graph.find_nodes(op="call_function", target=opaque_clone.default)
    return [str(number.args[0].target) for number in numbers]  # type: ignore[union-attr]


def test_the_last_number_before_a_tensor_is_kept_and_none_before_it() -> None:
    assert kept(corrected, X, COUNT) == ["aten.sqrt.default"]


def test_constants_and_inputs_are_not_kept() -> None:
    assert kept(lambda x, count: torch.where(x > count, x, torch.tensor(-torch.inf)), X, COUNT) == []


def test_a_number_that_is_written_into_later_is_not_kept() -> None:
    def written(x: Tensor, count: Tensor) -> Tensor:
        number = count * 2
        first = x * number
        return first + x * number.add_(1)

    assert "aten.mul.Tensor" not in kept(written, X, COUNT)


@pytest.mark.slow
@compiles
def test_compiled_it_gives_the_same() -> None:
    torch.testing.assert_close(jit(corrected, backend=inductor)(X, COUNT), corrected(X, COUNT))
