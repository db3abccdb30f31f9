"""Collectives over an axis of the mesh, on lists of tensors: gathering parts, and sums of whole tensors, cut or not.

`with_transpose` makes them differentiable.

Sums are taken in an order that does not depend on how many ranks there are: each rank gets its slice of every rank's tensors
(all_to_all) and adds these up in the balanced binary tree; that moves the bytes of a ring's reduce-scatter. If each rank's
tensors are the tree's sums over its run of neighbouring leaves, the result has the same bits at any power of two of ranks.
`Axis.ordered=False` leaves the order to the library.

Tensors travel as columns of buckets [rows, n], and a bucket is added up while the next one is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed  # defines the operators below
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parts import Axis
from fnrecipe.tree import Tree

c10d = torch.ops._c10d_functional

_BUCKET_BYTES = 32 << 20

Dims: TypeAlias = Sequence[int | None]
Exchange: TypeAlias = Callable[[Sequence[Tensor], Axis], Sequence[Tensor]]
Linear: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def with_transpose(function: Linear, transpose: Linear) -> Linear:
    """The linear `function`, whose gradient is `transpose` of the gradients of its results, whose gradient is `function`.

    (`torch.func` refuses torch's own differentiable collectives, and custom operators with a backward.)
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return tuple(function(inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return tuple(with_transpose(transpose, function)(gradients))

    return lambda inputs: Function.apply(*inputs)  # type: ignore[no-untyped-call]


def tree_sum(values: Tree, axis: Axis) -> Tree:
    """The sum of all ranks' `values`, on every rank."""
    if axis.size == 1:
        return values
    tensors = tree.leaves(values)
    sums = _in_buckets([tensor.reshape(1, -1) for tensor in tensors], _whole_sums, axis)
    return tree.like(values, [total.view(tensor.shape) for total, tensor in zip(sums, tensors, strict=True)])


def scatter_sum(tensors: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """This rank's slice of each sum over the ranks, cut along its dimension; all of the sum where that is None."""
    if axis.size == 1:
        return list(tensors)
    cut, whole = _split(tensors, dims)
    sums = _in_buckets([_rows(tensor, dim, axis.size) for tensor, dim in cut.values()], _slice_sums, axis)
    found = {n: total.view(_slice_shape(*cut[n], axis.size)) for n, total in zip(cut, sums, strict=True)}
    return _merged(len(tensors), found, tree_sum(whole, axis))


def gather(parts: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """The whole tensors of which each rank holds a slice along their dimension, or all where that is None."""
    if axis.size == 1:
        return list(parts)
    cut, whole = _split(parts, dims)
    rows = _in_buckets([part.reshape(1, -1) for part, _ in cut.values()], _all_rows, axis)
    found = {n: _joined(row, *cut[n]) for n, row in zip(cut, rows, strict=True)}
    return _merged(len(parts), found, whole)


def _split(tensors: Sequence[Tensor], dims: Dims) -> tuple[dict[int, tuple[Tensor, int]], dict[int, Tensor]]:
    """The tensors that are cut, with their dimension, and the others, by their numbers."""
    numbered = list(enumerate(zip(tensors, dims, strict=True)))
    cut = {n: (tensor, dim) for n, (tensor, dim) in numbered if dim is not None}
    return cut, {n: tensor for n, (tensor, dim) in numbered if dim is None}


def _merged(size: int, *found: dict[int, Tensor]) -> list[Tensor]:
    both = {number: tensor for part in found for number, tensor in part.items()}
    return [both[number] for number in range(size)]


def _rows(tensor: Tensor, dim: int, size: int) -> Tensor:
    """[size, n]: the slices along `dim`."""
    return torch.stack(tensor.chunk(size, dim)).view(size, -1) if dim else tensor.reshape(size, -1)


def _joined(rows: Tensor, part: Tensor, dim: int) -> Tensor:
    """The tensor whose slices along `dim`, shaped like `part`, are the rows."""
    return rows.reshape(-1, *part.shape).movedim(0, dim).flatten(dim, dim + 1)


def _slice_shape(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [length // size if number == dim else length for number, length in enumerate(tensor.shape)]


def _slice_sums(buckets: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Of each [size, n]: this rank's row of the sum over the ranks, [1, n]."""
    if not axis.ordered:
        return _waited([c10d.reduce_scatter_tensor(bucket, "sum", axis.size, axis.group) for bucket in buckets])
    ones = [1] * axis.size
    started = [c10d.all_to_all_single(bucket, ones, ones, axis.group) for bucket in buckets]
    return [_tree(list(c10d.wait_tensor(rows).chunk(axis.size))) for rows in started]


def _all_rows(buckets: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Of each [1, n]: those of all ranks, [size, n]."""
    return _waited([c10d.all_gather_into_tensor(bucket, axis.size, axis.group) for bucket in buckets])


def _whole_sums(buckets: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Of each [1, n]: the sum over the ranks, [1, n]."""
    if not axis.ordered:
        return _waited([c10d.all_reduce(bucket, "sum", axis.group) for bucket in buckets])
    padded = [torch.nn.functional.pad(bucket, (0, -bucket.numel() % axis.size)) for bucket in buckets]
    wholes = _all_rows(_slice_sums([bucket.view(axis.size, -1) for bucket in padded], axis), axis)
    return [whole.reshape(1, -1)[:, : bucket.numel()] for whole, bucket in zip(wholes, buckets, strict=True)]


def _in_buckets(tensors: Sequence[Tensor], exchange: Exchange, axis: Axis) -> list[Tensor]:
    """`exchange` of matrices [rows, n], side by side in buckets of one dtype each."""
    numbers = buckets(tensors)
    sides = [[tensors[n] for n in bucket] for bucket in numbers]
    results = exchange([torch.cat(side, 1) if len(side) > 1 else side[0] for side in sides], axis)
    found: dict[int, Tensor] = {}
    for bucket, result in zip(numbers, results, strict=True):
        found |= zip(bucket, torch.split(result, [tensors[n].shape[1] for n in bucket], 1), strict=True)
    return _merged(len(tensors), found)


def buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the tensors that travel together: neighbours of one dtype, of a size that is worth a message."""
    found: dict[torch.dtype, list[list[int]]] = {}
    sizes: dict[torch.dtype, int] = {}
    for number, tensor in enumerate(tensors):
        full = sizes.get(tensor.dtype, _BUCKET_BYTES) + tensor.nbytes > _BUCKET_BYTES
        if full:
            found.setdefault(tensor.dtype, []).append([])
        found[tensor.dtype][-1].append(number)
        sizes[tensor.dtype] = tensor.nbytes + (0 if full else sizes[tensor.dtype])
    return [bucket for of_dtype in found.values() for bucket in of_dtype]


def _tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _waited(started: Sequence[Tensor]) -> list[Tensor]:
    return [c10d.wait_tensor(tensor) for tensor in started]
