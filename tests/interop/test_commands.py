"""`fnrecipe model list|show|import` and `fnrecipe export`: what they print, and how they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fnrecipe.config.sections.model import named
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here

Run = Callable[..., Ended]


@pytest.fixture
def fnrecipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, *args)

    return run


def test_list_has_every_architecture_with_its_parameters(fnrecipe: Run) -> None:
    ended = fnrecipe("model", "list")
    assert ended.status == 0
    assert all(arch in ended.out for arch in named())
    (line,) = [line for line in ended.out.splitlines() if "smollm2_135m" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "llama",
        "llama",
        "smollm2_135m",
        "134,515,008",
        "30",
        "576",
        "8,192",
    ]


def test_show_tells_what_a_directory_holds(fnrecipe: Run, saved: Path) -> None:
    ended = fnrecipe("model", "show", saved / "tied")
    assert ended.status == 0
    lines = ended.out.splitlines()
    size = (saved / "tied/model.safetensors").stat().st_size
    assert lines[:5] == [
        f"family:     llama ({saved}/tied/config.json)",
        "parameters: 24,736",
        "dtype:      float32",
        f"files:      model.safetensors; {size / 1000:.1f} kB",
        "tokenizer:  280 tokens, BOS <|begin|> (1), EOS <|end|> (0)",
    ]
    assert "  vocab_size: 288" in lines


def test_show_names_every_problem(fnrecipe: Run, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "tied", tmp_path / "bad")
    values = json.loads((tmp_path / "bad/config.json").read_text())
    (tmp_path / "bad/config.json").write_text(json.dumps({**values, "vocab_size": 100, "num_hidden_layers": 3}))
    ended = fnrecipe("model", "show", "bad")
    assert ended.status == 2
    assert "parameters: " in ended.out
    assert [line.split(": ")[1] for line in ended.err.splitlines()] == [
        "bad",
        "bad/model.safetensors",
        "bad/tokenizer.json",
    ]
    assert ended.err.endswith("expected at most model.config.vocab_size = 100 tokens, found 280\n")


def test_a_model_is_brought_and_taken_away(fnrecipe: Run, saved: Path, texts: Path, tmp_path: Path) -> None:
    brought = fnrecipe(
        "model", "import", saved / "bfloat16", "--out", "run", "--config", "dataset.max_seq_len=32", f"dataset.sources={texts}"
    )
    assert (brought.status, brought.err) == (0, "")
    assert brought.out == f"run/checkpoints/step_00000000: llama, bfloat16, from {saved / 'bfloat16'}\n"
    shown = fnrecipe("model", "show", "run")
    assert shown.status == 0
    assert "dtype:      bfloat16\nfiles:      step_00000000/state_0000.safetensors; " in shown.out
    taken = fnrecipe("export", "run", "--out", "there", "--shard-size", "20KB")
    assert (taken.status, taken.err) == (0, "")
    assert taken.out == "there: 24,736 parameters, bfloat16, 3 files of weights, 49.5 kB; 257 tokens\n"
    assert fnrecipe("model", "show", "there").status == 0


def test_what_cannot_be_used_is_told(fnrecipe: Run, saved: Path) -> None:
    assert_usage_error(fnrecipe("model", "show", "nowhere"), "nowhere: expected a directory of Hugging Face or of a run")
    assert_usage_error(fnrecipe("model", "import", "nowhere", "--out", "run"), "nowhere: no such directory")
    assert_usage_error(fnrecipe("export", "nowhere", "--out", "there"), "nowhere: expected the output directory of a run")
    for size in ("5", "5GB", "1.5MiB"):
        assert_usage_error(
            fnrecipe("export", "nowhere", "--out", "there", "--shard-size", size), "expected the output directory"
        )
    for size in ("0", "5 apples", "-1GB"):
        assert_usage_error(
            fnrecipe("export", "nowhere", "--out", "there", "--shard-size", size), "--shard-size: expected a size"
        )
