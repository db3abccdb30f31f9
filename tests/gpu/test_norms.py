"""The norms of large bfloat16 tensors by the Triton kernel, against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from fnrecipe.ops import foreach_norms
from fnrecipe.parallel import norm_kernel
from fnrecipe.parallel.norms import norms
from tests.helpers import compiles

pytestmark = compiles


@pytest.mark.parametrize("order", [2, math.inf])
@pytest.mark.parametrize("spoilt", [None, math.nan, -math.inf])
def test_norms_are_torchs(order: float, spoilt: float | None) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = norm_kernel.LARGE, 7, norm_kernel.LARGE + 12345, norm_kernel.LARGE
    tensors = [torch.randn(size, generator=draw, device="cuda").bfloat16() for size in sizes]
    tensors[3] = tensors[3].float()
    if spoilt is not None:
        tensors[2][-3] = spoilt
    torch.testing.assert_close(
        norms(tensors, order, torch.float32), foreach_norms(tensors, order, torch.float32), equal_nan=True
    )
