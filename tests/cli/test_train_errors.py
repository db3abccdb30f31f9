"""Runs that end before their first step: the message says what to mend, and nothing is spoiled."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here

TINY = [
    "model.config={num_layers: 1, model_dim: 8, num_attn_heads: 1, num_key_value_heads: 1, ffn_inner_dim: 8}",
    "dataset={max_seq_len: 16, batch_size: 2, num_lanes: 2, prefetch: 0}",
    "gang={num_microbatches: 1, device: cpu}",
    "lr_scheduler.config.num_warmup_steps=0",
    "regime={num_steps: 1, num_sample_tokens: 0, num_validation_batches: 1}",
]
Train = Callable[..., Ended]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Trains the tiny model in the directory `out` with more pairs, in this process."""

    def train(out: Path, *pairs: str) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, "train", "lm", "--out", out, "--config", *TINY, *pairs)

    return train


def jsonl(path: Path) -> str:
    return f"dataset.sources=[{{path: {path}}}]"


def byte_pairs(path: Path, *special: str) -> int:
    """Writes a tokenizer.json that was trained on a few words; the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["def add(a, b): return a + b", "return sum(values)"] * 9, trainer)
    tokenizer.save(str(path))
    return int(tokenizer.get_vocab_size())


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("dataset.max_seq_len=512", "dataset.max_seq_len: expected at most model.config.max_seq_len = 256, found 512"),
        ("regime.num_steps=0", "regime.num_steps: expected an integer of at least 1 or null, found 0"),
        ("lr=1", "did you mean optimizer.config.lr?"),
        ("dataset.sources=[]", "dataset.sources: expected at least one source, found none"),
    ],
)
def test_a_wrong_config_writes_nothing(tmp_path: Path, pair: str, message: str) -> None:
    assert_usage_error(fnrecipe("train", "lm", "--out", "new/out", "--config", pair, cwd=tmp_path), message)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_config_leaves_a_directory_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    assert_usage_error(fnrecipe("train", "lm", "--out", tmp_path, "--config", "a=1", cwd=tmp_path))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "mine")]


@pytest.mark.parametrize("name", ["lmm", "none.py"])
def test_an_unknown_recipe_writes_nothing(tmp_path: Path, name: str) -> None:
    assert_usage_error(fnrecipe("train", name, "--out", "out", cwd=tmp_path), name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_is_told_and_kept(tmp_path: Path, train: Train, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    message = f"error: {tmp_path / out}: expected a directory to write to, found a file\n"
    assert train(tmp_path / out) == (2, "", message)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_told(train: Train) -> None:
    out = Path("/proc/no/such/place")
    assert_usage_error(train(out), f"error: {out}: cannot write to the output directory: ")


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_directory_that_another_run_holds_is_told_and_let_alone(tmp_path: Path, train: Train, kind: int) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, kind)
        lock.write("4321\n")
        lock.flush()
        assert_usage_error(train(tmp_path), f"error: {tmp_path}: another run (process 4321) is writing here")
    assert not (tmp_path / "config.yaml").exists()
    assert (tmp_path / ".lock").read_text() == "4321\n"


def test_a_lock_that_a_dead_run_left_behind_does_not_matter(tmp_path: Path, train: Train) -> None:
    (tmp_path / ".lock").write_text("4321\n")
    ended = train(tmp_path, jsonl(tmp_path / "none.jsonl"))
    assert "none.jsonl" in ended.err
    assert "4321" not in ended.err


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "none.jsonl", "none.jsonl: expected data, found no file, directory or match (.jsonl, "),
        ([], "none/*.jsonl", "none/*.jsonl: expected data, found no file, directory or match (.jsonl, "),
        (["data/a.csv"], "data", "data: expected data, found none in this directory (.jsonl, "),
        (["data/a.csv"], "data/a.csv", "data/a.csv: expected a file called .jsonl, "),
        (["data/a.txt", "data/b.py"], "data", "data: expected files of one format, found 1 text, 1 python; set `format`"),
        (["data/a.jsonl", "data/b.jsonl"], "data", "expected at least one document, found only empty files"),
        (["data/a.jsonl"], "data/a.jsonl", "data/a.jsonl: expected at least one document, found only empty files"),
    ],
)
def test_data_that_is_not_there_is_told(tmp_path: Path, train: Train, files: list[str], path: str, message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert_data_error(train(tmp_path / "out", jsonl(tmp_path / path)), message)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_data_of_blank_lines_only_is_told(tmp_path: Path, train: Train) -> None:
    (tmp_path / "a.jsonl").write_text("\n  \n\n")
    assert_data_error(
        train(tmp_path / "out", jsonl(tmp_path / "a.jsonl")), "expected at least one row, found none: each document is empty"
    )


def assert_data_error(ended: Ended, message: str) -> None:
    """As for wrong usage, but the run had begun to tell what it does."""
    assert ended.status == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.path: cannot read {path}: No such file or directory"),
        ("not JSON", "tokenizer.path: {path} is not a tokenizer.json: "),
        ("[1, 2]", "tokenizer.path: {path} is not a tokenizer.json: "),
        ('{"version": "1.0"}', "tokenizer.path: {path} is not a tokenizer.json: "),
    ],
)
def test_a_tokenizer_that_is_none_is_told(tmp_path: Path, train: Train, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    ended = train(tmp_path / "out", f"tokenizer={{family: hf, path: {path}}}")
    assert_data_error(ended, f"error: {message.format(path=path)}")


def test_a_tokenizer_with_more_tokens_than_the_model_is_told(tmp_path: Path, train: Train) -> None:
    path = tmp_path / "tokenizer.json"
    size = byte_pairs(path, "<|endoftext|>")
    ended = train(tmp_path / "out", f"tokenizer={{family: hf, path: {path}}}", f"model.config.vocab_size={size - 1}")
    assert_data_error(ended, f"error: model.config.vocab_size: expected at least the tokenizer's {size}, found {size - 1}")


def test_a_model_without_room_for_the_bytes_is_told(tmp_path: Path, train: Train) -> None:
    ended = train(tmp_path / "out", "model.config.vocab_size=256")
    assert_data_error(ended, "error: model.config.vocab_size: expected at least the tokenizer's 257, found 256")


@pytest.mark.parametrize(
    ("special", "name", "message"),
    [
        ("<pad>", "null", "tokenizer.eos_token: expected a common end-of-text token in {path}, found none"),
        ("</s>", "</t>", "tokenizer.eos_token: expected the token '</t>' in {path}, found none; did you mean </s>?"),
    ],
)
def test_a_tokenizer_without_an_end_of_text_is_told(
    tmp_path: Path, train: Train, special: str, name: str, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    byte_pairs(path, special)
    ended = train(tmp_path / "out", f"tokenizer={{family: hf, path: {path}, eos_token: {name}}}", "model.config.vocab_size=300")
    assert_data_error(ended, f"error: {message.format(path=path)}")


def test_a_directory_can_be_used_after_a_run_that_could_not_begin(tmp_path: Path, train: Train) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some words " * 40}) + "\n")
    assert train(tmp_path / "out", jsonl(tmp_path / "none.jsonl")).status == 2
    ended = train(tmp_path / "out", jsonl(tmp_path / "a.jsonl"), "dataset={valid_fraction: 0}", "trainer.jit=off")
    assert ended.status == 0, ended.err


def test_cuda_without_a_gpu_is_told(tmp_path: Path) -> None:
    args = ["train", "lm", "--out", "out", "--config", *TINY, "gang.device=cuda"]
    ended = fnrecipe(*args, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    message = "error: gang.device: expected a CUDA device for gang.device=cuda, found none; use auto or cpu\n"
    assert (ended.status, ended.err) == (2, message)
