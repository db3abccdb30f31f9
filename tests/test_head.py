"""The cross entropy of logits that are never whole, against torch's of whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from fnrecipe import head
from fnrecipe.head import Head
from fnrecipe.transforms import trace

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
    return lambda x, weight, targets, mask: head.cross_entropy(Head(x, weight, chunk), targets, mask)


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


def test_small_probabilities_and_gradients_do_not_underflow_in_float16() -> None:
    """One target is so likely that the slopes of the others are no normal numbers of float16."""
    source, vocab, scale = torch.Generator().manual_seed(0), 40_000, 2.0**14
    x, weight = torch.randn(1, 3, 8, generator=source).half(), 0.02 * torch.randn(vocab, 8, generator=source)
    weight = weight.half().float()
    weight[0] = 3 * x[0, 0].float()
    targets, mask = torch.tensor([[0, 5, 7]]), torch.ones(1, 3, dtype=torch.bool)

    def gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return grad(lambda x, weight: scale * function(x, weight, targets, mask)[0], (0, 1))(x, weight)

    found, expected = gradient(chunked(2), x), gradient(whole, x.float())
    assert [f.dtype for f in found] == [torch.float16, torch.float32]
    for f, e in zip(found, expected, strict=True):
        assert ((f.float() - e).norm(dim=-1) <= 0.01 * e.norm(dim=-1)).all()
    assert (expected[0][0, 0] / scale).abs().max() < 1e-3
