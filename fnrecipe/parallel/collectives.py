"""Collectives over an axis of the mesh, on lists of tensors: gathering parts, and sums of whole tensors, cut or not.

`with_transpose` makes them differentiable.

Sums are taken in an order that does not depend on how many ranks there are: each rank gets its slice of every rank's tensors
(all_to_all) and adds these up in the balanced binary tree; that moves the bytes of a ring's reduce-scatter. If each rank's
tensors are the tree's sums over its run of neighbouring microbatches, the result has the same bits at any power of two of
ranks.
`Axis.ordered=False` leaves the order to the library.

Tensors travel as columns of buckets [rows, n]. Each exchange is waited for at once; `fnrecipe.compiler.overlap` moves the
wait in a traced graph, so that something else is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed  # defines the operators below
from torch import Tensor

from fnrecipe import tree
from fnrecipe.parallel.mesh import Axis
from fnrecipe.tree import Tree

c10d = torch.ops._c10d_functional

_BUCKET_BYTES = 32 << 20

Dims: TypeAlias = Sequence[int | None]
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


def all_reduce(values: Tree, axis: Axis) -> Tree:
    """The sum of all ranks' `values`, on every rank."""
    if axis.size == 1:
        return values
    tensors = tree.leaves(values)
    sums = dict(_in_buckets([tensor.reshape(1, -1) for tensor in tensors], partial(_whole_sum, axis=axis)))
    return tree.like(values, [sums[n].view(tensor.shape) for n, tensor in enumerate(tensors)])


def reduce_scatter(tensors: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """This rank's slice of each sum over the ranks, cut along its dimension; all of the sum where that is None."""
    if axis.size == 1:
        return list(tensors)
    cut, uncut = _split(dims)
    numbers, rows = list(cut), [_rows(tensors[n], dim, axis.size) for n, dim in cut.items()]
    found = {numbers[i]: total for i, total in _in_buckets(rows, partial(_slice_sum, axis=axis))}
    found = {n: total.view(_slice_shape(tensors[n], cut[n], axis.size)) for n, total in found.items()}
    return _merged(found, all_reduce({n: tensors[n] for n in uncut}, axis))


def all_gather(parts: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """The whole tensors of which each rank holds a slice along their dimension, or all where that is None."""
    if axis.size == 1:
        return list(parts)
    cut, uncut = _split(dims)
    numbers, rows = list(cut), [parts[n].reshape(1, -1) for n in cut]
    arrived = _in_buckets(rows, partial(_all_rows, axis=axis), axis.size)
    found = {numbers[i]: _joined(row, parts[numbers[i]], cut[numbers[i]]) for i, row in arrived}
    return _merged(found, {n: parts[n] for n in uncut})


def _split(dims: Dims) -> tuple[dict[int, int], list[int]]:
    """The dimensions of the tensors that are cut, by their numbers, and the numbers of the others."""
    numbered = list(enumerate(dims))
    return {n: dim for n, dim in numbered if dim is not None}, [n for n, dim in numbered if dim is None]


def _merged(*found: dict[int, Tensor]) -> list[Tensor]:
    both = {number: tensor for part in found for number, tensor in part.items()}
    return [both[number] for number in sorted(both)]


def _rows(tensor: Tensor, dim: int, size: int) -> Tensor:
    """[size, n]: the slices along `dim`."""
    return torch.stack(tensor.chunk(size, dim)).view(size, -1) if dim else tensor.reshape(size, -1)


def _joined(rows: Tensor, part: Tensor, dim: int) -> Tensor:
    """The tensor whose slices along `dim`, shaped like `part`, are the rows."""
    return rows.reshape(-1, *part.shape).movedim(0, dim).flatten(dim, dim + 1)


def _slice_shape(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [length // size if number == dim else length for number, length in enumerate(tensor.shape)]


def _slice_sum(bucket: Tensor, *, axis: Axis) -> Tensor:
    """Of [size, n]: this rank's row of the sum over the ranks, [1, n]."""
    if not axis.ordered:
        return _wait(c10d.reduce_scatter_tensor(bucket, "sum", axis.size, axis.group))
    ones = [1] * axis.size
    return _tree_reduce(list(_wait(c10d.all_to_all_single(bucket, ones, ones, axis.group)).chunk(axis.size)))


def _all_rows(bucket: Tensor, *, axis: Axis) -> Tensor:
    """Of [1, n]: those of all ranks, [size, n]."""
    # (Over gloo, the gather that allocates its own result corrupts the heap while the caller does something else.)
    rows = bucket.new_empty(axis.size, bucket.shape[1])
    return _wait(c10d.all_gather_into_tensor_out(bucket, axis.size, axis.group, out=rows))


def _whole_sum(bucket: Tensor, *, axis: Axis) -> Tensor:
    """Of [1, n]: the sum over the ranks, [1, n]."""
    if not axis.ordered:
        return _wait(c10d.all_reduce(bucket, "sum", axis.group))
    missing = -bucket.numel() % axis.size
    padded = torch.nn.functional.pad(bucket, (0, missing)) if missing else bucket
    whole = _all_rows(_slice_sum(padded.view(axis.size, -1), axis=axis), axis=axis).reshape(1, -1)
    return whole[:, : bucket.numel()]


def _in_buckets(
    tensors: Sequence[Tensor], exchange: Callable[[Tensor], Tensor], times: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """The number of each matrix [rows, n], and what `exchange` makes of it, side by side with others in a bucket."""
    for bucket in buckets(tensors, times):
        sides = [tensors[n] for n in bucket]
        result = exchange(torch.cat(sides, 1) if len(sides) > 1 else sides[0])
        yield from zip(bucket, torch.split(result, [side.shape[1] for side in sides], 1), strict=True)


def buckets(tensors: Sequence[Tensor], times: int = 1) -> list[list[int]]:
    """The numbers of the tensors that travel together: neighbours of one dtype, of a size that is worth a message.

    `times`: how much larger a tensor is behind the exchange.
    """
    found: dict[torch.dtype, list[list[int]]] = {}
    sizes: dict[torch.dtype, int] = {}
    for number, tensor in enumerate(tensors):
        size = sizes.get(tensor.dtype, _BUCKET_BYTES) + times * tensor.nbytes
        if size > _BUCKET_BYTES:
            found.setdefault(tensor.dtype, []).append([])
            size = times * tensor.nbytes
        found[tensor.dtype][-1].append(number)
        sizes[tensor.dtype] = size
    return [bucket for of_dtype in found.values() for bucket in of_dtype]


def _tree_reduce(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _wait(started: Tensor) -> Tensor:
    waited: Tensor = c10d.wait_tensor(started)
    return waited
