"""Fingerprints of a tree of tensors: sums of hashes of single elements, the same however the tensors are sharded.

The hash of an element is a 64-bit mix of its bits, of its position in the unsharded tensor and of the tensor's path. Integers
add up to the same modulo 2 ** 64 in any order and grouping, so shards are summed where they are. One changed element always
changes the sum. It finds faults; whoever wants to deceive it can.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fnrecipe.parallel.mesh import global_slice
from fnrecipe.tree import Tree

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STRIDE, _FACTOR, _LOW = 0x9E3779B97F4A7C15 - (1 << 64), 0xFF51AFD7ED558CCD - (1 << 64), (1 << 32) - 1


def fingerprint(path: str, leaf: Tree) -> Tensor:
    """The sum of the hashes of the elements that this rank holds of the tensor at `path`, int64 []."""
    tensor = leaf
    while not isinstance(tensor, Tensor):
        tensor = tensor.local
    shape, ranges = global_slice(leaf)
    flat = tensor.detach().contiguous().reshape(-1)
    flat = flat.to(torch.int8) if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.itemsize])
    salt = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "big")
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    size = _CHUNK.get(flat.device.type, _CHUNK["cpu"])
    places = _places(min(size, flat.numel()), tensor.shape, shape, ranges, flat.device)
    for start in range(0, flat.numel(), size):
        bits = flat[start : start + size]
        total += _mixed(places(start, len(bits)).add_(bits).add_(salt)).sum()
    return total


def _places(
    size: int, shape: torch.Size, whole: torch.Size, ranges: Sequence[tuple[int, int]], device: torch.device
) -> Callable[[int, int], Tensor]:
    """(start, n) -> the positions in the `whole` tensor of n <= `size` elements of a slice, times `_STRIDE`; int64 [n]."""
    numbers = torch.arange(size, device=device)
    cut = [dim for dim, (start, stop) in enumerate(ranges) if stop - start < whole[dim]]
    if cut in ([], [0]):  # what is behind the first dimension is whole: the slice is contiguous
        first, table = ranges[0][0] * math.prod(whole[1:]) if cut else 0, numbers * _STRIDE
        return lambda start, n: table[:n] + _wrapped((first + start) * _STRIDE)

    def places(start: int, n: int) -> Tensor:
        found, rest, stride = torch.zeros_like(numbers[:n]), numbers[:n] + start, 1
        for dim in reversed(range(len(whole))):
            found += (rest % shape[dim] + ranges[dim][0]) * stride
            rest, stride = rest // shape[dim], stride * whole[dim]
        return found * _STRIDE

    return places


def _wrapped(number: int) -> int:
    """The number modulo 2 ** 64, as int64 has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mixed(words: Tensor) -> Tensor:
    """A bijection of words, in place, whose results do not add up to what the words do; int64 [n]."""
    words.bitwise_xor_((words >> 32).bitwise_and_(_LOW)).mul_(_FACTOR)
    return words.bitwise_xor_((words >> 32).bitwise_and_(_LOW))
