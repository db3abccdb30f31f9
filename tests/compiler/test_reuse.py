"""Memory of values that nobody reads any more, which results of elementwise operations get."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from fnrecipe import optim, random
from fnrecipe.compiler import trace
from fnrecipe.compiler.alias import mutates
from fnrecipe.compiler.reuse import reuse_memory
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.optim.schedule import constant
from fnrecipe.step import init_state, train_step
from fnrecipe.transforms import jit
from tests.helpers import TINY, assert_same_bits, documents, packed

X, Y = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def in_place(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if isinstance(node.target, OpOverload) and mutates(node)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: (x @ y) * 2, ["aten.mul_.Tensor"]),
        (lambda x, y: ((x @ y) * 2).exp() - x, ["aten.mul_.Tensor", "aten.exp_.default", "aten.sub_.Tensor"]),
        (lambda x, y: x + x @ y, ["aten.add_.Tensor"]),
        (lambda x, y: x - x @ y, []),
        (lambda x, y: torch.add(x, x @ y, alpha=2), []),
        (lambda x, y: (x * 2, y.exp()), []),
        (lambda x, y: ((z := x @ y) * 2, z), []),
        (lambda x, y: ((z := x @ y) * 2, z.t()), []),
        (lambda x, y: ((z := x @ y).exp() + z, ()), ["aten.add_.Tensor"]),
        (lambda x, y: (z := x @ y) + z, ["aten.add_.Tensor"]),
        (lambda x, y: (z := x @ y) + z.t(), []),
        (lambda x, y: ((z := x @ y).t() * 2) @ z, []),
        (lambda x, y: (x @ y).t() * 2, ["aten.mul_.Tensor"]),
        (lambda x, y: (x @ y)[:1] + x, []),
        (lambda x, y: (x @ y)[:1].expand(4, 4) * 2, []),
        (lambda x, y: (x @ y).double() * (x @ y), ["aten.mul_.Tensor"]),
        (lambda x, y: (x @ y) > 0, []),
        (lambda x, y: torch.split(x @ y, 2)[0] * 2, ["aten.mul_.Tensor"]),
    ],
)
def test_where_the_result_may_lie_in_an_operand(function: Callable[..., object], expected: list[str]) -> None:
    given = X.clone(), Y.clone()
    graph, _ = trace(function, given)
    before = graph(*given)
    reuse_memory(graph)
    assert in_place(graph) == expected
    assert_same_bits(tuple(graph(*given)), tuple(before))
    assert_same_bits(given, (X, Y))


def test_a_step_has_the_same_bits() -> None:
    update, key = optim.adamw(constant(0.01), max_norm=1.0), random.key(0)
    step = train_step(next_token_loss(partial(llama.apply, TINY)), update, 2)
    batch = packed([documents(20, 1, seed=0), documents(30, seed=1)], 64)
    results = []
    for backend in (lambda graph: graph, None):
        state = init_state(llama.init(TINY, key), update, key)
        run = jit(step, donate=1, **({"backend": backend} if backend else {}))
        for _ in range(2):
            state, _ = run(state, batch)
        results.append(state)
    assert_same_bits(*results)
