"""Fused AdamW kernels as pure functions: division, moments, decay and update in one pass over memory.

A kernel writes into its arguments, so it gets copies. `jit` sees a copy of a donated buffer that becomes the buffer's new
value, or of a gradient that nobody reads any more, and lets the kernel write into the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import attrs
import torch
from torch import Tensor

from fnrecipe import ops


@attrs.frozen(eq=False)
class AdamStep:
    """What an update of AdamW is, for all parameters.

    divisor  []         of the gradients
    count    int64 []   the number of the update
    rate     float64 [] the learning rate
    accept   bool []    whether it is made; else all is as it was
    """

    divisor: Tensor
    count: Tensor
    rate: Tensor
    betas: tuple[float, float]
    eps: float
    accept: Tensor


def adamw(
    step: AdamStep,
    decays: Sequence[float],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, means and squares after a step; `decays` has the weight decay of each parameter."""
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
            [step.count.float()] * len(chosen),
            lr=step.rate.float(),
            beta1=step.betas[0],
            beta2=step.betas[1],
            weight_decay=decay,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=step.divisor.float(),
            found_inf=(~step.accept).float(),
        )
    return new[0], new[1], new[2]


@torch.library.impl("aten::_fused_adamw_.tensor_lr", "Meta")
def _by_shape(*args: object, **kwargs: object) -> None:
    """What tracing runs in place of the kernel: torch has nothing for it, and would run it on zeros, as large as the state."""


BY_TRITON = torch.float32, torch.bfloat16
"""The dtypes of parameters that `adamw_by_triton` takes."""


def has_triton(device: torch.device) -> bool:
    """Whether `adamw_by_triton` runs on a device."""
    return device.type == "cuda" and find_spec("triton") is not None


def adamw_by_triton(
    step: AdamStep,
    decays: Sequence[float],
    seed: Tensor,
    places: Sequence[tuple[int, int, int]],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As `adamw`, of which some parameters may be bfloat16, as their moments then are: these are rounded stochastically.

    `places` says where the elements of each lie (`stochastic_rounding.place`).

    Inductor would make as good kernels of the chain, from some 26 operations a parameter: it compiled little else of a deep
    model. torch's kernel wants float32 gradients, which are written and read once more, and has no bfloat16.
    """
    mean_bias, square_bias = (1 - torch.pow(b, step.count.double()) for b in step.betas)
    numbers = torch.stack([step.divisor.double(), step.rate, step.rate / mean_bias, square_bias.sqrt()]).float()
    new = [[_copy(tensor) for tensor in tensors] for tensors in (params, means, squares)]
    flat = [number for place in places for number in place]
    whole = [gradient.contiguous() for gradient in gradients]
    ops.adamw(new[0], whole, new[1], new[2], numbers, step.accept, seed, flat, decays, *step.betas, step.eps)
    return new[0], new[1], new[2]


# Triton takes a second to import, and is there for CUDA only.
torch.library.impl("fnrecipe::adamw", "CUDA", lambda *args: import_module("fnrecipe.optim.adamw_kernel").run(*args))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
