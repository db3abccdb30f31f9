"""Tests for a CUDA device; without one they are not collected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fnrecipe.runtime.host import use_deterministic_kernels

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_deterministic_kernels()
    yield
    torch.use_deterministic_algorithms(False)
