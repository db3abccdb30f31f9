"""The main job as a stranger runs it: no option but a place to write to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from fnrecipe.data import held_out, python_stdlib, read_files
from fnrecipe.recipes.lm.config import config


@pytest.mark.slow
def test_the_default_run_learns_python(tmp_path: Path) -> None:
    out = tmp_path / "first"
    subprocess.run([sys.executable, "-m", "fnrecipe.cli", "train", "lm", "--out", out], check=True)

    steps = [json.loads(line)["step"] for line in (out / "metrics/train.jsonl").open()]
    assert steps == list(range(1, 601))
    model = json.loads((out / "metrics/valid.jsonl").read_text().splitlines()[-1])["bits_per_byte"]
    bigram = bigram_bits_per_byte()
    print(f"validation bits per byte: model {model:.3f}, bigram {bigram:.3f}")
    assert model < 0.75 * bigram
    sample = (out / "sample.txt").read_text()
    assert sample.startswith("def ")
    assert sum(word in sample for word in ("(", "):", "self", "return", "=", "    ")) >= 4


def bigram_bits_per_byte() -> float:
    """Bits per byte of the validation documents under byte bigrams of the training documents, add-one smoothed."""
    fraction = config.dataset.valid_fraction
    texts = [text for text, _ in read_files(paths=python_stdlib()) if text]
    train = pair_counts(text for text in texts if not held_out(text, fraction))
    valid = pair_counts(text for text in texts if held_out(text, fraction))
    probabilities = (train + 1) / (train + 1).sum(axis=1, keepdims=True)
    return float(-(valid * np.log2(probabilities)).sum() / valid.sum())


def pair_counts(texts: Iterable[str]) -> np.ndarray:
    counts = np.zeros((256, 256))
    for text in texts:
        data = np.frombuffer(text.encode(), np.uint8)
        np.add.at(counts, (data[:-1], data[1:]), 1)
    return counts
