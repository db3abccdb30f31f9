"""How batches come to the device."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrecipe import tree
from fnrecipe.build import batches, to_device
from fnrecipe.config import resolve
from fnrecipe.data import Place
from fnrecipe.recipes.lm.train import recipe
from tests.helpers import pairs

CPU = torch.device("cpu")


@pytest.fixture
def pinned_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which tensors were pinned, which torch refuses without a GPU."""
    threads: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return threads


def first_batches(texts: Path, device: str, number: int = 3) -> list[Any]:
    config, _ = resolve(recipe.config, (), pairs(texts, dataset__prefetch=2))
    with closing(batches(recipe, config, Place(), torch.device(device))(None)) as stream:  # type: ignore[type-var]
        return [next(stream)[0] for _ in range(number)]


def test_batches_for_cuda_are_pinned_where_they_are_read_ahead(texts: Path, pinned_in: list[str]) -> None:
    found = first_batches(texts, "cuda")
    assert set(pinned_in) == {"prefetch"}
    assert len(pinned_in) >= len(tree.leaves(found))
    for batch, other in zip(found, first_batches(texts, "cpu"), strict=True):
        assert all(map(torch.equal, tree.leaves(batch), tree.leaves(other)))


def test_on_the_cpu_nothing_is_pinned_and_nothing_copied(texts: Path, pinned_in: list[str]) -> None:
    for batch in first_batches(texts, "cpu"):
        assert [leaf.data_ptr() for leaf in tree.leaves(to_device(batch, CPU))] == [
            leaf.data_ptr() for leaf in tree.leaves(batch)
        ]
    assert pinned_in == []
