"""AdamW as one operation of the graph. The kernel is that of a GPU (`tests/gpu`); here one by the formula stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from fnrecipe import ops, optim, random, tree
from fnrecipe.compiler import inductor, interpreter, trace
from fnrecipe.compiler.casts import read_narrow
from fnrecipe.models import llama
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.optim import fused_adamw, stochastic_rounding
from fnrecipe.optim.schedule import cosine_annealing
from fnrecipe.parallel.mesh import Axis, Shard
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import TINY, compiles, documents, packed

KEY = random.key(3)
UPDATE = optim.adamw(cosine_annealing(0.01, num_warmup_steps=2, num_steps=6, final_scale=0.1), max_norm=0.5)
LOSS = next_token_loss(partial(llama.apply, TINY, policy=Policy(torch.bfloat16)))
BATCH = packed([documents(15, seed=1), documents(4, 9, seed=2)], 16)
places: list[list[int]] = []


def by_the_formula(
    params: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    numbers: Tensor,
    accept: Tensor,
    seed: Tensor,
    starts: list[int],
    decays: list[float],
    b1: float,
    b2: float,
    eps: float,
) -> None:
    places.append([tensor.data_ptr() for tensors in (params, means, squares) for tensor in tensors])
    divisor, rate, step_size, root_bias = numbers
    for p, g, m, v, decay in zip(params, gradients, means, squares, decays, strict=True):
        divided = g.float() / divisor
        mean, square = b1 * m + (1 - b1) * divided, b2 * v + (1 - b2) * divided**2
        moved = p - rate * decay * p - step_size * mean / (square.sqrt() / root_bias + eps)
        for old, new in ((p, moved), (m, mean), (v, square)):
            old.copy_(torch.where(accept, new, old))


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_adamw, "has_triton", lambda device: True)
    library = torch.library.Library("fnrecipe", "IMPL")
    library.impl("adamw", by_the_formula, "CPU")
    places.clear()
    yield
    library._destroy()


def start() -> State:
    return init_state(llama.init(TINY, KEY), UPDATE, KEY)


def test_the_graph_has_one_operation_which_reads_gradients_as_they_come_and_writes_into_the_state() -> None:
    graph, _ = trace(train_step(LOSS, UPDATE, 1), (start(), BATCH), donate=1)
    read_narrow(graph)
    (node,) = graph.graph.find_nodes(op="call_function", target=ops.adamw.default)
    params, gradients, means, squares, *_ = node.args
    assert {each.op for tensors in (params, means, squares) for each in tensors} == {"placeholder"}
    matrices = [each.meta["val"].dtype for each in gradients if each.meta["val"].ndim == 2]
    assert matrices.count(torch.bfloat16) == len(matrices) - 1  # that of the tied embedding is a sum of two


@compiles
@pytest.mark.parametrize("backend", [interpreter, pytest.param(inductor, marks=pytest.mark.slow)], ids=["trace", "inductor"])
def test_it_is_the_chain_within_rounding_and_in_place(backend: Any) -> None:
    def update(transform: Any, state: Tree, gradients: Tree, number: Tensor, accept: Tensor) -> tuple[Tree, Tensor]:
        mean = optim.mean_gradient(gradients, torch.tensor(3.0))
        params, optimizer, _, made = optim.guarded_update(transform, mean, *reversed(state), number, accept, KEY)
        return (params, optimizer), made

    generator = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(8, 16, generator=generator), "b": torch.randn(7, generator=generator)}
    chain = attrs.evolve(UPDATE, fused_update=None)
    found, expected = ((params, UPDATE.init(params)) for _ in range(2))
    found = tree.map(torch.clone, found)
    step = jit(partial(update, UPDATE), donate=1, backend=backend)
    for number, accept in ((1, True), (2, False), (3, True)):
        gradients = {
            "a": torch.randn(16, 8, generator=generator).bfloat16().float().T,
            "b": torch.randn(7, generator=generator),
        }
        given = gradients, torch.tensor(number), torch.tensor(accept)
        found, made = step(found, *given)
        expected, also = update(chain, expected, *given)
        assert bool(made) == bool(also) == accept
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    leaves = [*tree.leaves(found[0]), *tree.leaves((found[1][1]["mean"], found[1][1]["square"]))]
    assert places == [[leaf.data_ptr() for leaf in leaves]] * 3


@pytest.mark.parametrize("index", [0, 1])
def test_a_place_says_which_random_number_each_element_of_a_part_has(index: int) -> None:
    whole, shard, tensor = torch.empty(8, 16, 2), Axis("shard", 2, index), Axis("tensor", 2, 1)
    rows, columns = whole.chunk(2, 0)[index], whole.chunk(2, 1)[index]
    both = Shard(Shard(whole.chunk(2, 1)[1].chunk(2, 0)[index], 0, shard), 1, tensor)
    vector = Shard(torch.empty(6), 0, shard)
    for part in (whole, Shard(rows, 0, shard), Shard(columns, 1, shard), both, vector, torch.empty(())):
        (local,) = tree.leaves(part)
        start, inner, stride = stochastic_rounding.place("w", part)
        number = torch.arange(local.numel())
        counter = start + (number // inner * stride + number % inner) * stochastic_rounding.GAMMA
        seed = torch.tensor(0)
        assert torch.equal(mixed(counter.view(local.shape)), stochastic_rounding.random_bits(seed, "w", part))


def mixed(counter: Tensor) -> Tensor:
    word = stochastic_rounding.WORD
    bits = counter & word
    bits = ((bits ^ (bits >> 30)) * stochastic_rounding.FIRST) & word
    return ((bits ^ (bits >> 27)) * stochastic_rounding.SECOND) & word


def test_a_tensor_that_is_cut_along_a_later_dimension_has_no_place() -> None:
    with pytest.raises(ValueError, match="place: expected w to be cut along its first two dimensions"):
        stochastic_rounding.place("w", Shard(torch.empty(2, 2, 2), 2, Axis("shard", 2, 1)))
