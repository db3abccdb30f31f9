"""SmolLM2 on answers of real sets: fine-tuned on Alpaca's, and an adapter that learns what is preferred; measured on others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.helpers import rows, start

SMALL = [
    "dataset.batch_size=2",
    "dataset.num_lanes=2",
    "dataset.pack_window=64",
    "gang.num_microbatches=1",
    "lr_scheduler.config.num_warmup_steps=0.1",
    "regime.num_validation_batches=10",
    "regime.num_sample_tokens=0",
]


@pytest.fixture(scope="module")
def sets(smollm2: Path) -> Path:
    path = smollm2 / "sets"
    assert path.is_dir(), f"make it by python tests/smollm2/fetch.py {smollm2}"
    return path


def test_fine_tuning_lowers_the_loss_of_other_answers(smollm2: Path, sets: Path, tmp_path: Path) -> None:
    given = [f"dataset.sources={sets}/alpaca_en_demo.json", "dataset.max_seq_len=256", "dataset.valid_fraction=0.1"]

    before = validated("sft", smollm2, tmp_path / "before", *given, "optimizer.config.lr=0", "regime.num_steps=1")
    after = validated("sft", smollm2, tmp_path / "after", *given, "optimizer.config.lr=2e-5", "regime.num_steps=24")

    assert before["valid/targets"] == after["valid/targets"] > 1000
    assert after["valid/loss"] < before["valid/loss"] - 0.03


def test_an_adapter_prefers_what_was_chosen_in_other_pairs(smollm2: Path, sets: Path, tmp_path: Path) -> None:
    """The reference is the base: before training all margins are 0, and the loss is log 2."""
    given = [f"dataset.sources={sets}/dpo_en_demo.json", "dataset.max_seq_len=768", "dataset.valid_fraction=0.25"]
    adapter = ["model.adapter.name=lora", "model.dtype=bfloat16", "trainer.dtype=bfloat16"]
    rate = ["optimizer.config.lr=3e-4", "regime.num_steps=20"]

    after = validated("preference", smollm2, tmp_path / "run", *given, *adapter, *rate)

    assert after["valid/targets"] > 20
    assert after["valid/loss"] < math.log(2) - 0.005
    assert after["valid/rewards/margins"] > 0.03
    assert after["valid/rewards/accuracies"] > 0.5


def validated(recipe: str, smollm2: Path, out: Path, *pairs: str) -> dict[str, float]:
    """What the run records of its last validation."""
    process = start("train", recipe, "--out", str(out), "--config", f"model.path={smollm2}", *SMALL, *pairs)
    _, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, errors
    found: dict[str, float] = rows(out / "metrics/valid.jsonl")[-1]
    return found
