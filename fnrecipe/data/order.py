"""Permutations as pure functions of a size and a key: the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(size)`, int64 [size], that depends on the integers of `key` alone."""
    # A stable sort of raw Philox words, whose bits NumPy guarantees. It guarantees neither `Generator.permutation` across
    # versions, nor the order of equal keys under an unstable sort across processors.
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    random = np.random.Philox(key=words).random_raw(size)
    return np.argsort(random, kind="stable")


def shuffled(items: Sequence[T], *key: int) -> list[T]:
    return [items[i] for i in permutation(len(items), *key).tolist()]
