"""Causal attention in packed rows. The mask is made once for all layers, in the form that the device's kernel takes.

`attention_mask` chooses by device and by scope, `attention` does what it is given. B rows, T positions, H heads, G key-value
heads, E head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import attrs
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.func import vjp

from fnrecipe import tree
from fnrecipe.nn.block_mask import BlockMask, block_mask, flex_backward, flex_forward

aten = torch.ops.aten

AttentionScope: TypeAlias = Literal["document", "row"]
"""What a position sees: the earlier positions of its document, or of its whole row."""


@tree.node
@attrs.frozen(eq=False)
class CausalMask:
    """All earlier positions. Padding comes last, where no position that counts sees it."""


@tree.node
@attrs.frozen(eq=False)
class BiasMask:
    """The earlier positions for which `bias` [B, 1, T, T], added to the scores, is 0 and not -inf."""

    bias: Tensor


AttentionMask: TypeAlias = CausalMask | BiasMask | BlockMask
"""Which positions each position attends to, as a tree of tensors."""


def attention_mask(segments: Tensor, scope: AttentionScope, dtype: torch.dtype) -> AttentionMask:
    """Who sees whom in rows of segments, int64 [B, T], for attention in `dtype`: a mask on the CPU, blocks elsewhere."""
    if scope == "row":
        return CausalMask()
    if segments.device.type != "cpu":
        return block_mask(segments)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return BiasMask(torch.where(same, 0.0, -torch.inf).to(dtype))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax attention with grouped key-value heads, [B, H, T, E]; query [B, H, T, E], key and value [B, G, T, E].

    Its first derivative is a kernel's and its second one that of the formula, but for whole rows on a GPU, of which torch has
    the first alone.
    """
    half, on_cpu = query.dtype.itemsize < 4, query.device.type == "cpu"
    if isinstance(mask, CausalMask) and not on_cpu:
        # Without heads repeated, torch's kernel for wide dtypes would be one that makes T x T scores.
        key, value = (x if half else _repeated(x, query.shape[1]) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=half)
    if on_cpu and half:  # its kernel would sum the gradients of a group in half precision
        key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    leaves, spec = pytree.tree_flatten(mask)
    mixed: Tensor = _Attention.apply(spec, query, key, value, *leaves)[0]  # type: ignore[no-untyped-call]
    return mixed


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The same by its definition, softmax(query keyᵀ / √E) value, where mask, bool [B or 1, 1, T, T], holds."""
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return torch.where(mask, scores, -torch.inf).softmax(-1) @ value


def _repeated(x: Tensor, heads: int) -> Tensor:
    """The key-value heads of x [B, G, T, E], each as often as there are query heads for it: [B, heads, T, E]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _dense_mask(mask: AttentionMask, length: int, device: torch.device) -> Tensor:
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if isinstance(mask, CausalMask):
        return causal
    if isinstance(mask, BiasMask):
        return causal & (mask.bias == 0)
    return causal & (mask.segments[:, None, :, None] == mask.segments[:, None, None, :])


def _forward(mask: AttentionMask, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and logsumexp of its scores as the kernel wants it back."""
    if isinstance(mask, BlockMask):
        return flex_forward(mask, query, key, value)
    # Given both, the kernel leaves out what lies above the diagonal; `scaled_dot_product_attention` refuses to hand it both.
    found: tuple[Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, attn_mask=_bias(mask)
    )
    return found


def _backward(mask: AttentionMask, gradient: Tensor, mixed: Tensor, logsumexp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    if isinstance(mask, BlockMask):
        return flex_backward(mask, gradient, mixed, logsumexp, *inputs)
    found: tuple[Tensor, ...] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, *inputs, mixed, logsumexp, 0.0, True, attn_mask=_bias(mask)
    )
    return found


def _bias(mask: CausalMask | BiasMask) -> Tensor | None:
    return mask.bias if isinstance(mask, BiasMask) else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(spec: Any, query: Any, key: Any, value: Any, *leaves: Any) -> Any:
        return _forward(pytree.tree_unflatten(leaves, spec), query, key, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.spec = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        if gradient is None:  # of a second derivative, all of which `_Gradient` has given
            return (None,) * (4 + ctx.spec.num_leaves)
        found = _Gradient.apply(ctx.spec, gradient, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *found, *[None] * ctx.spec.num_leaves

    @staticmethod
    def vmap(info: Any, dims: Any, spec: Any, *tensors: Any) -> Any:
        return _as_rows(_Attention, info.batch_size, dims[1:], spec, tensors)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(spec: Any, gradient: Any, mixed: Any, logsumexp: Any, query: Any, key: Any, value: Any, *leaves: Any) -> Any:
        return _backward(pytree.tree_unflatten(leaves, spec), gradient, mixed, logsumexp, query, key, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        spec, gradient, _, _, *others = inputs
        ctx.spec = spec
        ctx.save_for_backward(gradient, *others)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        # An argument without a gradient may still be wrapped by a functorch level that has exited.
        gradient, query, key, value, *leaves = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        mask = _dense_mask(pytree.tree_unflatten(leaves, ctx.spec), query.shape[2], query.device)

        def pulled(gradient: Tensor, *inputs: Tensor) -> Any:
            return vjp(partial(formula, mask=mask), *inputs)[1](gradient)

        of_gradient, *of_inputs = vjp(pulled, gradient, query, key, value)[1](slopes)
        return None, of_gradient, None, None, *of_inputs, *[None] * len(leaves)

    @staticmethod
    def vmap(info: Any, dims: Any, spec: Any, *tensors: Any) -> Any:
        return _as_rows(_Gradient, info.batch_size, dims[1:], spec, tensors)


def _as_rows(function: Any, size: int, dims: Any, spec: Any, tensors: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`function` where `vmap` adds an axis: more rows for the kernel, which has no rule of its own."""
    stacked = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    results = function.apply(spec, *(x.flatten(0, 1) for x in stacked))
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0,) * len(results)
