"""Fingerprints of a tree of tensors: sums of hashes of single elements, the same however the tensors are sharded.

The hash of an element is a 64-bit mix (as in MurmurHash3) of its bits, of its position in the unsharded tensor and of the
tensor's path. Integers add up to the same modulo 2 ** 64 in any order and grouping, so shards are summed where they are. A
changed bit changes the sum. It finds faults; whoever wants to deceive it can.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fnrecipe.parallel.mesh import global_slice
from fnrecipe.tree import Tree

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STRIDE, _FIRST, _SECOND = 0x9E3779B97F4A7C15 - (1 << 64), 0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64)


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
    for start in range(0, flat.numel(), size):
        bits = flat[start : start + size].to(torch.int64)
        local = torch.arange(start, start + len(bits), device=flat.device)
        total += _mixed(_positions(local, tensor.shape, shape, ranges).mul_(_STRIDE).add_(bits).add_(salt)).sum()
    return total


def _positions(local: Tensor, shape: torch.Size, whole: torch.Size, ranges: list[tuple[int, int]]) -> Tensor:
    """The positions in the `whole` tensor of the elements at the positions `local` in a slice of it, both flat; int64 [n]."""
    cut = [dim for dim, (start, stop) in enumerate(ranges) if stop - start < whole[dim]]
    if cut in ([], [0]):  # what is behind the first dimension is whole: the slice is contiguous
        return local + (ranges[0][0] * math.prod(whole[1:]) if cut else 0)
    found, rest, stride = torch.zeros_like(local), local, 1
    for dim in reversed(range(len(whole))):
        found += (rest % shape[dim] + ranges[dim][0]) * stride
        rest, stride = rest // shape[dim], stride * whole[dim]
    return found


def _mixed(words: Tensor) -> Tensor:
    """The words behind two rounds of shift, exclusive or and product, in place; int64 [n]."""
    for factor in (_FIRST, _SECOND):
        words.bitwise_xor_((words >> 33).bitwise_and_((1 << 31) - 1)).mul_(factor)
    return words.bitwise_xor_((words >> 33).bitwise_and_((1 << 31) - 1))
