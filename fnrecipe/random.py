"""Randomness without state: keys, as in JAX, on the counter-based generator Threefry-2x32 with 20 rounds.

(Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".) A key is two 32-bit words in an int64
tensor [2]; the same key always gives the same numbers, and new keys are derived by `fold_in`. Nothing in fnrecipe draws from
a global generator. All is plain integer arithmetic: it can be traced and vmapped, and is the same on every device. (torch
2.13 has a generator of this kind in `torch.func._random`, for CUDA alone.)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# 32-bit words in int64 tensors: torch's int32 shifts right arithmetically, and its uint32 lacks most operations.
_WORD = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_BLOCK = 2**17
"""Counters whose words a CPU computes together: tensors of 1 MiB stay in its caches, which saves three fifths of the time."""


def key(seed: int, device: torch.device | None = None) -> Tensor:
    """The key of a seed; int64 [2]."""
    return torch.tensor([(seed >> 32) & _WORD, seed & _WORD], device=device)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A key that depends on `key` and `data` alone: a number, the path of a parameter, or a traced step (int64 []).

    Of numbers int64 [N] it is a key each, int64 [N, 2].
    """
    if key.is_meta:
        return _nothing(key, *(data.shape if isinstance(data, Tensor) else ()), 2, dtype=torch.int64)
    if isinstance(data, str):
        data = int.from_bytes(hashlib.blake2b(data.encode(), digest_size=7).digest(), "big")
    number = data.to(key.device) if isinstance(data, Tensor) else key.new_full((), data)  # no copy from the host
    return torch.stack(threefry(key, (number >> 32) & _WORD, number & _WORD), -1)


def uniform(key: Tensor, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, float32 [*shape], on the key's device."""
    if key.is_meta:
        return _nothing(key, *shape)
    words = torch.cat(_words(key, math.prod(shape)))[: math.prod(shape)]
    return ((words >> 8).float() * 2.0**-24).view(shape)


def halfwords(key: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Random 16-bit numbers, int64 [*numbers.shape, width]: the same of each number, whichever others are beside it.

    They take half the rounds of as many `uniform` numbers, and on a CPU two fifths of the time.
    """
    groups = -(-width // 4)
    if key.is_meta:
        return _nothing(key, *numbers.shape, width, dtype=torch.int64)
    counter = numbers[..., None] * groups + torch.arange(groups, device=key.device)
    words = threefry(key, counter >> 32, counter & _WORD)
    return torch.cat([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)[..., :width]


def normal(key: Tensor, *shape: int, std: float = 1.0) -> Tensor:
    """Normal numbers of mean 0, by the Box-Muller transform, float32 [*shape], on the key's device."""
    if key.is_meta:
        return _nothing(key, *shape)
    first, second = _words(key, math.prod(shape))
    radius = std * torch.sqrt(-2 * torch.log(((first >> 8) + 1).float() * 2.0**-24))
    angle = (second >> 8).float() * (2 * math.pi * 2.0**-24)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[: math.prod(shape)].view(shape)


def threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 of the counter words `first` and `second` (int64 of any shape) under `key`: two words of that shape."""
    if key.is_meta:
        return _nothing(key, *first.shape, dtype=torch.int64), _nothing(key, *first.shape, dtype=torch.int64)
    # Each operation costs a trace half a millisecond. `first`, a sum of less than 32 words, need not be masked before the end;
    # a rotation adds its halves, which have no bit in common: (second >> 32 - rotation) + second * 2**rotation.
    schedule = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    first, second = first + schedule[0], (second + schedule[1]) & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            first = first + second
            second = (torch.add(second >> (32 - rotation), second, alpha=1 << rotation) ^ first) & _WORD
        first = first + schedule[(group + 1) % 3]
        second = (second + (schedule[(group + 2) % 3] + group + 1)) & _WORD
    return first & _WORD, second


def _nothing(key: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What has a shape alone, on the device meta."""
    # Who asks for shapes, to read weights, need not wait seconds for rounds that nobody computes; torch's own functions of
    # shapes would import Dynamo, which takes another.
    return torch.empty(shape, dtype=dtype, device=key.device)


def _words(key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """At least `size` random words, in two halves of equal size."""
    counter = torch.arange((size + 1) // 2, device=key.device)
    blocks = torch.split(counter, _BLOCK) if key.device.type == "cpu" else (counter,)
    first, second = zip(*(threefry(key, block >> 32, block & _WORD) for block in blocks), strict=True)
    return torch.cat(first), torch.cat(second)
