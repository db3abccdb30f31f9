"""Stochastic rounding to bfloat16: up or down to a neighbour, with the probabilities by which the mean is the value itself.

Updates are often less than half a unit in the last place of what they are added to; rounded to the nearest they would all be
lost. (Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192.)

The random number of an element depends on the run's key, the step, the tensor's path and the element's place in the whole
tensor alone: a tensor that is cut over ranks is rounded as if it were whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.parallel.mesh import Shard, global_slice, is_shard
from fnrecipe.tree import Tree


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


GAMMA, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
WORD = (1 << 63) - 1
_SHIFTS = (47, 31, 15)


def narrow(values: Tree) -> bool:
    """Whether any of the tensors is bfloat16."""
    return any(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(values))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is bfloat16, else as it is."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def seed(key: Tensor, step: Tensor) -> Tensor:
    """Where the random numbers of a step begin, int64 []; key int64 [2] is the run's, step int64 []."""
    words = random.fold_in(key, step)
    return (words[0] << 32) | words[1]


def like(before: Tree, after: Tree, key: Tensor, step: Tensor) -> Tree:
    """`after`, with what is bfloat16 in `before` rounded stochastically to it."""
    if not narrow(before):
        return after
    start, others = seed(key, step), tree.paths(before, is_shard)

    def leaf(path: str, value: Tree) -> Tensor:
        (tensor,) = tree.leaves(value)
        return rounded([tensor], start, path, value)[0] if narrow(others[path]) else tensor

    return tree.like(before, [leaf(path, value) for path, value in tree.paths(after, is_shard).items()])


def rounded(tensors: Sequence[Tensor], seed: Tensor, path: str, whole: Tensor | Shard) -> list[Tensor]:
    """Up to three float32 tensors, of finite numbers and one shape, rounded stochastically to bfloat16.

    seed   int64 [], that of the step
    path   which tensors they are
    whole  the tensor or part (`fnrecipe.parallel.mesh.Shard`) that tells where in the whole tensor they lie
    """
    if len(tensors) > len(_SHIFTS):
        raise ValueError(f"rounded: expected at most {len(_SHIFTS)} tensors, found {len(tensors)}")
    bits = random_bits(seed, path, whole)
    return [_rounded(tensor, bits >> shift) for tensor, shift in zip(tensors, _SHIFTS, strict=False)]


def random_bits(seed: Tensor, path: str, whole: Tensor | Shard) -> Tensor:
    """An int64 for each element of a tensor or part, whose bits 15 to 62 are random.

    It is the output function of SplitMix64 (Steele, Lea & Flood 2014), in 63 bits, of a counter that begins where seed and
    path say, without the last shift, which only mends bits that nobody takes.
    """
    mixed = _counter(whole, seed + _start(path)) & WORD
    mixed = ((mixed ^ (mixed >> 30)) * FIRST) & WORD
    return ((mixed ^ (mixed >> 27)) * SECOND) & WORD


def place(path: str, whole: Tensor | Shard) -> tuple[int, int, int]:
    """(start, columns, stride): element i of a contiguous tensor or part has the counter

        seed + start + (i // columns * stride + i % columns) * GAMMA

    Raises:
        ValueError: for a part of a tensor that is cut along its third or a later dimension.
    """
    shape, ranges = global_slice(whole)
    if any((first, last) != (0, size) for size, (first, last) in zip(shape[2:], ranges[2:], strict=True)):
        raise ValueError(f"place: expected {path} to be cut along its first two dimensions, found {ranges} of {list(shape)}")
    inner, (row, _), (column, end) = math.prod(shape[2:]), *[*ranges, (0, 1), (0, 1)][:2]
    stride = math.prod(shape[1:])
    return _signed(_start(path) + (row * stride + column * inner) * GAMMA), max(1, (end - column) * inner), stride


def _start(path: str) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big"))


def _counter(whole: Tensor | Shard, start: Tensor) -> Tensor:
    """start + GAMMA * (the number of each element in the whole tensor), modulo 2**64."""
    shape, ranges = global_slice(whole)
    total = start
    for dim, (first, last) in enumerate(ranges):
        step = math.prod(shape[dim + 1 :]) * GAMMA
        along = torch.arange(first, last, device=start.device) * _signed(step)
        total = total[..., None] + along
    return total


def _rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Adds the last 16 of the bits to those that bfloat16 does not have, and cuts these off."""
    return ((values.view(torch.int32) + (bits.to(torch.int32) & 0xFFFF)) & -0x10000).view(torch.float32).bfloat16()
