"""Functions that a traced graph calls: traced once, and the same as if they were written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fnrecipe.compiler import inductor, trace
from fnrecipe.compiler.cost import operation_costs
from fnrecipe.compiler.regions import all_nodes, graph_of, name_calls
from fnrecipe.transforms import jit, remat
from fnrecipe.transforms.region import region
from tests.helpers import assert_same_bits, compiles

X = torch.linspace(-1, 1, 6).view(2, 3)


def loss(x: Tensor, y: Tensor) -> Tensor:
    return remat(lambda z: torch.tanh(z * y) @ y.t())(x).square().sum()


def twice(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda x: (function(x, x + 1), function(x * 2, x))


def test_it_is_traced_once_for_all_its_calls_and_gives_what_it_gives_without() -> None:
    calls = []

    def counted(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return grad(loss)(x, y)

    graph, _ = trace(lambda x: twice(region(counted, "slope"))(x), (X,))
    assert len(calls) == 1
    called = [found for node in graph.graph.nodes if (found := graph_of(graph, node))]
    assert len(called) == 2
    assert called[0] is called[1]
    assert_same_bits(tuple(graph(X)), twice(grad(loss))(X))


def test_calls_of_one_region_have_one_name_by_which_torch_compiles_it_once() -> None:
    one, other = region(torch.sin, "wave"), region(torch.cos, "wave")
    graph, _ = trace(lambda x: (one(x), one(x * 2), other(x)), (X,))
    name_calls(graph)
    names = [node.args[1] for node in graph.graph.nodes if graph_of(graph, node)]
    assert names[0] == names[1] != names[2]


def test_it_costs_as_much_as_what_it_calls() -> None:
    graph, _ = trace(lambda x: twice(region(grad(loss), "slope"))(x), (X,))
    flat, _ = trace(twice(grad(loss)), (X,))
    assert operation_costs(graph) == operation_costs(flat)
    assert sum(node.op == "output" for node in all_nodes(graph)) == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (x, y),
        lambda x, y: (x.view(-1), x[1:]),
        lambda x, y: (z := x + y, z),
        lambda x, y: (z := x + y, z.t()),
        lambda x, y: {"sum": x + y, "nothing": ()},
    ],
)
def test_results_are_apart_so_that_one_may_be_written_into(function: Callable[..., Any]) -> None:
    def written(call: Callable[..., Any]) -> Callable[[Tensor], Any]:
        def outer(x: Tensor) -> Any:
            found = torch.utils._pytree.tree_map(torch.clone, call(x, x + 1))
            for leaf in torch.utils._pytree.tree_leaves(found):
                leaf.add_(1)
            return found, call(x, x * 2), x

        return outer

    before = X.clone()
    assert_same_bits(jit(lambda x: written(region(function, "it"))(x))(X), written(function)(X))
    assert torch.equal(before, X)


def test_outside_of_a_trace_and_under_another_transform_it_is_the_function() -> None:
    both = region(lambda x: x.sin(), "sine")
    assert torch.equal(both(X), X.sin())
    assert torch.equal(vmap(both)(X), X.sin())
    graph, _ = trace(vmap(region(lambda x: x.sin(), "sine")), (X,))
    assert not any(graph_of(graph, node) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(X)[0], X.sin())


@pytest.mark.slow
@compiles
def test_inductor_compiles_it() -> None:
    found = jit(lambda x: twice(region(grad(loss), "slope"))(x), backend=inductor)(X)
    torch.testing.assert_close(found, twice(grad(loss))(X))
