"""The state of an optimizer in fewer bits: moments of 8 bits with a scale for each block, or of bfloat16."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import UsageError
from fnrecipe.optim.dynamic_map import decode, encode
from fnrecipe.optim.stochastic_rounding import wide
from fnrecipe.optim.transform import Report, Transform
from fnrecipe.parallel.mesh import Dealt, Shard, global_slice, is_shard, unwrapped
from fnrecipe.tree import Tree

StateDtype: TypeAlias = Literal["bfloat16", "8bit"]

BLOCK = 256
"""Elements that share a scale, at most."""

SQUARES = "square"
"""What transforms call a tree of squares in their state: its numbers have no sign, and so a bit more."""


@tree.node
@attrs.frozen(eq=False)
class Quantized:
    """A tensor of at least two dimensions, or this rank's shard of it, in 8 bits an element (Dettmers et al. 2022).

    codes   uint8, like the tensor: places in `fnrecipe.optim.dynamic_map`
    scale   float32: the greatest magnitude in each block, like the tensor but for the dimension along which blocks lie
    signed  whether numbers have a sign
    dtype   that of the tensor
    """

    codes: Tree
    scale: Tree
    signed: bool = attrs.field(metadata=tree.STATIC)
    dtype: torch.dtype = attrs.field(metadata=tree.STATIC)


def low_precision(transform: Transform, dtype: StateDtype) -> Transform:
    """`transform`, between whose updates all of its state that is like a matrix of the parameters is kept in `dtype`.

    8bit      blockwise dynamic quantisation, to the nearest (Dettmers et al. 2022, arXiv:2110.02861)
    bfloat16  rounded stochastically by `guarded_update`, as parameters in bfloat16 are

    Each update computes in float32. Vectors, and what belongs to no single parameter, stay as they are. It is for moments of
    single elements, however the transform is composed: not for SOAP's bases, nor for parameters kept in the state.

    Raises:
        UsageError: if the transform needs more than single elements, or a part of a state is dealt over ranks.
    """
    if transform.needs != "elements":
        raise UsageError(
            f"optim.low_precision: expected a transform that needs elements, found one that needs {transform.needs}"
        )

    def init(params: Tree) -> Tree:
        state, owners = transform.init(params), tree.paths(params, is_shard)
        leaves, spec = pytree.tree_flatten(state, is_shard)
        paths = tree.paths(state, is_shard)
        return pytree.tree_unflatten(
            [
                _narrowed(path, leaf, dtype) if _is_moment(path, leaf, owners) else leaf
                for path, leaf in zip(paths, leaves, strict=True)
            ],
            spec,
        )

    def update(gradients: Tree, state: Tree, params: Tree, step: Tensor) -> tuple[Tree, Tree, Report]:
        updates, after, report = transform.update(gradients, _widened(state), params, step)
        before, spec = pytree.tree_flatten(state, _is_quantized)
        new = [
            quantize(value, old.signed) if _is_quantized(old) else value
            for old, value in zip(before, spec.flatten_up_to(after), strict=True)
        ]
        return updates, pytree.tree_unflatten(new, spec), report

    show = transform.shown
    return Transform(init, update, shown=None if show is None else lambda state, params: show(_widened(state), params))


def quantize(value: Tensor | Shard, signed: bool) -> Quantized:
    """Each element over the greatest magnitude of its block, as the nearest number of `fnrecipe.optim.dynamic_map`.

    A block is at most `BLOCK` neighbours along the last dimension that no rank may have a shard of: so blocks are the same
    under every sharding.
    """
    (tensor,) = tree.leaves(value)
    along = _along(value)
    blocks = _blocks(tensor.transpose(along, -1))
    scale = blocks.abs().amax(-1, keepdim=True).float()
    places = encode(blocks.float() / torch.where(scale > 0, scale, 1.0), signed)
    codes = places.flatten(-2)[..., : tensor.shape[along]]

    def like(turned: Tensor) -> Tree:
        return tree.like(value, [turned.transpose(along, -1).contiguous()])

    return Quantized(like(codes), like(scale.squeeze(-1)), signed, wide(tensor).dtype)


def dequantize(value: Quantized) -> Tensor | Shard:
    """The tensor or shard, in its dtype."""
    (codes,), (scale,) = tree.leaves(value.codes), tree.leaves(value.scale)
    along = _along(value.codes)
    units = decode(_blocks(codes.transpose(along, -1)), value.signed)
    tensor = (units * scale.transpose(along, -1).unsqueeze(-1)).flatten(-2)[..., : codes.shape[along]]
    found: Tensor | Shard = tree.like(value.codes, [tensor.transpose(along, -1).contiguous().to(value.dtype)])
    return found


def _widened(state: Tree) -> Tree:
    def leaf(value: Tree) -> Tree:
        return dequantize(value) if _is_quantized(value) else wide(value)

    return pytree.tree_map(leaf, state, is_leaf=_is_quantized)


def _narrowed(path: str, value: Tensor | Shard | Dealt, dtype: StateDtype) -> Tree:
    if isinstance(value, Dealt):
        raise UsageError(f"optim.low_precision: expected state of single elements, found {path}, which one rank has whole")
    if dtype == "bfloat16":
        return tree.map(Tensor.bfloat16, value)
    return quantize(value, signed=SQUARES not in path.split("."))


def _is_moment(path: str, leaf: Tree, owners: dict[str, Tree]) -> bool:
    """Whether a part of a state is like a matrix of the parameters, by path and shape."""
    (tensor,) = tree.leaves(leaf)
    shape = global_slice(leaf)[0]
    like = (global_slice(owner)[0] == shape for name, owner in owners.items() if f".{path}".endswith(f".{name}"))
    return len(shape) > 1 and tensor.is_floating_point() and any(like)


def _is_quantized(value: object) -> bool:
    return isinstance(value, Quantized)


def _along(value: Tensor | Shard) -> int:
    """The dimension along which blocks lie: the last one that is not cut, at any number of ranks."""
    tensor, cut = unwrapped(value)
    return next(dim for dim in reversed(range(tensor.ndim)) if dim not in cut.values())


def _blocks(tensor: Tensor) -> Tensor:
    """[..., n] as [..., blocks, block], with zeros behind the last element."""
    length = tensor.shape[-1]
    count = -(-length // BLOCK)
    block = min(BLOCK, length)
    padded = tensor if count * block == length else F.pad(tensor, (0, count * block - length))
    return padded.reshape(*tensor.shape[:-1], count, block)
