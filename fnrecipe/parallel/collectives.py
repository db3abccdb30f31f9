"""All-reduce, reduce-scatter and all-gather of lists of tensors along an axis of the mesh, in buckets.

Sums are taken in an order that does not depend on the number of ranks, unless `Axis.ordered` is false. `with_transpose` makes
a collective differentiable. Each one is waited for at once: `fnrecipe.compiler.overlap` moves the waits in a traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed  # defines the operators below
from torch import Tensor

from fnrecipe import tree
from fnrecipe.ops import Context
from fnrecipe.parallel.mesh import Axis
from fnrecipe.tree import Tree

# Why the bits are equal at any power of two of ranks. The summands of a step are its M microbatches, M a power of two, and the
# order of additions is the balanced binary tree over them. A rank that holds M / R neighbouring microbatches adds them up as
# that tree does (`fnrecipe.transforms.accumulate`), and so holds the root of a subtree; the trees of R ranks are joined here by
# the upper log2(R) levels. R only says which additions happen on which side of the network. (`zero2` and `fsdp` take the lower
# levels here and the upper ones in `accumulate`, by giving neighbouring microbatches to different ranks.)
#
# A library's reduce-scatter adds in the order of its ring or tree, which depends on R. So the slices travel unsummed
# (all-to-all), and each rank adds its R slices by itself: the same bytes as a ring's reduce-scatter, and half of gloo's, which
# moves as many as an all-reduce. An all-reduce is that and an all-gather.

c10d = torch.ops._c10d_functional

_BUCKET_BYTES = 32 << 20

Dims: TypeAlias = Sequence[int | None]
"""For each tensor the dimension along which it is sharded, or None if it is not."""

Linear: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A linear function of a list of tensors."""


def with_transpose(function: Linear, transpose: Linear) -> Linear:
    """The linear `function` with `transpose` as its backward, and `function` as the backward of that.

    (`torch.func` refuses torch's own differentiable collectives, and custom operators with a backward.)
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(inputs))

        @staticmethod
        def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, ...]:
            return tuple(with_transpose(transpose, function)(gradients))

    return lambda inputs: Function.apply(*inputs)  # type: ignore[no-untyped-call]


def all_reduce(values: Tree, axis: Axis) -> Tree:
    """The sum of all ranks' `values`, on every rank."""
    if axis.size == 1:
        return values
    tensors = tree.leaves(values)
    sums = dict(_in_buckets([tensor.reshape(1, -1) for tensor in tensors], partial(_full_sum, axis=axis)))
    return tree.like(values, [sums[n].view(tensor.shape) for n, tensor in enumerate(tensors)])


def reduce_scatter(tensors: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """This rank's slice, along its dimension, of each sum over the ranks; the full sum where the dimension is None."""
    if axis.size == 1:
        return list(tensors)
    sharded, unsharded = _split(dims)
    numbers, rows = list(sharded), [_rows(tensors[n], dim, axis.size) for n, dim in sharded.items()]
    sums = {numbers[i]: total for i, total in _in_buckets(rows, partial(_slice_sum, axis=axis))}
    sums = {n: total.view(_slice_shape(tensors[n], sharded[n], axis.size)) for n, total in sums.items()}
    return _merged(sums, all_reduce({n: tensors[n] for n in unsharded}, axis))


def all_gather(shards: Sequence[Tensor], dims: Dims, axis: Axis) -> list[Tensor]:
    """The full tensors of which each rank holds a slice along their dimension, or a copy where the dimension is None."""
    if axis.size == 1:
        return list(shards)
    sharded, unsharded = _split(dims)
    numbers, rows = list(sharded), [shards[n].reshape(1, -1) for n in sharded]
    gathered = _in_buckets(rows, partial(_all_rows, axis=axis), axis.size)
    full = {numbers[i]: _joined(row, shards[numbers[i]], sharded[numbers[i]]) for i, row in gathered}
    return _merged(full, {n: shards[n] for n in unsharded})


def _split(dims: Dims) -> tuple[dict[int, int], list[int]]:
    """The dimensions of the sharded tensors, by their numbers, and the numbers of the others."""
    numbered = list(enumerate(dims))
    return {n: dim for n, dim in numbered if dim is not None}, [n for n, dim in numbered if dim is None]


def _merged(*found: dict[int, Tensor]) -> list[Tensor]:
    by_number = {number: tensor for tensors in found for number, tensor in tensors.items()}
    return [by_number[number] for number in sorted(by_number)]


def _rows(tensor: Tensor, dim: int, size: int) -> Tensor:
    """[size, n]: the slices along `dim`, flattened."""
    return torch.stack(tensor.chunk(size, dim)).view(size, -1) if dim else tensor.reshape(size, -1)


def _joined(rows: Tensor, shard: Tensor, dim: int) -> Tensor:
    """The tensor whose slices along `dim`, shaped like `shard`, are the rows; contiguous."""
    # Slices of one row would otherwise stay where they are in the bucket, for which no copy is needed; and products with a
    # matrix whose rows lie far apart round otherwise than those with the same matrix at another number of ranks.
    return rows.reshape(-1, *shard.shape).movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _slice_shape(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [length // size if number == dim else length for number, length in enumerate(tensor.shape)]


def _slice_sum(bucket: Tensor, *, axis: Axis) -> Tensor:
    """This rank's row, [1, n], of the sum of all ranks' buckets [size, n]."""
    if not axis.ordered:
        return _wait(c10d.reduce_scatter_tensor(bucket, "sum", axis.size, axis.group))
    ones = [1] * axis.size
    return _tree_reduce(list(_wait(c10d.all_to_all_single(bucket, ones, ones, axis.group)).chunk(axis.size)))


def _all_rows(bucket: Tensor, *, axis: Axis) -> Tensor:
    """The buckets [1, n] of all ranks, [size, n]."""
    # Into a tensor of our own: the operator that allocates its result runs on gloo as a coalesced gather, which corrupts the
    # heap if the caller does anything while it is in flight (one run in three; twenty lines without fnrecipe show it).
    rows = bucket.new_empty(axis.size, bucket.shape[1])
    return _wait(c10d.all_gather_into_tensor_out(bucket, axis.size, axis.group, out=rows))


def _full_sum(bucket: Tensor, *, axis: Axis) -> Tensor:
    """The sum of all ranks' buckets [1, n], [1, n]."""
    if not axis.ordered:
        return _wait(c10d.all_reduce(bucket, "sum", axis.group))
    missing = -bucket.numel() % axis.size
    padded = torch.nn.functional.pad(bucket, (0, missing)) if missing else bucket
    total = _all_rows(_slice_sum(padded.view(axis.size, -1), axis=axis), axis=axis).reshape(1, -1)
    return total[:, : bucket.numel()]


def _in_buckets(
    tensors: Sequence[Tensor], collective: Callable[[Tensor], Tensor], times: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Applies `collective` to buckets of matrices [rows, n], side by side; yields each matrix's number and its result."""
    for bucket in buckets(tensors, times):
        columns = [tensors[n] for n in bucket]
        result = collective(torch.cat(columns, 1) if len(columns) > 1 else columns[0])
        yield from zip(bucket, torch.split(result, [column.shape[1] for column in columns], 1), strict=True)


def buckets(tensors: Sequence[Tensor], times: int = 1) -> list[list[int]]:
    """The numbers of the tensors in each bucket: neighbours of one dtype, up to 32 MiB together, or one tensor that is larger.

    `times`: how many times larger a collective's result is than its input.
    """
    # A collective costs a latency, so small tensors share one. All tensors in one bucket would be as bad: the next bucket is
    # in flight while this one is used, and both are allocated, so their size bounds what is held besides the parameters.
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


def _tree_reduce(slices: list[Tensor]) -> Tensor:
    """The sum of a power of two of tensors, neighbours first: the balanced binary tree."""
    while len(slices) > 1:
        slices = [left + right for left, right in zip(slices[::2], slices[1::2], strict=True)]
    return slices[0]


def _wait(started: Tensor) -> Tensor:
    waited: Tensor = c10d.wait_tensor(started)
    return waited
