"""Causal attention in packed rows. The mask is made once for all layers, in the form that the device's kernel takes.

`attention_mask` chooses a kernel by device, scope and window; `attention` runs the kernel of the mask that it gets. B rows, T
positions, H heads, G key-value heads, E head width.
"""

from __future__ import annotations

import math
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
from fnrecipe.nn.cache import SlotMask, slot_attention
from fnrecipe.nn.document_attention import DocumentMask, document_mask, pairs
from fnrecipe.nn.ragged import RaggedMask, ragged_backward, ragged_forward, ragged_mask
from fnrecipe.ops import Context, document_attention, document_attention_backward

AttentionScope: TypeAlias = Literal["document", "row"]
"""What a position attends to: the earlier positions of its document, or of its row."""


@tree.node
@attrs.frozen(eq=False)
class CausalMask:
    """All earlier positions. Padding comes last, so no position with a target attends to it."""


_BLOCK = 512
"""Queries of softcapped attention whose scores are computed as one."""

AttentionMask: TypeAlias = CausalMask | DocumentMask | RaggedMask | SlotMask
"""Which positions each position attends to, as a tree of tensors."""


def attention_mask(
    segments: Tensor, scope: AttentionScope, window: int | None = None, max_documents: int | None = None
) -> AttentionMask:
    """The mask of rows of segments, int64 [B, T], in the form that kernels take on their device.

    A position attends to at most `window` positions, of which it is the last; None: to all before it. `max_documents` bounds
    the documents of a row; None: each position may be one, which is right for any row, and slow on a GPU.
    """
    length = segments.shape[1]
    window = None if window is None or window >= length else window
    segments = torch.zeros_like(segments) if scope == "row" else segments
    if segments.device.type == "cpu":
        return document_mask(segments, window)
    if scope == "row" and window is None:
        return CausalMask()
    return ragged_mask(segments, 1 if scope == "row" else max_documents or length, window)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float | None = None) -> Tensor:
    """Softmax attention with grouped key-value heads, [B, H, T, E]; query [B, H, T, E], key and value [B, G, T, E].

    `scale` multiplies the scores; None: 1 / √E. The first derivative is a kernel's, the second that of the formula; with
    `CausalMask` on a GPU torch has no second one.
    """
    if isinstance(mask, SlotMask):
        return slot_attention(query, key, value, mask, scale)
    half = query.dtype.itemsize < 4
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if half == isinstance(mask, DocumentMask):
        # On a GPU only the kernels for half precision have grouped heads. Those of the CPU do, but sum the gradients of a group
        # in the dtype of their inputs: in bfloat16, with 8 queries a key, that is twice the error (0.0097 instead of 0.0049).
        key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    if isinstance(mask, CausalMask):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=half)
    leaves, spec = pytree.tree_flatten(mask)
    mixed: Tensor = _Attention.apply((spec, scale), query, key, value, *leaves)[0]  # type: ignore[no-untyped-call]
    return mixed


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, cap: float, scale: float | None = None
) -> Tensor:
    """`attention` whose scores are bounded to cap · tanh(score / cap) (Gemma Team 2024, arXiv:2408.00118).

    No kernel of torch does it, so it goes by the formula on every device, a block of queries at a time with the keys up to its
    last one: about T x T / 2 scores for each head, in float32 at least, which are kept for the backward pass. Autograd
    differentiates it, any number of times.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    length = query.shape[2]
    seen = dense_mask(mask, length, query.device)
    if isinstance(mask, SlotMask):
        return _softcapped(query, key, value, seen, cap, scale)
    mixed = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        block = query[:, :, start:end], key[:, :, :end], value[:, :, :end], seen[:, :, start:end, :end]
        mixed.append(_softcapped(*block, cap, scale))
    return torch.cat(mixed, 2)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, cap: float, scale: float) -> Tensor:
    scores = query @ key.mT
    scores = scores if scores.dtype == torch.float64 else scores.float()
    capped = cap * torch.tanh(scores * (scale / cap))
    return torch.where(seen, capped, -torch.inf).softmax(-1).to(value.dtype) @ value


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention by its definition, softmax(scale · query keyᵀ) value, over the pairs in mask, bool [B or 1, 1, T, T]."""
    key, value = (_repeated(x, query.shape[1]) for x in (key, value))
    scores = query @ key.mT * scale
    return torch.where(mask, scores, -torch.inf).softmax(-1) @ value


def _repeated(x: Tensor, heads: int) -> Tensor:
    """The key-value heads of x [B, G, T, E], each repeated for the query heads of its group: [B, heads, T, E]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _near(length: int, window: int, device: torch.device) -> Tensor:
    """Whether a key is among the `window` last positions up to the query, or behind it, bool [T, T]."""
    number = torch.arange(length, device=device)
    return number[:, None] - number < window


def dense_mask(mask: AttentionMask, length: int, device: torch.device) -> Tensor:
    """The pairs of positions, query and key, that a mask lets see each other, bool [B or 1, 1, T, T], or T x S of slots."""
    if isinstance(mask, SlotMask):
        return mask.bias == 0
    if isinstance(mask, DocumentMask):
        return pairs(mask.first, mask.window)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if isinstance(mask, CausalMask):
        return causal
    seen = causal & (mask.numbers[:, None, :, None] == mask.numbers[:, None, None, :])
    return seen if mask.window is None else seen & _near(length, mask.window, device)


def _forward(mask: DocumentMask | RaggedMask, scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Attention, then what the backward kernel needs of it."""
    if isinstance(mask, RaggedMask):
        return ragged_forward(mask, query, key, value, scale)
    found: tuple[Tensor, ...] = document_attention(query, key, value, mask.first, scale, mask.window)
    return found


def _backward(mask: DocumentMask | RaggedMask, scale: float, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value; inputs: that of the attention, query, key, value, and what `_forward` gave."""
    if isinstance(mask, RaggedMask):
        return ragged_backward(mask, scale, *inputs)
    gradients: tuple[Tensor, ...] = document_attention_backward(*inputs, mask.first, scale, mask.window)
    return gradients


# Two Functions of our own, because the kernels have no rules under `torch.func`: neither those for ragged rows nor a second
# derivative of the CPU's flash attention. What runs in a `forward` is below all transforms: there `make_fx` records kernels.
# `_Attention` differentiates to `_Gradient`, which is a kernel; `_Gradient` differentiates to the formula, T x T. A mask is a
# tree, so the Functions get its structure, with the scale, and its leaves. `vmap` is more rows on the CPU; what ragged kernels
# keep for the gradient has no rows, so there it is a loop.

Static: TypeAlias = tuple[pytree.TreeSpec, float]
"""The structure of a mask, and the scale."""

Inputs: TypeAlias = tuple[Static, Tensor, Tensor, Tensor, *tuple[Tensor, ...]]
"""Then query, key, value and the mask's leaves."""

GradientInputs: TypeAlias = tuple[Static, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, *tuple[Tensor, ...]]
"""Then the gradient, query, key, value, the attention, its logsumexp and the mask's leaves."""

Batched: TypeAlias = tuple[tuple[Tensor, ...], tuple[int, ...]]
"""Results of `vmap`, and the dimension of each along which it maps."""


class _Context(Context, Protocol):
    static: Static


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(static: Static, query: Tensor, key: Tensor, value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        spec, scale = static
        return _forward(pytree.tree_unflatten(leaves, spec), scale, query, key, value)

    @staticmethod
    def setup_context(ctx: _Context, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.static, query, key, value, *leaves = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output, *leaves)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        num_leaves = ctx.static[0].num_leaves
        if gradient is None:  # in a second derivative, all of which comes from `_Gradient`
            return (None,) * (4 + num_leaves)
        gradients = _Gradient.apply(ctx.static, gradient, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *gradients, *[None] * num_leaves

    @staticmethod
    def vmap(info: VmapInfo, dims: Sequence[int | None], static: Static, *tensors: Tensor) -> Batched:
        return _mapped(_Attention, info.batch_size, dims[1:], static, tensors)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        static: Static,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mixed: Tensor,
        logsumexp: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        spec, scale = static
        return _backward(pytree.tree_unflatten(leaves, spec), scale, gradient, query, key, value, mixed, logsumexp)

    @staticmethod
    def setup_context(ctx: _Context, inputs: GradientInputs, output: tuple[Tensor, ...]) -> None:
        ctx.static, gradient, query, key, value, _, _, *leaves = inputs
        ctx.save_for_backward(gradient, query, key, value, *leaves)

    @staticmethod
    def backward(ctx: _Context, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        # An argument without a gradient may still be wrapped by a functorch level that has exited.
        gradient, query, key, value, *leaves = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        spec, scale = ctx.static
        mask = dense_mask(pytree.tree_unflatten(leaves, spec), query.shape[2], query.device)

        def pullback(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            gradients: tuple[Tensor, ...] = vjp(partial(formula, mask=mask, scale=scale), *inputs)[1](gradient)
            return gradients

        of_inputs = vjp(pullback, gradient, query, key, value)[1](slopes)
        return None, *of_inputs, *[None] * (2 + len(leaves))

    @staticmethod
    def vmap(info: VmapInfo, dims: Sequence[int | None], static: Static, *tensors: Tensor) -> Batched:
        return _mapped(_Gradient, info.batch_size, dims[1:], static, tensors)


def _mapped(
    function: type[torch.autograd.Function], size: int, dims: Sequence[int | None], static: Static, tensors: Sequence[Tensor]
) -> Batched:
    """`function` under `vmap` over an axis of `size`."""
    if static[0].type is RaggedMask:
        turns = [[x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)] for i in range(size)]
        found = [function.apply(static, *turn) for turn in turns]  # type: ignore[no-untyped-call]
        results = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return results, (0,) * len(results)
    stacked = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    rows = function.apply(static, *(x.flatten(0, 1) for x in stacked))  # type: ignore[no-untyped-call]
    return tuple(x.unflatten(0, (size, -1)) for x in rows), (0,) * len(rows)
