"""Products with a common operand are computed as one, and give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe import optim, random
from fnrecipe.compiler import inductor, trace
from fnrecipe.compiler.regions import regions_of
from fnrecipe.compiler.stack_products import stack_products
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.step import init_state, train_step
from tests.helpers import TINY, compiles, documents, packed

mm = torch.ops.aten.mm.default
CHAIN = attrs.evolve(optim.adamw(lambda step: torch.full((), 1e-3, dtype=torch.float64)), fused_update=None)
BATCH = packed([documents(15, seed=1), documents(4, 9, seed=2)], 16)
X, W, V, G = (torch.linspace(-1, 2, rows * columns).view(rows, columns) for rows, columns in ((6, 4), (3, 4), (5, 4), (6, 3)))


def products(graph: GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=mm))


def stacked(function: Callable[..., Any], *args: Tensor) -> tuple[int, int]:
    """Products before and after; the results of the graph are within rounding what they were."""
    graph, _ = trace(function, args)
    before, expected = products(graph), graph(*args)
    stack_products(graph)
    found = graph(*args)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one.is_contiguous() == other.is_contiguous()
    return before, products(graph)


def train_graph() -> tuple[GraphModule, list[Tensor]]:
    key = random.key(0)
    state = init_state(llama.init(TINY, key), CHAIN, key)
    loss = next_token_loss(partial(llama.apply, TINY))
    args = (state, BATCH)
    graph, _ = trace(train_step(loss, CHAIN, 1), args)
    return graph, torch.utils._pytree.tree_leaves(args)


def test_a_layer_has_four_products_instead_of_seven_and_eight_on_the_way_back_instead_of_fourteen() -> None:
    graph, leaves = train_graph()
    regions, expected = regions_of(graph), graph(*leaves)
    assert [*map(products, regions)] == [7, 14]
    for part in (graph, *regions):
        stack_products(part)
    assert [*map(products, regions)] == [4, 8]
    for one, other in zip(graph(*leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@compiles
def test_inductor_takes_the_result() -> None:
    graph, leaves = train_graph()
    expected = graph(*leaves)
    for part in (graph, *regions_of(graph)):
        stack_products(part)
    for one, other in zip(inductor(graph)(*leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_outputs_gradients_and_sums() -> None:
    h, v = X[:, :2].contiguous(), V[:2]
    assert stacked(lambda x, w, v: (x @ w.t(), x @ v.t()), X, W, V) == (2, 1)
    assert stacked(lambda x, g, h: (g.t() @ x, h.t() @ x), X, G, h) == (2, 1)
    assert stacked(lambda g, w, h, v: (g @ w + h @ v,), G, W, h, v) == (2, 1)
    assert stacked(lambda g, w, h, v, x: ((g @ w).view(2, 3, 4) + (h @ v).view(2, 3, 4) + x.view(2, 3, 4),), G, W, h, v, X) == (
        2,
        1,
    )


def test_what_is_read_elsewhere_or_comes_later_stays() -> None:
    def read(g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first, second = (g @ w).view(2, 3, 4), (g * 2 @ w).view(2, 3, 4)
        return first + second, first

    def later(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = x @ w.t()
        return first, x @ (w * first.sum()).t()

    assert stacked(read, G, W) == (2, 2)
    assert stacked(later, X, W) == (2, 2)


def test_wide_products_stay() -> None:
    wide = torch.ones(1024, 4)
    assert stacked(lambda x, w, v: (x @ w.t(), x @ v.t()), X, wide, wide + 1) == (2, 2)
    assert stacked(lambda x, w, v: (x @ w.t(), x @ v.t()), X, wide, wide[:7] + 1) == (2, 1)
