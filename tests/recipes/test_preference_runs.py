"""Whole runs of preference optimization: ranks that are stopped, and go on as one, leave the bytes of one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import fnrecipe
from fnrecipe.config import resolve
from fnrecipe.errors import EXIT_AGAIN
from fnrecipe.recipes.preference.config import config
from fnrecipe.recipes.preference.train import recipe
from tests.helpers import end, last_step, pairs, remains, rows, signal_at, start
from tests.recipes.test_preference import preferences, write


def given(root: Path, criterion: str) -> list[str]:
    source = write(root / "pairs.jsonl", preferences(80))
    changes = {
        "criterion__name": criterion,
        "dataset__max_seq_len": 128,
        "model__config": "{vocab_size: 264, max_seq_len: 128, model_dim: 32, num_layers: 1, num_attn_heads: 2, "
        "num_key_value_heads: 2, ffn_inner_dim: 64, tied_embeddings: true}",
        "optimizer__config__lr": 1e-3,
        "regime__num_steps": 40,
    }
    return pairs(source, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "sharding", "jit"), [("dpo", "fsdp", "trace"), ("kto", "zero2", "off")])
def test_two_ranks_that_are_stopped_and_go_on_as_one_leave_the_same_bytes(
    tmp_path: Path, criterion: str, sharding: str, jit: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    whole = [*given(tmp_path, criterion), f"trainer.jit={jit}"]
    assert fnrecipe.train(recipe, resolve(config, pairs=whole)[0], straight) == 0
    cut = [*whole, f"gang.sharding={sharding}"]
    ranks = start("train", "preference", "--out", str(stopped), "--nproc", "2", "--config", *cut)
    assert signal_at(ranks, stopped, 5, signal.SIGTERM).status == EXIT_AGAIN
    assert 5 <= last_step(stopped) < 40
    assert end(start("train", "preference", "--out", str(stopped), "--config", *cut)).status == 0
    ours, theirs = remains(stopped), remains(straight)
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"config.yaml"}
    assert ours.keys() == theirs.keys()
    training = rows(straight / "metrics/train.jsonl")
    assert len(training) == 40
    assert training[0]["train/rewards/chosen"] == 0
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 0.05
