"""Parts: what one rank holds of tensors that are cut over ranks. A part is a node of a tree: updates see local tensors only.

The ranks of a gang are a mesh of three axes: replicas of the state, ranks among which a replica is cut (shard), and ranks
among which single matrix products are divided (tensor). A tensor is cut over the tensor axis first, and what is left over
the shard axis.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Sharding: TypeAlias = Literal["replicate", "zero1", "zero2", "fsdp"]

ALIGNMENT = 16
"""Elements. Vector kernels may round the last few elements of a tensor differently; parts are whole vectors of any width."""


@attrs.frozen
class Axis:
    """One axis of the mesh, seen from one of its ranks.

    size, index, group   ranks along it, this one's number, and the name of their process group
    blocks               parts that a cut along it may end up in at any size: what depends on a cut depends on these alone
    ordered              whether sums over it are taken in the order of the binary tree
    gathered             the dtype that float32 parameters are rounded to before they are used, and travel in
    """

    name: str
    size: int = 1
    index: int = 0
    group: str = ""
    blocks: int = 1
    ordered: bool = True
    gathered: torch.dtype | None = None


@attrs.frozen(eq=False)
class Shard:
    """The slice number `axis.index` of `axis.size` of a tensor along `dim`, or all of it if `dim` is None.

    `local` is a tensor, or a part again: what another axis leaves of the slice.
    """

    local: Any
    dim: int | None
    axis: Axis


@attrs.frozen
class Mesh:
    """The mesh, seen from one rank: number (replica * shard.size + shard) * tensor.size + tensor.

    sharding   what is whole when, for parameters that are cut over the shard axis (`fnrecipe.transforms.gradients`)
    rules      patterns of parameter paths, and the dimension that is cut over the tensor axis; the first that fits holds
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
        """Whether no rank holds all parameters."""
        return self.shard.size * self.tensor.size > 1

    @property
    def in_turns(self) -> bool:
        """Whether each microbatch is summed over the shard axis by itself: its ranks take turns with neighbouring ones."""
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
        """This rank's part of the parameter at `path`."""
        if self.tensor.size == 1:
            return _cut(leaf, shard_dim(leaf.shape, self.shard.blocks), self.shard)
        dim = next((dim for pattern, dim in self.rules.items() if fnmatch.fnmatchcase(path, pattern)), None)
        slice = _slice(leaf, dim, self.tensor)
        return Shard(_cut(slice, shard_dim(slice.shape, self.shard.blocks), self.shard), dim, self.tensor)


Placement: TypeAlias = Callable[[str, Tensor], Any]
"""What becomes of a parameter, by its path, as soon as it is made: all of it, or a part."""


def replicated(path: str, leaf: Tensor) -> Tensor:
    return leaf


def shard_dim(shape: torch.Size | tuple[int, ...], blocks: int) -> int | None:
    """The first dimension that `blocks` divides, into parts of whole vectors; None if there is none."""
    aligned = not torch.Size(shape).numel() % (blocks * ALIGNMENT)
    return next((dim for dim, size in enumerate(shape) if size % blocks == 0), None) if aligned else None


def is_shard(value: Any) -> bool:
    return isinstance(value, Shard)


def global_slice(leaf: Any) -> tuple[torch.Size, list[tuple[int, int]]]:
    """The shape of the whole tensor that `leaf` is a part of, and the part's (start, stop) along each dimension."""
    if not isinstance(leaf, Shard):
        return leaf.shape, [(0, size) for size in leaf.shape]
    shape, ranges = global_slice(leaf.local)
    if leaf.dim is None:
        return shape, ranges
    sizes, offset = list(shape), leaf.axis.index * shape[leaf.dim]
    sizes[leaf.dim] *= leaf.axis.size
    ranges[leaf.dim] = ranges[leaf.dim][0] + offset, ranges[leaf.dim][1] + offset
    return torch.Size(sizes), ranges


def outline(leaf: Shard | Tensor) -> Tensor:
    """The whole tensor that `leaf` is a part of, without its numbers: shape and dtype, on the device meta."""
    (tensor,) = pytree.tree_leaves(leaf)
    with _disable_current_modes():  # it is no part of a trace
        return torch.empty(global_slice(leaf)[0], dtype=tensor.dtype, device="meta")


def is_primary(leaf: Any, mesh: Mesh) -> bool:
    """Whether this rank is the first of those that hold the same part of the same tensor."""
    cut = set()
    while is_shard(leaf):
        cut |= {leaf.axis} if leaf.dim is not None else set()
        leaf = leaf.local
    return all(axis.index == 0 or axis in cut for axis in mesh.axes)


def _slice(leaf: Tensor, dim: int | None, axis: Axis) -> Tensor:
    if dim is None:
        return leaf
    if leaf.shape[dim] % axis.size:
        raise ValueError(f"cannot cut {list(leaf.shape)} along dimension {dim} into {axis.size} parts")
    return leaf.chunk(axis.size, dim)[axis.index]


def _cut(leaf: Tensor, dim: int | None, axis: Axis) -> Shard:
    return Shard(_slice(leaf, dim, axis).clone(memory_format=torch.contiguous_format), dim, axis)


def _flatten(part: Shard) -> tuple[list[Any], tuple[int | None, Axis]]:
    return [part.local], (part.dim, part.axis)


pytree.register_pytree_node(
    Shard,
    _flatten,
    lambda children, context: Shard(next(iter(children)), *context),
    serialized_type_name="fnrecipe.Shard",
    # A part stands for its tensor: it adds nothing to the tensor's path.
    flatten_with_keys_fn=lambda part: ([(pytree.GetAttrKey(""), part.local)], (part.dim, part.axis)),
)
