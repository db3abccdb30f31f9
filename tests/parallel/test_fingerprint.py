"""Fingerprints: the same however a tensor is cut, and another for every changed bit, place and path."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fnrecipe.parallel import fingerprint as module
from fnrecipe.parallel.fingerprint import fingerprint
from fnrecipe.parallel.mesh import Axis, Shard
from tests.helpers import draw

WORD = (1 << 64) - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.bool]


def of_elements(path: str, tensor: Tensor) -> int:
    """The sum by its formula, in Python's integers."""
    salt, total = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "big"), 0
    kind = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[tensor.itemsize]
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(kind).tolist()
    for position, word in enumerate(bits):
        x = (position * 0x9E3779B97F4A7C15 + word + salt) & WORD
        x = (x ^ (x >> 32)) * 0xFF51AFD7ED558CCD & WORD
        total += x ^ (x >> 32)
    total &= WORD
    return total - (1 << 64) if total >> 63 else total


def cut(tensor: Tensor, dim: int, size: int, name: str = "shard") -> list[Shard]:
    return [Shard(part.contiguous(), dim, Axis(name, size, index)) for index, part in enumerate(tensor.chunk(size, dim))]


def wrapped(numbers: list[int]) -> int:
    total = sum(numbers) & WORD
    return total - (1 << 64) if total >> 63 else total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [3, 1 << 16])
def test_it_is_the_sum_of_its_formula(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", chunk)
    tensor = (draw(torch.empty(4, 6), 0) * 100).to(dtype)
    assert fingerprint("params.w", tensor).item() == of_elements("params.w", tensor)
    assert fingerprint("n", tensor[1, 2]).item() == of_elements("n", tensor[1, 2])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_parts_add_up_to_the_whole_however_it_is_cut(data: Any) -> None:
    shape = data.draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=3))
    tensor = draw(torch.empty(shape), 1)
    dim = data.draw(st.integers(0, len(shape) - 1))
    other = data.draw(st.integers(0, len(shape) - 1))
    found = []
    for outer in cut(tensor, dim, 2, "tensor"):
        for inner in cut(outer.local, other, 2) if outer.local.shape[other] % 2 == 0 else [outer.local]:
            found.append(fingerprint("w", Shard(inner, dim, outer.axis)).item())
    assert wrapped(found) == fingerprint("w", tensor).item()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 63), st.integers(0, 31))
def test_every_flipped_bit_is_another(index: int, bit: int) -> None:
    tensor = draw(torch.empty(8, 8), 2)
    flipped = tensor.clone()
    flipped.view(torch.int32).view(-1)[index] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert fingerprint("w", flipped) != fingerprint("w", tensor)


def test_places_and_paths_count() -> None:
    tensor = torch.tensor([1.0, 2.0, 2.0])
    assert fingerprint("w", tensor.flip(0)) != fingerprint("w", tensor)
    assert fingerprint("v", tensor) != fingerprint("w", tensor)
    assert fingerprint("w", torch.zeros(3)) != fingerprint("w", torch.zeros(4))
