"""The kernels of a GPU against the formula in float64, at every level at which a step may run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vjp

from fnrecipe.compiler.modes import BACKENDS
from fnrecipe.nn import cudnn_attention
from fnrecipe.nn.attention import AttentionScope, attention, attention_mask, dense_mask, formula
from fnrecipe.transforms import jit
from tests.helpers import compiles
from tests.nn.test_attention import segments_of

pytestmark = compiles

CUDA, LENGTH = torch.device("cuda"), 640
ROWS = [[100, 1, 300], [640], [3, 2, 1], [320, 320]]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
KERNELS = ["torch", *(["cudnn"] if find_spec("cudnn") else [])]
"""Whose kernels run for ragged rows in half precision: cuDNN's need its frontend."""


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cudnn_attention, "is_supported", lambda *_: False)
    return str(request.param)


def inputs(heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the attention, zero where there is padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(ROWS), LENGTH, number, width) for number in (heads, groups, groups, heads)]
    drawn = [torch.randn(shape, generator=generator).to(CUDA, dtype).transpose(1, 2) for shape in shapes]
    return [*drawn[:3], drawn[3] * valid(torch.zeros(1, dtype=dtype, device=CUDA))]


def valid(like: Tensor) -> Tensor:
    return (segments_of(*ROWS, length=LENGTH) >= 0)[:, None, :, None].to(like)


def slopes(function: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """The attention, where it counts, and the gradients of query, key and value."""
    mixed, pull = vjp(function, *args[:3])
    return [mixed * valid(mixed), *pull(args[3])]


def check(level: Any, scope: AttentionScope, window: int | None, dtype: torch.dtype, *sizes: int) -> None:
    args, segments = inputs(*sizes, dtype), segments_of(*ROWS, length=LENGTH).to(CUDA)
    mask = attention_mask(segments, scope, window, max_documents=8)

    def function(*given: Tensor) -> list[Tensor]:
        own = attention_mask(given[4], scope, window, max_documents=8)
        return slopes(lambda q, k, v: attention(q, k, v, own), *given[:4])

    found = jit(function, backend=BACKENDS[level])(*args, segments)

    seen = dense_mask(mask, LENGTH, CUDA)
    expected = slopes(lambda q, k, v: formula(q, k, v, seen, sizes[2] ** -0.5), *(x.double() for x in args))
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(8, 2, 64), (4, 4, 128), (4, 1, 256), (4, 2, 20), (4, 2, 8)], ids=str)
@pytest.mark.usefixtures("kernel")
def test_documents(sizes: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    check("trace", "document", window, dtype, *sizes)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(8, 2, 64), (4, 4, 128)], ids=str)
def test_rows(sizes: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    check("trace", "row", window, dtype, *sizes)


@pytest.mark.parametrize("scope", ["document", "row"])
@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 64), (torch.bfloat16, None), (torch.bfloat16, 64)], ids=str)
def test_compiled_around(dtype: torch.dtype, window: int | None, scope: AttentionScope) -> None:
    check("inductor", scope, window, dtype, 8, 2, 64)


def test_cudnn_is_chosen_where_it_is_installed_and_has_a_kernel() -> None:
    def chosen(width: int, dtype: torch.dtype) -> bool:
        query, key, *_ = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in inputs(4, 2, width, dtype))
        lengths = torch.tensor([len(query)], dtype=torch.int32, device=CUDA)
        return cudnn_attention.is_supported(cudnn_attention.layout(query, key, lengths, LENGTH, 1.0, None), False)

    assert [chosen(64, torch.bfloat16), chosen(128, torch.float16)] == [find_spec("cudnn") is not None] * 2
    assert not chosen(256, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("deterministic", "kernel")
def test_in_half_precision_documents_have_the_same_bits_each_time(dtype: torch.dtype) -> None:
    args, segments = inputs(8, 2, 64, dtype), segments_of(*ROWS, length=LENGTH).to(CUDA)
    mask = attention_mask(segments, "document", max_documents=8)
    once, again = (slopes(lambda q, k, v: attention(q, k, v, mask), *args) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.usefixtures("deterministic")
def test_documents_that_are_not_there_change_no_more_than_an_order_of_sums(kernel: str) -> None:
    args, segments = inputs(8, 2, 64, torch.bfloat16), segments_of(*ROWS, length=LENGTH).to(CUDA)
    few, many = (
        slopes(lambda q, k, v, n=limit: attention(q, k, v, attention_mask(segments, "document", max_documents=n)), *args)
        for limit in (4, 64)
    )
    assert torch.equal(few[0], many[0])
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other) or kernel == "torch"
        assert (one - other).norm() <= 1e-2 * other.norm()
