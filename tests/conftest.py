"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import end, pairs, start, write_texts  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that several workers end at about the same time."""
    longest = ["default_run", "gradients", "gang", "whole", "frozen", "keys", "regression", "progress", "signals", "benchmarks"]
    names = [f"test_{name}.py" for name in longest]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two JSONL files of short documents."""
    root = tmp_path_factory.mktemp("texts")
    write_texts(root)
    return root


@pytest.fixture(scope="session")
def uninterrupted(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    ended = end(start("train", "lm", "--out", str(out), "--config", *pairs(texts)))
    assert (ended.status, ended.errors) == (0, "")
    return out
