"""Whole runs of supervised fine-tuning: two ranks that are stopped, and go on as one, leave the bytes of one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import fnrecipe
from fnrecipe.config import resolve
from fnrecipe.errors import EXIT_AGAIN
from fnrecipe.recipes.sft.config import config
from fnrecipe.recipes.sft.train import recipe
from tests.data.test_chat_template import CHATML
from tests.helpers import end, last_step, pairs, remains, rows, signal_at, start
from tests.recipes.test_sft import chats, write


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Two sources, chats and pairs, of which the weights and the trained parts differ."""
    records = [{"messages": chat} for chat in chats(60)]
    short = [{"instruction": f"{number}", "output": "yes " * (number % 7)} for number in range(60)]
    sources = [write(tmp_path / "chats.jsonl", records), write(tmp_path / "short.jsonl", short)]
    (tmp_path / "chatml.jinja").write_text(CHATML)
    changes = {
        "dataset__sources": f"[{{path: {sources[0]}, weight: 0.7}}, {{path: {sources[1]}, weight: 0.3}}]",
        "dataset__chat_template": tmp_path / "chatml.jinja",
        "dataset__max_seq_len": 192,
        "model__config": "{vocab_size: 264, max_seq_len: 192, model_dim: 32, num_layers: 1, num_attn_heads: 2, "
        "num_key_value_heads: 2, ffn_inner_dim: 64, tied_embeddings: true}",
        "regime__num_steps": 40,
        "model__dropout_p": 0.1,
        "trainer__neftune_noise_alpha": 5,
        "loss__label_smoothing": 0.05,
        "loss__z_loss": 1e-4,
        "loss__length_normalization": "true",
        "trainer__jit": "off",
    }
    return pairs(sources[0], **changes)


@pytest.mark.slow
def test_two_ranks_that_are_stopped_and_go_on_as_one_leave_the_same_bytes(tmp_path: Path, given: list[str]) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    found, _ = resolve(config, pairs=given)
    assert fnrecipe.train(recipe, found, straight) == 0
    ranks = start("train", "sft", "--out", str(stopped), "--nproc", "2", "--config", *given, "gang.sharding=fsdp")
    assert signal_at(ranks, stopped, 5, signal.SIGTERM).status == EXIT_AGAIN
    assert 5 <= last_step(stopped) < 40
    goes_on = [*given, "gang.sharding=fsdp"]
    assert end(start("train", "sft", "--out", str(stopped), "--config", *goes_on)).status == 0
    ours, theirs = remains(stopped), remains(straight)
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"config.yaml"}
    assert ours.keys() == theirs.keys()
    training = rows(straight / "metrics/train.jsonl")
    assert len(training) == 40
    for row in training:
        total = sum(row[f"train/loss/{name}"] * row[f"train/targets/{name}"] for name in ("chats", "short"))
        assert row["train/loss"] * row["train/targets"] == pytest.approx(total, rel=1e-5)
        assert 0 < row["train/targets"] < row["train/tokens"] < 8 * 192
        assert min(row["train/z_loss"], row["train/label_smoothing"]) > 0
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 1
