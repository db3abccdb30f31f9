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

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 63) - 1
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
    start = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")
    mixed = _counter(whole, seed + _signed(start)) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * _signed(_FIRST)) & _WORD
    return ((mixed ^ (mixed >> 27)) * _signed(_SECOND)) & _WORD


def _counter(whole: Tensor | Shard, start: Tensor) -> Tensor:
    """start + _GAMMA * (the number of each element in the whole tensor), modulo 2**64."""
    shape, ranges = global_slice(whole)
    total = start
    for dim, (first, last) in enumerate(ranges):
        step = math.prod(shape[dim + 1 :]) * _GAMMA
        along = torch.arange(first, last, device=start.device) * _signed(step)
        total = total[..., None] + along
    return total


def _rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Adds the last 16 of the bits to those that bfloat16 does not have, and cuts these off."""
    return ((values.view(torch.int32) + (bits.to(torch.int32) & 0xFFFF)) & -0x10000).view(torch.float32).bfloat16()


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
