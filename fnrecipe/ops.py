"""Custom operators, opaque to the compiler or missing in torch, and the type of an `autograd.Function`'s context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.fx.node import has_side_effect

torch.library.define("fnrecipe::optimization_barrier", "(Tensor value, Tensor earlier) -> Tensor")
torch.library.define("fnrecipe::opaque_clone", "(Tensor value) -> Tensor")
torch.library.define("fnrecipe::keep_alive", "(Tensor(a!) gathered, Tensor sent) -> ()")
torch.library.define(
    "fnrecipe::efficient_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cumulative, int longest,"
    " float scale, int? window) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::flash_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cumulative, int longest,"
    " float scale, int? window) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::cudnn_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor[] bounds, int longest, float scale, int? window) -> (Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::cudnn_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics, Tensor[] bounds, int longest,"
    " float scale, int? window, bool deterministic) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::document_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor first, float scale, int? window) -> (Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::document_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor first, float scale,"
    " int? window) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fnrecipe::slot_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor reach, float scale) -> Tensor",
)
torch.library.define("fnrecipe::fence", "() -> ()")
torch.library.define("fnrecipe::norms", "(Tensor[] tensors, float order, ScalarType dtype) -> Tensor")
torch.library.define(
    "fnrecipe::adamw",
    "(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor numbers, Tensor accept,"
    " Tensor seed, int[] places, float[] decays, float b1, float b2, float eps) -> ()",
)
torch.library.define("fnrecipe::mm", "(Tensor left, Tensor right) -> Tensor")

opaque_clone = torch.ops.fnrecipe.opaque_clone
"""A copy of a value by a kernel of its own: Inductor does not fuse it into the kernels that read it."""
keep_alive = torch.ops.fnrecipe.keep_alive
"""Does nothing, but counts as a read of `sent`, which stays allocated until here, and as a write into `gathered`."""
efficient_attention_backward = torch.ops.fnrecipe.efficient_attention_backward
"""The backward kernel of the memory-efficient attention, for ragged rows [1, N, H, E], causal, within `window` positions.

torch's own function of shapes for it lacks two of its arguments (2.11 to 2.13), so it cannot be traced as it is. It wants the
seed of a dropout, as the next one does; that of the forward kernel lies on the host, where a compiled kernel cannot read it.
"""
flash_attention_backward = torch.ops.fnrecipe.flash_attention_backward
"""The backward kernel of FlashAttention 2, for ragged rows [N, H, E], causal, within `window` positions."""
cudnn_attention = torch.ops.fnrecipe.cudnn_attention
"""Attention [N, H, E], and the statistics of its softmax, float32 [N, H]; query [N, H, E], key and value [N, G, E], contiguous.

bounds: those of documents, by `fnrecipe.nn.cudnn_attention.bounds`, whose kernels these are; longest: a bound on the positions
of a document.
"""
cudnn_attention_backward = torch.ops.fnrecipe.cudnn_attention_backward
"""The gradients of query, key and value. If deterministic, they have the same bits each time, and need a larger workspace."""
document_attention = torch.ops.fnrecipe.document_attention
"""Attention [B, H, T, E] on the CPU, and the logsumexp of its scores [B, H, T]; query [B, H, T, E], key and value [B, G, T, E].

A position attends to those from `first`, int64 [B, T], to itself, to at most `window` of them.
"""
document_attention_backward = torch.ops.fnrecipe.document_attention_backward
"""The gradients of query, key and value."""
fence = torch.ops.fnrecipe.fence
"""Does nothing. In a trace it says: what follows may be another program on each rank, so no pass may move it."""
slot_attention = torch.ops.fnrecipe.slot_attention
"""Softmax attention [B, G, Q, E] of query [B, G, Q, E] to the first `reach` [] of the slots of key and value [B, G, S, E].

It reads `reach` on the host, where the others lie too; bias [B, 1, 1, S] is added to the scores.
"""
norms = torch.ops.fnrecipe.norms
"""The norm of each tensor, [N], computed in `dtype`. Inductor would launch a kernel for each number that it stacks."""
adamw = torch.ops.fnrecipe.adamw
"""Writes AdamW's update into parameters and moments, all contiguous, if `accept`, bool [], holds: one pass over memory.

numbers   float32 [4]: what divides gradients, the learning rate, that over the bias of means, the root of that of squares
seed      int64 [], from which what is bfloat16 is rounded stochastically
places    `stochastic_rounding.place` of each parameter, one after the other
decays    the weight decay of each
"""
mm = torch.ops.fnrecipe.mm
"""The matrix product left [M, K] @ right [K, N] by oneDNN, float32 on a CPU."""

LARGE_PRODUCT = 2**25
"""Multiplications of the smallest float32 product on a CPU that oneDNN is asked for: it costs 25 microseconds more to call."""

CAUSAL = 2
"""The memory-efficient kernel's number for a causal mask, of sequences whose last query is that of the last key."""


def may_be_differentiated(value: Tensor) -> bool:
    """Whether a gradient may be taken for `value`: False only if it is certain that none is.

    (A tensor that is batched by `vmap` does not know whether what it is a batch of is differentiated.)
    """
    return value.requires_grad or is_batchedtensor(value)


class Context(Protocol):
    """The `ctx` of a `torch.autograd.Function`, which torch leaves untyped."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def optimization_barrier(value: Tensor, earlier: Tensor) -> Tensor:
    """A copy of `value` that is made after `earlier`, whatever order a compiler chooses (as in `jax.lax`).

    The order of values that do not depend on each other decides how many of them are allocated at once.
    """
    copy: Tensor = torch.ops.fnrecipe.optimization_barrier(value, earlier)
    return copy


def _barrier_by_vmap(info: object, dims: Sequence[int | None], value: Tensor, earlier: Tensor) -> tuple[Tensor, int | None]:
    return optimization_barrier(value, earlier), dims[0]


def is_large_product(left: Tensor, right: Tensor) -> bool:
    """Whether left [..., D] times the transpose of right [F, D] is faster by oneDNN, which torch only has for inference."""
    on_cpu = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return on_cpu and left.numel() * len(right) >= LARGE_PRODUCT and bool(torch._C._has_mkldnn)


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by oneDNN, without a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _efficient_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cumulative: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, ...]:
    unused = torch.zeros((), dtype=torch.int64)
    inputs = gradient, query, key, value, None, out, cumulative, cumulative, longest, longest, logsumexp, 0.0, unused, unused
    found: tuple[Tensor, ...] = torch.ops.aten._efficient_attention_backward(
        *inputs, CAUSAL, False, scale=scale, window_size=window
    )
    return found[:3]


def _flash_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cumulative: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, ...]:
    unused = query.new_zeros(2, dtype=torch.uint64), query.new_empty(0)
    inputs = gradient, query, key, value, out, logsumexp, cumulative, cumulative, longest, longest, 0.0, True, *unused
    left = None if window is None else window - 1
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(*inputs, scale=scale, window_size_left=left)
    return found[:3]


def _slot_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, reach: Tensor, scale: float) -> Tensor:
    seen = int(reach)
    key, value, bias = key[:, :, :seen], value[:, :, :seen], bias[..., :seen]
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale).contiguous()


def foreach_norms(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> Tensor:
    """`norms` by torch's kernels."""
    # One launch takes many tensors of one dtype.
    found: dict[int, Tensor] = {}
    for narrow in dict.fromkeys(tensor.dtype for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == narrow]
        norms = torch._foreach_norm([tensors[number] for number in numbers], order, dtype=dtype)
        found |= dict(zip(numbers, norms, strict=True))
    return torch.stack([found[number] for number in range(len(tensors))])


def _mm_by_onednn(left: Tensor, right: Tensor) -> Tensor:
    return linear_by_onednn(left, right.t())


torch.library.impl("fnrecipe::optimization_barrier", "CompositeExplicitAutograd", lambda value, earlier: value.clone())
torch.library.register_fake("fnrecipe::optimization_barrier", lambda value, earlier: torch.empty_like(value))
torch.library.register_vmap("fnrecipe::optimization_barrier", _barrier_by_vmap)

torch.library.impl("fnrecipe::opaque_clone", "CompositeExplicitAutograd", torch.clone)
torch.library.register_fake("fnrecipe::opaque_clone", torch.empty_like)
torch.library.register_vmap("fnrecipe::opaque_clone", lambda info, dims, value: (opaque_clone(value), dims[0]))

torch.library.impl("fnrecipe::keep_alive", "CompositeExplicitAutograd", lambda gathered, sent: None)
torch.library.register_fake("fnrecipe::keep_alive", lambda gathered, sent: None)

torch.library.impl("fnrecipe::efficient_attention_backward", "CompositeExplicitAutograd", _efficient_attention_backward)
torch.library.impl("fnrecipe::flash_attention_backward", "CompositeExplicitAutograd", _flash_attention_backward)
for name in ("efficient_attention_backward", "flash_attention_backward", "cudnn_attention_backward"):
    torch.library.register_fake(
        f"fnrecipe::{name}", lambda _, query, key, value, *others: tuple(map(torch.empty_like, (query, key, value)))
    )

torch.library.register_fake(
    "fnrecipe::cudnn_attention",
    lambda query, *others: (torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)),
)

torch.library.impl("fnrecipe::fence", "CompositeExplicitAutograd", lambda: None)
torch.library.register_fake("fnrecipe::fence", lambda: None)
has_side_effect(fence.default)

torch.library.impl("fnrecipe::slot_attention", "CPU", _slot_attention)
torch.library.register_fake("fnrecipe::slot_attention", lambda query, *others: torch.empty_like(query))

torch.library.impl("fnrecipe::norms", "CompositeExplicitAutograd", foreach_norms)
torch.library.register_fake("fnrecipe::adamw", lambda *args: None)

torch.library.register_fake("fnrecipe::norms", lambda tensors, order, dtype: tensors[0].new_empty(len(tensors), dtype=dtype))

torch.library.impl("fnrecipe::mm", "CPU", _mm_by_onednn)
torch.library.register_fake("fnrecipe::mm", lambda left, right: left.new_empty(left.shape[0], right.shape[1]))
