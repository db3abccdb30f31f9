"""The Triton kernel of `fnrecipe::norms` for large bfloat16 tensors, of which torch's reads half of what memory could give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fnrecipe.ops import foreach_norms

LARGE = 2**22
"""Elements from which a launch for one tensor pays, where torch's takes many tensors."""
PROGRAMS, BLOCK = 264, 4096


@triton.jit  # type: ignore[untyped-decorator]
def _parts(  # type: ignore[no-untyped-def]
    tensor, out, size, greatest: tl.constexpr, block: tl.constexpr
):
    """Sums of squares of parts of a tensor, or their greatest magnitudes, NaN where there is one."""
    found = tl.zeros((block,), tl.float32)
    for first in range(tl.program_id(0) * block, size, tl.num_programs(0) * block):
        here = first + tl.arange(0, block).to(tl.int64)
        x = tl.load(tensor + here, here < size, 0.0).to(tl.float32)
        if greatest:
            found = tl.where((tl.abs(x) > found) | (x != x), tl.abs(x), found)
        else:
            found += x * x
    if greatest:
        none = tl.sum((found != found).to(tl.int32), 0) == 0
        tl.store(out + tl.program_id(0), tl.where(none, tl.max(found, 0), float("nan")))
    else:
        tl.store(out + tl.program_id(0), tl.sum(found, 0))


def norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> Tensor:
    """What the operator does. The order of additions depends on the tensor's size alone."""
    large = [i for i, tensor in enumerate(tensors) if _is_large(tensor) and dtype == torch.float32 and order in (2, math.inf)]
    others = sorted({*range(len(tensors))} - {*large})
    found = dict(zip(others, foreach_norms([tensors[i] for i in others], order, dtype) if others else [], strict=True))
    if large:
        parts = torch.empty(len(large), PROGRAMS, dtype=torch.float32, device=tensors[0].device)
        for row, i in zip(parts, large, strict=True):
            _parts[(PROGRAMS,)](tensors[i], row, tensors[i].numel(), order != 2, BLOCK)
        found |= dict(zip(large, parts.sum(1).sqrt() if order == 2 else parts.amax(1), strict=True))
    return torch.stack([found[i] for i in range(len(tensors))])


def _is_large(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.numel() >= LARGE and tensor.is_contiguous()
