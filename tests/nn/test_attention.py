"""Attention against its definition, document by document, in every form of what is seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fnrecipe.compiler import trace
from fnrecipe.nn import cudnn_attention, document_attention
from fnrecipe.nn.attention import (
    AttentionMask,
    AttentionScope,
    attention,
    attention_mask,
    dense_mask,
    formula,
    softcapped_attention,
)
from fnrecipe.nn.ragged import ragged_mask
from tests.helpers import assert_close, assert_same_bits
from tests.nn import ragged_kernels

ROWS, LENGTH, HEADS, WIDTH, WINDOW = 2, 24, 4, 4, 5


def _mask(scope: AttentionScope, window: int | None = None) -> Callable[[Tensor], AttentionMask]:
    return lambda segments: attention_mask(segments, scope, window)


MASKS: dict[str, Callable[[Tensor], AttentionMask]] = {
    "document": _mask("document"),
    "document, window": _mask("document", WINDOW),
    "ragged": lambda segments: ragged_mask(segments, LENGTH),
    "ragged, window": lambda segments: ragged_mask(segments, LENGTH, WINDOW),
    "row": _mask("row"),
    "row, window": _mask("row", WINDOW),
}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> Iterator[None]:
    yield from ragged_kernels.registered()


@pytest.fixture(scope="module", autouse=True, params=[4, LENGTH])
def _blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks of which a row has several, and one as long as a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_attention, "_BLOCK", request.param)
        yield


def segments_of(*rows: list[int], length: int = LENGTH) -> Tensor:
    """Rows of documents of these lengths; the rest is padding."""
    numbers = [[number for number, size in enumerate(row) for _ in range(size)] for row in rows]
    return torch.tensor([row + [-1] * (length - len(row)) for row in numbers])


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
    """Rows that are cut into documents anywhere, with or without padding behind them."""
    cuts = st.lists(st.integers(0, LENGTH), max_size=5, unique=True).map(sorted)
    ends = [draw(cuts) for _ in range(ROWS)]
    return segments_of(*([b - a for a, b in zip([0, *row], row, strict=False) if b > a] for row in ends))


def inputs(groups: int, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((ROWS, length, number, WIDTH) for number in (HEADS, groups, groups))
    query, key, value = (2 * torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return query, key, value


def by_definition(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int = LENGTH) -> Tensor:
    """One position and head after the other."""
    groups, rows = query.shape[1] // key.shape[1], []
    for row in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            keys, values, places = key[row, head // groups], value[row, head // groups], []
            for place, number in enumerate(segments[row].tolist()):
                seen = [other for other in range(max(place + 1 - window, 0), place + 1) if segments[row, other] == number]
                scores = keys[seen] @ query[row, head, place] / query.shape[-1] ** 0.5
                places.append(torch.softmax(scores, 0) @ values[seen])
            heads.append(torch.stack(places))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def seen_by(kind: str, segments: Tensor) -> tuple[Tensor, int]:
    """Segments and window for the definition."""
    return torch.zeros_like(segments) if "row" in kind else segments, WINDOW if "window" in kind else LENGTH


WEIGHTS = torch.randn(ROWS, HEADS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def weighted(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    mixed = function(*args)
    return (mixed * WEIGHTS.to(mixed.dtype)).sum(), mixed


def with_gradients(function: Callable[..., Tensor], *args: Any) -> Any:
    """Values, and the gradients of a weighted sum of them for query, key and value."""
    return grad(partial(weighted, function), (0, 1, 2), has_aux=True)(*args)


@pytest.mark.parametrize("kind", MASKS)
@settings(max_examples=8, deadline=None)
@given(segments=layouts(), groups=st.sampled_from([4, 2, 1]))
def test_values_and_gradients_are_those_of_the_definition(kind: str, segments: Tensor, groups: int) -> None:
    found = with_gradients(attention, *inputs(groups), MASKS[kind](segments))

    expected = with_gradients(by_definition, *inputs(groups), *seen_by(kind, segments))
    assert_close(found, expected, 1e-12)


EXAMPLE = segments_of([5, 1, 9], [24])


@pytest.mark.parametrize("kind", MASKS)
def test_the_traced_gradient_has_the_bits_of_the_eager_one(kind: str) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Any:
        return with_gradients(attention, query, key, value, MASKS[kind](segments))

    args = (*inputs(2), EXAMPLE)
    graph, _ = trace(function, args)

    found, eager = graph(*args), function(*args)
    assert_same_bits(found, [*eager[0], eager[1]])


@pytest.mark.parametrize("kind", MASKS)
def test_both_derivatives_are_those_of_finite_differences(kind: str) -> None:
    short = segments_of([2, 3], [1, 2], length=5)
    args = [x.requires_grad_() for x in inputs(2, length=5)]
    function = partial(attention, mask=MASKS[kind](short))

    assert gradcheck(function, args, fast_mode=True)
    assert gradgradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize("kind", MASKS)
def test_the_second_derivative_composes_with_a_trace(kind: str) -> None:
    def curvature(function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *seen: Any) -> Any:
        def squared(key: Tensor) -> Tensor:
            return sum((g * g).sum() for g in with_gradients(function, query, key, value, *seen)[0])  # type: ignore[return-value]

        return grad(squared)(key)

    def ours(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Any:
        return curvature(attention, query, key, value, MASKS[kind](segments))

    args = inputs(2)
    graph, _ = trace(ours, (*args, EXAMPLE))
    expected = curvature(by_definition, *args, *seen_by(kind, EXAMPLE))
    assert_close(graph(*args, EXAMPLE)[0], expected, 1e-10)
    assert_close(ours(*args, EXAMPLE), expected, 1e-10)


@pytest.mark.parametrize("kind", MASKS)
def test_an_axis_more_is_a_loop(kind: str) -> None:
    query, key, value = inputs(2)
    queries, values = (torch.stack([x, x.flip(2), 2 * x], 1) for x in (query, value))
    function, seen = partial(with_gradients, attention), MASKS[kind](EXAMPLE)

    found = vmap(function, (1, None, 1, None))(queries, key, values, seen)

    alone = [function(q, key, v, seen) for q, v in zip(queries.unbind(1), values.unbind(1), strict=True)]
    expected = [torch.stack(parts) for parts in zip(*([*g, mixed] for g, mixed in alone), strict=True)]
    assert_close([*found[0], found[1]], expected, 1e-12)


def test_heads_are_not_repeated_in_float32_and_no_tensor_holds_all_pairs() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Any:
        return with_gradients(attention, query, key, value, attention_mask(segments, "document"))

    def heads(dtype: torch.dtype) -> list[int]:
        graph, _ = trace(function, (*inputs(2, dtype), EXAMPLE))
        values = [value for node in graph.graph.nodes for value in pytree.tree_leaves(node.meta.get("val"))]
        assert not [x.shape for x in values if x is not None and x.shape[-2:] == (LENGTH, LENGTH)]
        nodes = [node for node in graph.graph.nodes if "document_attention" in str(node.target)]
        return [min(x.meta["val"].shape[1] for x in node.all_input_nodes if x.meta["val"].ndim == 4) for node in nodes]

    assert heads(torch.float32) == [2, 2]
    assert heads(torch.bfloat16) == [HEADS, HEADS]


@settings(max_examples=50, deadline=None)
@given(segments=layouts(), window=st.none() | st.integers(1, LENGTH))
def test_blocks_are_what_is_seen_and_hardly_more(segments: Tensor, window: int | None) -> None:
    mask = document_attention.document_mask(segments, window)
    computed = torch.zeros(ROWS * LENGTH, ROWS * LENGTH, dtype=torch.int64)
    for start, middle, end in document_attention._blocks(mask.first, window):
        computed[middle:end, start:end] += 1

    seen = torch.block_diag(*dense_mask(mask, LENGTH, segments.device)[:, 0])
    assert int(computed.max()) == 1
    assert not (seen & (computed == 0)).any()
    vain = (1 if window is None else 2) * (document_attention._BLOCK - 1) / 2  # of a query, on average
    assert int(computed.sum()) <= int(seen.sum()) + vain * ROWS * LENGTH


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_long_rows_stay_near_the_formula(
    dtype: torch.dtype, error: float, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_attention, "_BLOCK", 64)
    args, segments = inputs(2, length=300), segments_of([200, 1, 99], [130, 64, 64, 30], length=300)
    mask = attention_mask(segments, "document", window)
    weights = torch.randn(ROWS, HEADS, 300, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def gradients(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *inputs: (function(*inputs).double() * weights).sum(), (0, 1, 2))(*args)

    seen = dense_mask(mask, 300, segments.device)
    expected = gradients(partial(formula, mask=seen, scale=WIDTH**-0.5), *args)
    found = gradients(partial(attention, mask=mask), *(x.to(dtype) for x in args))
    assert_close([x.double() for x in found], list(expected), error)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kernel", ["dense", "flash", "cudnn"])
def test_half_precision_stays_near_the_definition(kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_attention, "is_supported", lambda *_: kernel == "cudnn")
    args = inputs(1)
    mask = attention_mask(EXAMPLE, "document", window) if kernel == "dense" else ragged_mask(EXAMPLE, 4, window)
    half, function = [x.bfloat16() for x in args], partial(with_gradients, attention)
    names = {str(node.target) for node in trace(function, (*half, mask))[0].graph.nodes}
    assert any("cudnn" in name for name in names) == (kernel == "cudnn")
    found = function(*half, mask)
    expected = with_gradients(by_definition, *args, EXAMPLE, window or LENGTH)
    assert_close([*(x.double() for x in found[0]), found[1].double()], [*expected[0], expected[1]], 0.02)


@pytest.mark.parametrize("kind", MASKS)
def test_the_scale_multiplies_the_scores(kind: str) -> None:
    query, key, value = inputs(2)
    mask = MASKS[kind](EXAMPLE)
    found = with_gradients(partial(attention, scale=0.25), query, key, value, mask)
    assert_close(found, with_gradients(lambda q, *others: attention(q * 0.5, *others), query, key, value, mask), 1e-12)


@settings(max_examples=30, deadline=None)
@given(segments=layouts(), spare=st.integers(0, 3))
def test_documents_of_a_row_are_its_runs_and_those_that_are_not_there_are_empty(segments: Tensor, spare: int) -> None:
    runs = [[len(list(run)) for _, run in groupby(row)] for row in segments.tolist()]
    limit = max(map(len, runs)) + spare

    mask = ragged_mask(segments, limit)

    expected = [0]
    for row in runs:
        sizes = [*row, *[0] * (limit - len(row))]
        expected += [expected[-1] + end for end in accumulate(sizes)]
    assert mask.cumulative.tolist() == expected
    assert mask.cumulative.dtype == torch.int32


def test_a_row_that_is_one_document_begins_and_ends_as_the_row() -> None:
    assert ragged_mask(segments_of([5, 1, 9], [24]), 1).cumulative.tolist() == [0, 24, 48]


def test_padding_behind_as_many_documents_as_a_row_may_have_joins_the_last_of_them() -> None:
    assert ragged_mask(segments_of([5, 1, 9], [24]), 3).cumulative.tolist() == [0, 5, 6, 24, 48, 48, 48]


@pytest.mark.parametrize("kind", MASKS)
def test_softcapped_attention_is_its_formula_a_block_of_queries_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(ROWS, HEADS, LENGTH, WIDTH, dtype=torch.float64)
    key, value = torch.randn(2, ROWS, HEADS // 2, LENGTH, WIDTH, dtype=torch.float64)
    mask = MASKS[kind](segments_of([5, 12, 7], [24]))
    seen = dense_mask(mask, LENGTH, query.device)
    scores = 0.7 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.5 / 0.7)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    monkeypatch.setattr(sys.modules["fnrecipe.nn.attention"], "_BLOCK", 7)  # `nn.attention` is the function
    assert_close(softcapped_attention(query, key, value, mask, 0.7, 0.5), expected, 1e-12)
