"""Linear functions that bring their own transpose: how collectives are differentiated under `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Linear: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def with_transpose(function: Linear, transpose: Linear) -> Linear:
    """`function`, whose gradient is `transpose` of the gradients of its results, and whose gradient in turn is `function`.

    (`torch.func` refuses torch's own collectives that can be differentiated, and custom operators with a backward.)
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return tuple(function(inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return tuple(with_transpose(transpose, function)(gradients))

    return lambda inputs: Function.apply(*inputs)  # type: ignore[no-untyped-call]
