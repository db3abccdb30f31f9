"""Orders and splits of documents as pure functions of their number or content: the same on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def permutation(size: int, *key: int) -> list[int]:
    """A permutation of `range(size)` that depends on the integers of `key` alone.

    A stable sort of raw Philox words: NumPy promises neither its `permutation` nor the order that an unstable sort
    gives equal keys across versions and processors.
    """
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    random = np.random.Philox(key=words).random_raw(size)
    order: list[int] = np.argsort(random, kind="stable").tolist()
    return order


def shuffled(items: Sequence[T], *key: int) -> list[T]:
    return [items[i] for i in permutation(len(items), *key)]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by its content, so that copies fall on the same side."""
    return zlib.crc32(text.encode()) < fraction * 2**32
