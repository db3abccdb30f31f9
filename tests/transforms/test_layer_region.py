"""Regions that are differentiated, as layers are: traced once for each kind, with the bits of the function itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx import GraphModule

from fnrecipe import random, tree
from fnrecipe.compiler import inductor, interpreter, trace
from fnrecipe.compiler.regions import graph_of
from fnrecipe.models import llama
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.transforms import evaluation, gradients, jit, remat
from fnrecipe.transforms.region import region
from tests.helpers import TINY, assert_close, assert_same_bits, compiles, documents, packed
from tests.models.families import random_params, tiny

CONFIG = attrs.evolve(TINY, num_layers=4)
PARAMS, KEY = llama.init(CONFIG, random.key(3)), random.key(4)
BATCH = packed([documents(9, 7, seed=row) for row in range(4)], 16)
X = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
W = torch.linspace(0.5, 1, 9, dtype=torch.float64).view(3, 3)


def called(graph: GraphModule) -> Counter[GraphModule]:
    """How often a graph calls each of its regions."""
    return Counter(found for node in graph.graph.nodes if (found := graph_of(graph, node)))


def slope(policy: Policy = Policy(), microbatches: int = 1, trains: Any = lambda *_: True) -> Callable[..., Any]:
    return gradients(next_token_loss(partial(llama.apply, CONFIG, policy=policy)), microbatches, trains=trains)


HOW: dict[str, tuple[dict[str, Any], list[int]]] = {
    "plain": ({}, [4, 4]),
    "every second layer": ({"policy": Policy(remat="layerwise", every_nth_layer=2)}, [2, 2, 2, 2]),
    "selective, bfloat16": ({"policy": Policy(torch.bfloat16, remat="selective")}, [4, 4]),
    "two microbatches": ({"microbatches": 2}, [4, 4]),
    "frozen": ({"trains": lambda path, leaf: path.startswith("layers.2.")}, [2, 1, 1, 1, 1]),
}
"""And the calls of each region: the first two of the frozen have no backward pass, the third none of its input."""


@pytest.mark.parametrize("how", HOW)
def test_layers_of_a_kind_are_traced_once_and_have_the_bits_of_layers_that_are_not(how: str) -> None:
    options, calls = HOW[how]
    graph, spec = trace(slope(**options), (PARAMS, BATCH, KEY))
    inner = next(iter(called(graph))) if "microbatches" in options else graph
    assert sorted(called(inner).values(), reverse=True) == calls
    found = interpreter(graph)(*tree.leaves((PARAMS, BATCH, KEY)))
    assert not called(inner)
    assert_same_bits(torch.utils._pytree.tree_unflatten(list(found), spec), slope(**options)(PARAMS, BATCH, KEY))


def test_layers_with_windows_and_without_are_two_kinds() -> None:
    model, config = find_model("gemma3"), tiny("gemma3", num_layers=4, sliding_window=5)
    loss = next_token_loss(partial(model.apply, config, policy=Policy()))
    params = random_params(model, config)
    graph, _ = trace(grad(loss, has_aux=True), (params, BATCH))
    assert len(called(graph)) == 4
    assert sum(called(graph).values()) == 8
    found = interpreter(graph)(*tree.leaves((params, BATCH)))
    assert_same_bits(list(found), tree.leaves(grad(loss, has_aux=True)(params, BATCH)))


def test_an_evaluation_has_regions_without_backward_passes() -> None:
    evaluate = evaluation(next_token_loss(partial(llama.apply, CONFIG)))
    graph, _ = trace(evaluate, (PARAMS, BATCH))
    assert [*called(graph).values()] == [4]
    assert_same_bits(jit(evaluate)(PARAMS, BATCH), evaluate(PARAMS, BATCH))


def test_widened_weights_are_not_operands() -> None:
    half = tree.map(lambda leaf: leaf.to(torch.bfloat16), PARAMS)
    graph, _ = trace(slope(Policy(torch.bfloat16)), (half, BATCH, KEY))
    for node in graph.graph.nodes:
        if graph_of(graph, node):
            assert not [x.name for x in node.args[2:] if x.meta["val"].dtype == torch.float32 and x.target is CAST]
    forward, backward = called(graph)
    matrices = [node.meta["val"] for node in backward.graph.output_node().args[0] if node.meta["val"].dim() == 2]
    assert {value.dtype for value in matrices} == {torch.bfloat16}, "callers cast gradients, with what they do with them"
    casts = [node.meta["val"] for node in forward.graph.find_nodes(op="call_function", target=CAST)]
    assert not [value for value in casts if value.dim() == 2]


CAST = torch.ops.aten._to_copy.default


def squares(*values: Tensor) -> Tensor:
    return torch.stack([value.square().sum() for value in values]).sum()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "products": lambda x, w: torch.tanh(x @ w) @ w.t(),
    "several results": lambda x, w: {"a": x @ w, "b": (w.sin(), ())},
    "a result that nobody reads": lambda x, w: (x @ w, x.exp()),
    "arguments as they are": lambda x, w: (x, w, x.view(-1)[1:]),
    "views of what is kept": lambda x, w: (lambda y: (y.exp().t() * y.t()).t())((x @ w).view(3, 2).t()),
    "pieces": lambda x, w: (lambda y, z: y.exp() * z.exp())(*(x @ w).chunk(2)),
    "an expanded gradient": lambda x, w: x.sum() * w.sum(),
    "recomputed": lambda x, w: remat(lambda x, w: torch.tanh(x @ w).exp())(x, w) + x,
    "a constant": lambda x, w: x @ w * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).exp(),
    "written into what it allocates": lambda x, w: (x @ w).clone().mul_(2).exp(),
    "without one of them": lambda x, w: x.sin(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_have_the_bits_of_the_functions(name: str) -> None:
    function = FUNCTIONS[name]

    def slope(function: Callable[..., Any]) -> Callable[..., Any]:
        def loss(x: Tensor, w: Tensor, y: Tensor, v: Tensor) -> Tensor:
            return squares(*tree.leaves(function(x, w))[:1], *tree.leaves(function(y, v)))

        return grad(loss, (0, 1, 2, 3))

    given = X, W, X + 1, W * 2
    graph, _ = trace(slope(region(function, "it", inline=True)), given)
    assert [*called(graph).values()] == [2, 2]
    assert_same_bits(tuple(graph(*given)), slope(function)(*given))
    assert_same_bits(tuple(interpreter(graph)(*given)), slope(function)(*given))


def test_a_gradient_laid_out_otherwise_is_copied() -> None:
    def loss(function: Callable[..., Any], x: Tensor) -> Tensor:
        return (function(x).t() @ x).sum() + function(x).sum()

    expected = grad(partial(loss, torch.exp))(X)
    torch.testing.assert_close(jit(grad(partial(loss, region(torch.exp, "it"))))(X), expected, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's own decompositions for `jvp`
def test_other_transforms_get_the_function() -> None:
    def loss(function: Callable[..., Any], x: Tensor) -> Tensor:
        return function(x, W).square().sum()

    transforms: list[Callable[[Any], Any]] = [
        lambda call: vmap(lambda x: call(x, W)),
        lambda call: vmap(grad(lambda x: call(x, W).sum())),
        lambda call: grad(lambda x: vmap(lambda x: call(x, W))(x).square().sum()),
        lambda call: grad(lambda x: grad(partial(loss, call))(x).square().sum()),
        lambda call: lambda x: jvp(partial(loss, call), (x,), (x,)),
        lambda call: lambda x: jvp(grad(partial(loss, call)), (x,), (x,)),
    ]
    function = FUNCTIONS["products"]
    for transformed in transforms:
        graph, spec = trace(transformed(region(function, "it")), (X,))
        assert not called(graph)
        assert_same_bits(torch.utils._pytree.tree_unflatten(list(graph(X)), spec), transformed(function)(X))


def test_a_second_derivative_of_a_first_one_taken_outside_is_refused() -> None:
    function = region(FUNCTIONS["products"], "it")

    def second(x: Tensor) -> Tensor:
        pull = vjp(lambda x: function(x, W), x)[1]
        slope: Tensor = grad(lambda y: pull(y)[0].square().sum())(x)
        return slope

    with pytest.raises(NotImplementedError, match="no second derivative"):
        trace(second, (X,))


def test_a_function_that_writes_into_its_arguments_is_no_region() -> None:
    def function(x: Tensor) -> Tensor:
        return x.mul_(2).exp()

    def outer(call: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda x: (y := x + 1, call(y), y)

    graph, _ = trace(outer(region(function, "it")), (X,))
    assert not called(graph)
    assert_same_bits(tuple(graph(X)), outer(function)(X))


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("how", ["two microbatches", "frozen"])
def test_inductor_compiles_them(how: str) -> None:
    options, _ = HOW[how]
    found = jit(slope(**options), backend=inductor)(PARAMS, BATCH, KEY)
    assert_close(found, slope(**options)(PARAMS, BATCH, KEY), 1e-5)
