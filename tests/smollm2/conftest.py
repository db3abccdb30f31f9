"""Tests with the weights of SmolLM2-135M, for whom `SMOLLM2` names a directory of them; without one they are not collected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if "SMOLLM2" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    path = Path(os.environ["SMOLLM2"])
    assert (path / "model.safetensors").is_file(), f"make it by python tests/smollm2/fetch.py {path}"
    return path
