"""The Triton kernel of `fnrecipe::adamw`. Triton comes with torch for CUDA, and takes a second to import."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnrecipe.optim.stochastic_rounding import FIRST, GAMMA, SECOND, WORD

BLOCK = 1024


@triton.jit
def _rounded(value, bits):  # type: ignore[no-untyped-def]
    """A float32 rounded to a bfloat16, in float32, by the last 16 bits."""
    return ((value.to(tl.int32, bitcast=True) + (bits.to(tl.int32) & 0xFFFF)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(  # type: ignore[no-untyped-def]
    param,
    gradient,
    mean,
    square,
    numbers,
    accept,
    seed,
    size,
    start,
    columns,
    stride,
    decay,
    b1,
    rest1,
    b2,
    rest2,
    eps,
    gamma: tl.constexpr,
    first: tl.constexpr,
    second: tl.constexpr,
    word: tl.constexpr,
    narrow: tl.constexpr,
    cut: tl.constexpr,
    block: tl.constexpr,
):
    if tl.load(accept):
        here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = here < size
        divisor, rate = tl.load(numbers), tl.load(numbers + 1)
        step_size, root_bias = tl.load(numbers + 2), tl.load(numbers + 3)
        g = tl.load(gradient + here, inside).to(tl.float32) / divisor
        p = tl.load(param + here, inside).to(tl.float32)
        m = b1 * tl.load(mean + here, inside).to(tl.float32) + rest1 * g
        v = b2 * tl.load(square + here, inside).to(tl.float32) + rest2 * g * g
        p = p - rate * decay * p - step_size * m / (tl.sqrt(v) / root_bias + eps)
        if narrow:
            at = here
            if cut:  # two divisions of 64 bits, more than all else
                at = here // columns * stride + here % columns
            bits = (tl.load(seed) + start + at * gamma) & word
            bits = ((bits ^ (bits >> 30)) * first) & word
            bits = ((bits ^ (bits >> 27)) * second) & word
            p, m, v = _rounded(p, bits >> 47), _rounded(m, bits >> 31), _rounded(v, bits >> 15)
        tl.store(param + here, p.to(param.dtype.element_ty), inside)
        tl.store(mean + here, m.to(mean.dtype.element_ty), inside)
        tl.store(square + here, v.to(square.dtype.element_ty), inside)


def run(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    numbers: Tensor,
    accept: Tensor,
    seed: Tensor,
    places: Sequence[int],
    decays: Sequence[float],
    b1: float,
    b2: float,
    eps: float,
) -> None:
    """What the operator does, on contiguous tensors."""
    tensors = zip(
        params, gradients, means, squares, decays, zip(places[0::3], places[1::3], places[2::3], strict=True), strict=True
    )
    for param, gradient, mean, square, decay, place in tensors:
        narrow, (_, columns, stride) = param.dtype == torch.bfloat16, place
        scalars = numbers, accept, seed, param.numel(), *place, decay, b1, 1 - b1, b2, 1 - b2, eps
        grid = (triton.cdiv(param.numel(), BLOCK),)
        _adamw[grid](param, gradient, mean, square, *scalars, GAMMA, FIRST, SECOND, WORD, narrow, columns != stride, BLOCK)
