"""The cross entropy of logits that are never whole, against torch's of whole ones."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.fx import Node

from fnrecipe.compiler import inductor, trace
from fnrecipe.nn import linear_cross_entropy
from fnrecipe.nn.linear_cross_entropy import DeferredLogits, chunk_size
from fnrecipe.transforms import jit
from tests.helpers import compiles

ROWS, LENGTH, WIDTH, VOCAB = 2, 6, 5, 31


def draws(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x, weight = torch.randn(ROWS, LENGTH, WIDTH, generator=source), torch.randn(VOCAB, WIDTH, generator=source)
    targets = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=source)
    return x.to(dtype), weight.to(dtype), targets, torch.rand(ROWS, LENGTH, generator=source) > 0.3


def whole(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    nats = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (nats * mask).sum(), nats


def chunked(chunk: int) -> Any:
    return lambda x, *others: linear_cross_entropy.cross_entropy(DeferredLogits(x, others[0], chunk), *others[1:])[:2]


@settings(deadline=None)
@given(st.integers(1, 2 * ROWS * LENGTH))
def test_values_and_gradients_are_those_of_whole_logits(chunk: int) -> None:
    given, args = chunked(chunk), draws(torch.float32)
    for found, expected in zip(given(*args), whole(*args), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(*(grad(f, (0, 1), has_aux=True)(*args)[0] for f in (given, whole)), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_value_of_the_traced_gradient_is_larger_than_the_logits_of_a_chunk() -> None:
    def largest(function: Any) -> int:
        graph, _ = trace(grad(function, (0, 1), has_aux=True), draws(torch.float32))
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "call_function"]
        return max(value.numel() for value in values if isinstance(value, Tensor))

    assert largest(whole) == ROWS * LENGTH * VOCAB
    assert largest(chunked(5)) == 5 * VOCAB


def test_the_logits_of_a_chunk_wait_for_the_gradient_of_the_one_before_it() -> None:
    """Whatever order a compiler chooses, they are not there at once."""
    graph, _ = trace(grad(chunked(4), (0, 1), has_aux=True), draws(torch.float32))
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    of_logits, of_weight = ([p for p in products if p.meta["val"].shape == shape] for shape in ((4, VOCAB), (VOCAB, WIDTH)))
    assert [len(of_logits), len(of_weight)] == [3, 3]
    for earlier, later in zip(of_weight, of_logits[1:], strict=False):
        assert depends(later, earlier)
    (results,) = graph.graph.output_node().args
    assert depends(results[0], of_weight[-1]), "nor are those of the last one kept until the gradient of x has gone its way"


def depends(node: Node, other: Node) -> bool:
    return node is other or any(depends(source, other) for source in node.all_input_nodes)


@pytest.mark.slow
@compiles
def test_compiled_it_gives_the_same() -> None:
    from torch._inductor.utils import run_and_get_code

    gradient = grad(chunked(5), (0, 1), has_aux=True)
    found, (code,) = run_and_get_code(jit(gradient, backend=inductor), *draws(torch.float32))
    torch.testing.assert_close(found[0], gradient(*draws(torch.float32))[0])
    allocated = re.findall(rf"empty_strided_cpu\(\(5, (?:{VOCAB}|s\d+)\)", code)
    assert len(allocated) == 1, "powers and slopes are written where the logits were, of all chunks of 5"


def test_half_precision_is_summed_in_float32() -> None:
    x, weight, targets, mask = draws(torch.float32)
    half = x.bfloat16()
    expected = grad(whole, (0, 1), has_aux=True)(half.float(), weight.bfloat16().float(), targets, mask)[0]
    found = grad(chunked(1), (0, 1), has_aux=True)(half, weight, targets, mask)[0]
    assert [f.dtype for f in found] == [torch.bfloat16, torch.float32]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.float(), e, rtol=0.02, atol=0.02)


def test_it_maps_over_seeds() -> None:
    x, weight, targets, mask = draws(torch.float32)
    both = vmap(grad(lambda w: chunked(4)(x, w, targets, mask)[0]))(torch.stack([weight, 2 * weight]))
    for found, w in zip(both, (weight, 2 * weight), strict=True):
        torch.testing.assert_close(found, grad(lambda w: whole(x, w, targets, mask)[0])(w))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, weight, targets, mask = draws(torch.float32)
    slope = grad(lambda x: chunked(4)(x, weight, targets, mask)[0])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda x: slope(x).square().sum())(x)


def test_small_probabilities_do_not_underflow_in_float16() -> None:
    """A target is so likely that the slopes of the others, which together weigh as much, are no numbers of float16."""
    source, vocab = torch.Generator().manual_seed(0), 40_000
    x, weight = torch.randn(1, 8, generator=source).half(), 1 + 0.02 * torch.randn(vocab, 8, generator=source)
    weight[0] = 1 + 2 * x[0].float()
    weight, targets, mask = weight.half().float(), torch.tensor([0]), torch.tensor([True])

    found = grad(lambda x: 2.0**14 * chunked(1)(x, weight, targets, mask)[0])(x)

    slopes = F.linear(x, weight.half()).double().softmax(-1) - F.one_hot(targets, vocab)
    expected = 2.0**14 * slopes @ weight.double()
    assert slopes[0, 1:].max() < 6e-8
    assert found.dtype == torch.float16
    assert (found.double() - expected).norm() < 0.15 * expected.norm()


def test_weights_of_a_batch_have_gradients_under_vmap() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 1, 6, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)
    targets, mask = torch.arange(6)[None] % 5, torch.ones(1, 6, dtype=torch.bool)

    def total(weight: Tensor, x: Tensor) -> Tensor:
        return linear_cross_entropy.cross_entropy(DeferredLogits(x, weight, 2), targets, mask)[0]

    found = grad(lambda weights: vmap(total)(weights, x).sum())(weights)
    expected = torch.stack([grad(total)(*pair) for pair in zip(weights, x, strict=True)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpus_form_which_writes_into_nothing_gives_what_the_cpus_does(dtype: torch.dtype) -> None:
    x, weight, targets, mask = draws(dtype)
    args = x.flatten(0, 1), targets.flatten(), mask.flatten(), weight, None, True
    of_gpu, of_cpu = (linear_cross_entropy._of_chunk(*args, in_place=in_place) for in_place in (False, True))
    for found, expected in zip(of_gpu, of_cpu, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_chunk_is_512_positions_on_a_cpu_and_an_even_share_of_at_most_600_mib_of_logits_elsewhere() -> None:
    head, on_gpu = torch.empty(50_304, 8, device="meta"), partial(torch.empty, device="meta", dtype=torch.bfloat16)
    assert chunk_size(torch.empty(16, 1024, 8), head) == 512
    assert chunk_size(on_gpu(16, 1024, 8), head) == 5462
    assert chunk_size(on_gpu(6, 1000, 8), head) == 6000
    assert chunk_size(on_gpu(1, 8), torch.empty(2**30, 8, device="meta")) == 1
