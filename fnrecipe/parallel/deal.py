"""Tensors dealt over ranks: what is computed of a whole tensor is computed once, by the rank that owns it.

A rank sends its slices to their owners, and gets its slices of the results back: along each axis one all-to-all there and one
back. Who owns what follows from shapes and the number of ranks alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import attrs
import torch
import torch.distributed  # defines the operators below
from torch import Tensor

from fnrecipe import tree
from fnrecipe.ops import opaque_clone, optimization_barrier
from fnrecipe.parallel.mesh import Axis, global_slice, is_shard, rank_axes, unwrapped
from fnrecipe.tree import Tree

c10d = torch.ops._c10d_functional

Key: TypeAlias = tuple[str, str]
"""What a tensor is, and the path at which it is that."""

Kind: TypeAlias = tuple[torch.Size, torch.dtype]


@attrs.frozen
class Hop:
    """How a tensor passes one axis: its owner's index, and the dimension along which it is sharded, None if it is copied."""

    owner: int
    dim: int | None


Route: TypeAlias = tuple[Hop, ...]
"""A hop for each axis."""


@attrs.frozen
class Deal:
    """The axes of several ranks, and the route of each tensor, by path."""

    axes: tuple[Axis, ...]
    routes: Mapping[str, Route]

    def owns(self, path: str) -> bool:
        """Whether this rank owns the tensor at `path`."""
        return all(hop.owner == axis.index for hop, axis in zip(self.routes[path], self.axes, strict=True))

    def whole(self, path: str) -> Route:
        """The route of what each rank gets whole from the owner of the tensor at `path`."""
        return tuple(Hop(hop.owner, None) for hop in self.routes[path])


def deal(values: Tree) -> Deal:
    """Each of `values` to one rank: the most expensive first, each to the rank that has least to do so far."""
    leaves = tree.paths(values, is_shard)
    axes = tuple(dict.fromkeys(axis for leaf in leaves.values() for axis in rank_axes(leaf)))
    sizes = [axis.size for axis in axes]
    costs = {path: _cost(global_slice(leaf)[0]) for path, leaf in leaves.items()}
    loads, routes = [0] * math.prod(sizes), {}
    for path in sorted(leaves, key=lambda path: -costs[path]):
        rank = loads.index(min(loads))
        loads[rank] += costs[path]
        dims = unwrapped(leaves[path])[1]
        routes[path] = tuple(Hop(i, dims.get(axis)) for i, axis in zip(_indices(rank, sizes), axes, strict=True))
    return Deal(axes, routes)


def at_owners(
    parts: Mapping[Key, Tensor],
    kinds: Mapping[Key, Kind],
    routes: Mapping[Key, Route],
    axes: Sequence[Axis],
    compute: Callable[[Mapping[Key, Tensor]], Mapping[Key, Tensor]],
    device: torch.device,
) -> Mapping[Key, Tensor]:
    """This rank's parts of what `compute` makes of the whole tensors that this rank owns.

    parts    this rank's part of each tensor
    kinds    shape and dtype of this rank's part of each result
    routes   of tensors and results
    axes     those of several ranks, the first of which is passed first on the way to the owner
    compute  gets tensors, and gives the results that this rank owns; on each rank others

    Raises:
        ValueError: if a result is of another shape or dtype.
    """
    # All ranks along an axis have the same `parts` and `kinds`, since they have the same indices along the axes before it: so
    # they agree on whether there is an all-to-all, and on what each of them sends.
    if not axes:
        return compute(parts)
    (axis, *rest), hops = axes, {key: route[0] for key, route in routes.items()}
    arrived, buffer = _to_owners(parts, hops, axis, device)
    owned = {key: _joined(kind, hops[key], axis) for key, kind in kinds.items() if hops[key].owner == axis.index}
    found = at_owners(arrived, owned, {key: route[1:] for key, route in routes.items()}, rest, compute, device)
    for key, kind in owned.items():
        if (found[key].shape, found[key].dtype) != kind:
            raise ValueError(f"{' of '.join(key)}: expected {kind}, found {(found[key].shape, found[key].dtype)}")
    return _from_owners(found, kinds, hops, axis, device, buffer)


def _to_owners(
    parts: Mapping[Key, Tensor], hops: Mapping[Key, Hop], axis: Axis, device: torch.device
) -> tuple[dict[Key, Tensor], Tensor | None]:
    """The tensors that this rank owns along the axis, joined from all ranks' slices; and the bytes that arrived."""
    mine = {key: part for key, part in parts.items() if hops[key].owner == axis.index}
    cut = {key: part for key, part in parts.items() if hops[key].dim is not None}
    if not cut:
        return mine, None
    sent = [[part for key, part in cut.items() if hops[key].owner == rank] for rank in range(axis.size)]
    awaited = {key: (part.shape, part.dtype) for key, part in cut.items() if key in mine}
    slices, buffer = _exchange(sent, [[*awaited.values()]] * axis.size, axis, device)
    joined = {key: torch.cat(of_ranks, hops[key].dim or 0) for key, *of_ranks in zip(awaited, *slices, strict=True)}
    return mine | joined, buffer


def _from_owners(
    found: Mapping[Key, Tensor],
    kinds: Mapping[Key, Kind],
    hops: Mapping[Key, Hop],
    axis: Axis,
    device: torch.device,
    earlier: Tensor | None,
) -> dict[Key, Tensor]:
    """This rank's parts of what all ranks along the axis have found; nothing is sent before `earlier` is there."""
    if not kinds:
        return {}
    keys = [[key for key in kinds if hops[key].owner == rank] for rank in range(axis.size)]
    sent = [[_part(found[key], hops[key], axis.size, rank) for key in keys[axis.index]] for rank in range(axis.size)]
    parts, _ = _exchange(sent, [[kinds[key] for key in of_rank] for of_rank in keys], axis, device, earlier)
    return dict(zip(chain(*keys), chain(*parts), strict=True))


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    awaited: Sequence[Sequence[Kind]],
    axis: Axis,
    device: torch.device,
    earlier: Tensor | None = None,
) -> tuple[list[list[Tensor]], Tensor]:
    """The tensors that each rank sends here, which are of these kinds, and all their bytes; `sent[i]` goes to rank i."""
    # As bytes: one all-to-all for tensors of all dtypes.
    rows = [torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *map(_bytes, tensors)]) for tensors in sent]
    sizes = [[shape.numel() * dtype.itemsize for shape, dtype in kinds] for kinds in awaited]
    row = torch.cat(rows)
    if earlier is not None:
        # A rank that owns nothing reads nothing of what arrives, and a compiler would drop an all-to-all that nobody reads.
        row = optimization_barrier(row, earlier)
    lengths = [*map(sum, sizes)], [*map(len, rows)]
    buffer: Tensor = c10d.wait_tensor(c10d.all_to_all_single(row, *lengths, axis.group))
    # Copies, which no pass may drop: bytes at any place are no numbers, and kernels may round by how their inputs are aligned.
    pieces = iter(torch.split(buffer, [*chain(*sizes)]))
    found = [[opaque_clone(next(pieces)).view(dtype).view(shape) for shape, dtype in kinds] for kinds in awaited]
    return found, buffer


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _part(whole: Tensor, hop: Hop, size: int, rank: int) -> Tensor:
    return whole if hop.dim is None else whole.chunk(size, hop.dim)[rank]


def _joined(kind: Kind, hop: Hop, axis: Axis) -> Kind:
    """The kind of what slices of `kind` make together."""
    shape, dtype = kind
    return torch.Size(n * axis.size if dim == hop.dim else n for dim, n in enumerate(shape)), dtype


def _cost(shape: torch.Size) -> int:
    """The multiplications in a product of a matrix with a square one, about, or of each matrix of a stack."""
    return shape.numel() * min(shape[-2:], default=1)


def _indices(rank: int, sizes: Sequence[int]) -> list[int]:
    """The indices along axes of these sizes, of which the last one varies first."""
    found: list[int] = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        found.insert(0, index)
    return found
