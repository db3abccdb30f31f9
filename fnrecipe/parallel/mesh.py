"""The mesh of a gang's ranks, and `Shard`, what one rank holds of a sharded tensor.

The mesh has three axes: replicas of the state (replica), ranks that share one replica (shard), and ranks that share single
matrix products (tensor). A tensor is sharded along the tensor axis first, and the result along the shard axis. A shard is a
node of a tree with the local tensor as its child, so that updates and checkpoints need not know of it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, TypeGuard

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fnrecipe.tree import Tree

Sharding: TypeAlias = Literal["replicate", "zero1", "zero2", "fsdp"]

ALIGNMENT = 16
"""Elements of which a shard holds a multiple: vectorised kernels may round the last few elements of a tensor differently."""


@attrs.frozen
class Axis:
    """One axis of the mesh, seen from one of its ranks.

    size, index, group   ranks along it, this rank's index, and the name of their process group
    blocks               the most shards of a tensor at any size; reductions over a shard are taken block by block
    ordered              whether sums over it are taken in the order of the binary tree
    gathered             the dtype to which float32 parameters are rounded before they are gathered and used
    replicas             the axis along which ranks hold copies of a shard over this one
    """

    name: str
    size: int = 1
    index: int = 0
    group: str = ""
    blocks: int = 1
    ordered: bool = True
    gathered: torch.dtype | None = None
    replicas: Axis | None = None


@attrs.frozen(eq=False)
class Shard:
    """The slice `axis.index` of `axis.size` of a tensor along `dim`, or the full tensor if `dim` is None.

    `local` is a tensor, or a shard again: that of the slice along another axis.
    """

    local: Tree
    dim: int | None
    axis: Axis


@attrs.frozen(eq=False)
class Dealt:
    """A tensor of `shape` that one rank holds whole, and the others do not hold at all.

    `local` is the tensor where it is `held`, elsewhere one without elements.
    """

    local: Tensor
    shape: torch.Size
    held: bool


@attrs.frozen
class Mesh:
    """The mesh, seen from one of its ranks, (replica * shard.size + shard) * tensor.size + tensor.

    sharding   when parameters and gradients are unsharded along the shard axis (`fnrecipe.transforms.gradients`)
    rules      patterns of parameter paths, and the dimension sharded along the tensor axis; the first that matches applies
    """

    replica: Axis = Axis("replica")
    shard: Axis = Axis("shard")
    tensor: Axis = Axis("tensor")
    sharding: Sharding = "replicate"
    rules: Mapping[str, int] = attrs.field(factory=dict, eq=False)

    @property
    def ranks(self) -> int:
        return self.replica.size * self.shard.size * self.tensor.size

    @property
    def cuts(self) -> bool:
        """Whether parameters are sharded."""
        return self.shard.size * self.tensor.size > 1

    @property
    def gathers(self) -> bool:
        """Whether a step has all-gathers: of shards, or of the slices of sums in order."""
        return self.cuts or (self.ranks > 1 and self.replica.ordered)

    @property
    def in_turns(self) -> bool:
        """Whether each microbatch is reduced over the shard axis, whose ranks then take neighbouring microbatches in turn."""
        return self.sharding in ("zero2", "fsdp")

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        return self.replica, self.shard, self.tensor

    def microbatches(self, count: int) -> range:
        """The numbers of this rank's `count` microbatches among those of all ranks, in the order of its rows.

        (It is the order of `fnrecipe.data.LaneAssignment`.)
        """
        if self.in_turns:
            first, step = self.replica.index * self.shard.size * count + self.shard.index, self.shard.size
        else:
            first, step = (self.replica.index * self.shard.size + self.shard.index) * count, 1
        return range(first, first + count * step, step)

    def cut(self, path: str, leaf: Tensor) -> Shard:
        """This rank's shard of the parameter at `path`."""
        if self.tensor.size == 1:
            return _cut(leaf, shard_dim(leaf.shape, self.shard.blocks), self.shard)
        dim = next((dim for pattern, dim in self.rules.items() if fnmatch.fnmatchcase(path, pattern)), None)
        slice = _slice(leaf, dim, self.tensor)
        return Shard(_cut(slice, shard_dim(slice.shape, self.shard.blocks), self.shard), dim, self.tensor)


Placement: TypeAlias = Callable[[str, Tensor], Tree]
"""(path, full parameter) -> what this rank keeps of it: the parameter, or a shard. Called as soon as a parameter is made."""


def replicated(path: str, leaf: Tensor) -> Tensor:
    return leaf


def shard_dim(shape: torch.Size | tuple[int, ...], blocks: int) -> int | None:
    """The first dimension that `blocks` divides, if blocks are a multiple of `ALIGNMENT` elements; else None."""
    aligned = not torch.Size(shape).numel() % (blocks * ALIGNMENT)
    return next((dim for dim, size in enumerate(shape) if size % blocks == 0), None) if aligned else None


def is_shard(value: object) -> TypeGuard[Shard | Dealt]:
    """Whether `value` is what a rank holds of a tensor. (Parameters, gradients and updates are never `Dealt`.)"""
    return isinstance(value, Shard | Dealt)


def spans_ranks(values: Tree) -> bool:
    """Whether any of `values` is a shard among several."""
    leaves = pytree.tree_leaves(values, is_shard)
    return any(isinstance(leaf, Shard) and (leaf.axis.size > 1 or spans_ranks(leaf.local)) for leaf in leaves)


def rank_axes(leaf: Tree) -> tuple[Axis, ...]:
    """The axes of several ranks along which `leaf` is sharded or copied: replica, shard, tensor."""
    if not isinstance(leaf, Shard):
        return ()
    replicas = () if leaf.axis.replicas is None else (leaf.axis.replicas,)
    return (*rank_axes(leaf.local), *(axis for axis in (*replicas, leaf.axis) if axis.size > 1))


def unwrapped(leaf: Tree) -> tuple[Tensor, dict[Axis, int]]:
    """The tensor within nested shards, and the dimension along which each axis shards it; the axis cut first comes first."""
    if not isinstance(leaf, Shard):
        return leaf, {}
    tensor, axes = unwrapped(leaf.local)
    return tensor, axes if leaf.dim is None else {leaf.axis: leaf.dim, **axes}


def global_slice(leaf: Tree) -> tuple[torch.Size, list[tuple[int, int]]]:
    """The shape of the unsharded tensor of `leaf`, and the (start, stop) of `leaf` in it along each dimension."""
    if isinstance(leaf, Dealt):
        return leaf.shape, [(0, size if leaf.held else 0) for size in leaf.shape]
    if not isinstance(leaf, Shard):
        return leaf.shape, [(0, size) for size in leaf.shape]
    shape, ranges = global_slice(leaf.local)
    if leaf.dim is None:
        return shape, ranges
    sizes, offset = list(shape), leaf.axis.index * shape[leaf.dim]
    sizes[leaf.dim] *= leaf.axis.size
    ranges[leaf.dim] = ranges[leaf.dim][0] + offset, ranges[leaf.dim][1] + offset
    return torch.Size(sizes), ranges


def outline(leaf: Shard | Dealt | Tensor) -> Tensor:
    """The whole tensor that `leaf` is a shard of, without its numbers: shape and dtype, on the device meta."""
    (tensor,) = pytree.tree_leaves(leaf)
    with _disable_current_modes():  # it is no part of a trace
        return torch.empty(global_slice(leaf)[0], dtype=tensor.dtype, device="meta")


def is_primary(leaf: Tree, mesh: Mesh) -> bool:
    """Whether this rank is the first of those that hold the same shard of the same tensor."""
    if isinstance(leaf, Dealt):
        return leaf.held
    _, sharded = unwrapped(leaf)
    return all(axis.index == 0 or axis in sharded for axis in mesh.axes)


def _slice(leaf: Tensor, dim: int | None, axis: Axis) -> Tensor:
    if dim is None:
        return leaf
    if leaf.shape[dim] % axis.size:
        raise ValueError(f"cannot cut {list(leaf.shape)} along dimension {dim} into {axis.size} parts")
    return leaf.chunk(axis.size, dim)[axis.index]


def _cut(leaf: Tensor, dim: int | None, axis: Axis) -> Shard:
    return Shard(_slice(leaf, dim, axis).clone(memory_format=torch.contiguous_format), dim, axis)


def _flatten(shard: Shard) -> tuple[list[Tree], tuple[int | None, Axis]]:
    return [shard.local], (shard.dim, shard.axis)


pytree.register_pytree_node(
    Shard,
    _flatten,
    lambda children, context: Shard(next(iter(children)), *context),
    serialized_type_name="fnrecipe.Shard",
    # A shard stands for its tensor: it adds nothing to the tensor's path.
    flatten_with_keys_fn=lambda shard: ([(pytree.GetAttrKey(""), shard.local)], (shard.dim, shard.axis)),
)
pytree.register_pytree_node(
    Dealt,
    lambda dealt: ([dealt.local], (dealt.shape, dealt.held)),
    lambda children, context: Dealt(next(iter(children)), *context),
    serialized_type_name="fnrecipe.Dealt",
    flatten_with_keys_fn=lambda dealt: ([(pytree.GetAttrKey(""), dealt.local)], (dealt.shape, dealt.held)),
)
