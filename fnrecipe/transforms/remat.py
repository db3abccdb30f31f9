"""`remat`: a function whose intermediate values are not kept for its gradient, but computed again when that is taken.

`torch.utils.checkpoint` does the same for modules and is refused under `torch.func`. Only the traced function saves memory:
eager `torch.func` keeps everything anyway. Never give a function with `remat` in it to `torch.compile`, which has dropped its
gradient without a word; `jit` traces it first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.func import vjp

from fnrecipe.ops import Context
from fnrecipe.tree import Tree


def remat(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`function`, a pure function of trees of tensors with a tensor or several as its result, keeping its arguments only."""

    def call(*args: Tree) -> Tree:
        leaves, spec = pytree.tree_flatten(args)

        def flat(*leaves: Tensor) -> Tree:
            return function(*pytree.tree_unflatten(list(leaves), spec))

        return _rematerialised(flat).apply(*leaves)  # type: ignore[no-untyped-call]

    return call


def _rematerialised(flat: Callable[..., Tree]) -> type[torch.autograd.Function]:
    class Remat(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*leaves: Tensor) -> Tree:
            return flat(*leaves)

        @staticmethod
        def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tree) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            # An argument without a gradient may still be wrapped by a functorch level that has exited.
            leaves, wanted = [unwrap_if_dead(leaf) for leaf in ctx.saved_tensors], ctx.needs_input_grad

            def of_wanted(*chosen: Tensor) -> Tree:
                given = iter(chosen)
                return flat(*(next(given) if want else leaf for leaf, want in zip(leaves, wanted, strict=True)))

            value, pull = vjp(of_wanted, *(leaf for leaf, want in zip(leaves, wanted, strict=True) if want))[:2]
            found = iter(pull(gradients if isinstance(value, tuple) else gradients[0]))
            return tuple(next(found) if want else None for want in wanted)

    return Remat
