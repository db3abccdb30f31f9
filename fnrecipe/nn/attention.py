"""Causal attention in packed rows. The mask is made once for all layers, in the form that the device's kernel takes.

`attention_mask` chooses a kernel by device and by scope; `attention` runs the kernel of the mask that it gets. B rows, T
positions, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol, TypeAlias

import attrs
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._functorch.autograd_function import VmapInfo
from torch.func import vjp

from fnrecipe import tree
from fnrecipe.nn.block_mask import BlockMask, block_mask, flex_backward, flex_forward
from fnrecipe.ops import Context

aten = torch.ops.aten

AttentionScope: TypeAlias = Literal["document", "row"]
"""What a position attends to: the earlier positions of its document, or of its row."""


@tree.node
@attrs.frozen(eq=False)
class CausalMask:
    """All earlier positions. Padding comes last, so no position with a target attends to it."""


@tree.node
@attrs.frozen(eq=False)
class BiasMask:
    """The earlier positions for which `bias` [B, 1, T, T], added to the scores, is 0 and not -inf."""

    bias: Tensor


AttentionMask: TypeAlias = CausalMask | BiasMask | BlockMask
"""Which positions each position attends to, as a tree of tensors."""


def attention_mask(segments: Tensor, scope: AttentionScope, dtype: torch.dtype) -> AttentionMask:
    """The mask of rows of segments, int64 [B, T], for attention in `dtype`: dense on the CPU, lists of blocks elsewhere."""
    if scope == "row":
        return CausalMask()
    if segments.device.type != "cpu":
        return block_mask(segments)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return BiasMask(torch.where(same, 0.0, -torch.inf).to(dtype))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax attention with grouped key-value heads, [B, H, T, E]; query [B, H, T, E], key and value [B, G, T, E].

    The first derivative is a kernel's, the second that of the formula; with `CausalMask` on a GPU torch has no second one.
    """
    half, on_cpu = query.dtype.itemsize < 4, query.device.type == "cpu"
    if isinstance(mask, CausalMask) and not on_cpu:
        # For float32 and float64 torch has no fused kernel with grouped heads, and would allocate T x T scores.
        key, value = (x if half else _repeated(x, query.shape[1]) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=half)
    if on_cpu and half:
        # Given grouped heads, the CPU's kernel sums the gradients of a group in the dtype of its inputs: in bfloat16, with 8
        # queries a key, that is twice the error (0.0097 instead of 0.0049).
        key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    leaves, spec = pytree.tree_flatten(mask)
    mixed: Tensor = _Attention.apply(spec, query, key, value, *leaves)[0]  # type: ignore[no-untyped-call]
    return mixed


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by its definition, softmax(query keyᵀ / √E) value, over the pairs in mask, bool [B or 1, 1, T, T]."""
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return torch.where(mask, scores, -torch.inf).softmax(-1) @ value


def _repeated(x: Tensor, heads: int) -> Tensor:
    """The key-value heads of x [B, G, T, E], each repeated for the query heads of its group: [B, heads, T, E]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _dense_mask(mask: AttentionMask, length: int, device: torch.device) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if isinstance(mask, CausalMask):
        return causal
    if isinstance(mask, BiasMask):
        return causal & (mask.bias == 0)
    return causal & (mask.segments[:, None, :, None] == mask.segments[:, None, None, :])


def _forward(mask: AttentionMask, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the logsumexp of its scores in the form that the backward kernel takes."""
    if isinstance(mask, BlockMask):
        return flex_forward(mask, query, key, value)
    # Given a mask and `is_causal`, the kernel skips what lies above the diagonal: the same bits for half of the work.
    # `scaled_dot_product_attention` refuses to pass both on. Batched products with explicit scores are no faster on short rows.
    output: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, attn_mask=_bias(mask)
    )
    return output


def _backward(mask: AttentionMask, gradient: Tensor, mixed: Tensor, logsumexp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    if isinstance(mask, BlockMask):
        return flex_backward(mask, gradient, mixed, logsumexp, *inputs)
    gradients: tuple[Tensor, ...] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, *inputs, mixed, logsumexp, 0.0, True, attn_mask=_bias(mask)
    )
    return gradients


def _bias(mask: CausalMask | BiasMask) -> Tensor | None:
    return mask.bias if isinstance(mask, BiasMask) else None


# Two Functions of our own, because the kernels have no rules under `torch.func`: neither FlexAttention's two operations nor a
# second derivative of the CPU's flash attention. What runs in a `forward` is below all transforms, where `make_fx` records the
# kernels. `_Attention` differentiates to `_Gradient`, which is a kernel; `_Gradient` differentiates to the formula, T x T. A
# mask is a tree, so the Functions get its leaves and its structure. `vmap` is more rows.

Inputs: TypeAlias = tuple[pytree.TreeSpec, *tuple[Tensor, ...]]
"""The structure of a mask, then tensors, of which the last are the mask's leaves."""

Batched: TypeAlias = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""Results of `vmap`, and the dimension of each along which it maps."""


class _Context(Context, Protocol):
    spec: pytree.TreeSpec


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(spec: pytree.TreeSpec, query: Tensor, key: Tensor, value: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(pytree.tree_unflatten(leaves, spec), query, key, value)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
        ctx.spec = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[1:])

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # in a second derivative, all of which comes from `_Gradient`
            return (None,) * (4 + ctx.spec.num_leaves)
        gradients = _Gradient.apply(ctx.spec, gradient, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *gradients, *[None] * ctx.spec.num_leaves

    @staticmethod
    def vmap(info: VmapInfo, dims: Sequence[int | None], spec: pytree.TreeSpec, *tensors: Tensor) -> Batched:
        return _as_rows(_Attention, info.batch_size, dims[1:], spec, tensors)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        spec: pytree.TreeSpec,
        gradient: Tensor,
        mixed: Tensor,
        logsumexp: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        return _backward(pytree.tree_unflatten(leaves, spec), gradient, mixed, logsumexp, query, key, value)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.spec = inputs[0]
        gradient, _, _, *others = inputs[1:]
        ctx.save_for_backward(gradient, *others)

    @staticmethod
    def backward(ctx: _Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        # An argument without a gradient may still be wrapped by a functorch level that has exited.
        gradient, query, key, value, *leaves = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        mask = _dense_mask(pytree.tree_unflatten(leaves, ctx.spec), query.shape[2], query.device)

        def pullback(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            gradients: tuple[Tensor, ...] = vjp(partial(formula, mask=mask), *inputs)[1](gradient)
            return gradients

        of_gradient, *of_inputs = vjp(pullback, gradient, query, key, value)[1](slopes)
        return None, of_gradient, None, None, *of_inputs, *[None] * len(leaves)

    @staticmethod
    def vmap(info: VmapInfo, dims: Sequence[int | None], spec: pytree.TreeSpec, *tensors: Tensor) -> Batched:
        return _as_rows(_Gradient, info.batch_size, dims[1:], spec, tensors)


def _as_rows(
    function: type[torch.autograd.Function],
    size: int,
    dims: Sequence[int | None],
    spec: pytree.TreeSpec,
    tensors: Sequence[Tensor],
) -> Batched:
    """`function` under `vmap` over an axis of `size`: that axis becomes more rows."""
    stacked = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    results = function.apply(spec, *(x.flatten(0, 1) for x in stacked))  # type: ignore[no-untyped-call]
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0,) * len(results)
