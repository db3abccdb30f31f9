"""Runs whose step is compiled, and what their user is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import end, pairs, rows, start

SMALL = {
    "model__config": "{vocab_size: 264, max_seq_len: 32, model_dim: 32, num_layers: 1, num_attn_heads: 2, "
    "num_key_value_heads: 1, ffn_inner_dim: 64, tied_embeddings: true}",
    "gang__num_microbatches": 1,
    "regime__num_steps": 6,
    "regime__num_sample_tokens": 0,
}


def train(texts: Path, out: Path, level: str, **changes: object) -> str:
    ended = end(start("train", "lm", "--out", str(out), "--config", *pairs(texts, trainer__jit=level, **{**SMALL, **changes})))
    assert (ended.status, ended.errors) == (0, "")
    return ended.output


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_traced_one_and_finds_its_kernels_again(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # which runs in this process have set
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    schedule = {"lr_scheduler__config__cycle_len": 6, "model__config__num_layers": 1}
    train(texts, tmp_path / "traced", "trace", **schedule)
    first = train(texts, tmp_path / "compiled", "inductor", regime__num_steps=4, **schedule)
    second = train(texts, tmp_path / "compiled", "inductor", **schedule)

    expected, found = (rows(tmp_path / name / "metrics/train.jsonl") for name in ("traced", "compiled"))
    assert found == [pytest.approx(row, rel=1e-3) for row in expected]
    assert "compiling" in first
    assert "from the cache" not in first
    assert "from the cache" in second
    assert (tmp_path / "cache" / "fnrecipe" / "inductor").is_dir()
