"""torch's fused AdamW kernel as a pure function: division, moments, decay and update in one pass over memory.

The kernel writes into its arguments, so it gets copies. `jit` sees a copy of a donated buffer that becomes the buffer's new
value, or of a gradient that nobody reads any more, and lets the kernel write into the original.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    divisor: Tensor,
    count: Tensor,
    rate: Tensor,
    betas: tuple[float, float],
    eps: float,
    decays: Sequence[float],
    accept: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, means and squares after update number `count` (int64 []) at learning rate `rate` (float64 []).

    `gradients` are divided by `divisor` ([]) first. `decays` has the weight decay of each parameter. Everything is as it was if
    `accept` (bool []) does not hold.
    """
    new = [[_copy(tensor) for tensor in tensors] for tensors in (params, means, squares)]
    divided = [_copy(gradient) for gradient in gradients]
    for decay in sorted(set(decays)):
        chosen = [i for i, other in enumerate(decays) if other == decay]
        torch._fused_adamw_(
            [new[0][i] for i in chosen],
            [divided[i] for i in chosen],
            [new[1][i] for i in chosen],
            [new[2][i] for i in chosen],
            [],
            [count.float()] * len(chosen),
            lr=rate.float(),
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor.float(),
            found_inf=(~accept).float(),
        )
    return new[0], new[1], new[2]


@torch.library.impl("aten::_fused_adamw_.tensor_lr", "Meta")
def _by_shape(*args: object, **kwargs: object) -> None:
    """What tracing runs in place of the kernel: torch has nothing for it, and would run it on zeros, as large as the state."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
