"""`fnrecipe tokenizer train`: a byte-level BPE of the size asked for that a run can use."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import huggingface_tokenizer
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here, python

END = "<|endoftext|>"
ODD = ["", " a  b\n\n\tc ", "äöü€ 漢字 😀", f"{END} is text here", "\x00\x7f\u2028", "1234567890" * 9, "don't WON'T"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of words from a vocabulary that is rich enough for a thousand merges."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzä", k=draw.randint(2, 9))) for _ in range(400)]
    lines = [json.dumps({"body": " ".join(draw.choices(words, k=60))}) + "\n" for _ in range(200)]
    (root / "words.jsonl").write_text("".join(lines))
    (root / "words.txt").write_text("===".join(json.loads(line)["body"] for line in lines), encoding="utf-8")
    return root


def test_what_a_directory_holds_beside_its_data_is_told_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/words.JSONL").write_bytes((folder / "words.jsonl").read_bytes())
    (tmp_path / "data/README.md").touch()
    args = ["~/data", "--text-key", "body", "--vocab-size", "300", "--out=~/made/tokenizer.json"]
    ended = fnrecipe("tokenizer", "train", *args, cwd=folder, HOME=str(tmp_path))
    assert (ended.status, ended.err) == (0, f"{tmp_path}/data: left out: 1 .md\n")
    assert (tmp_path / "made/tokenizer.json").is_file()


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, Ended]:
    """A tokenizer of 700 tokens, and how the command that made it ended."""
    out = folder / "made/for/this/tokenizer.json"
    args = [str(folder / "words.jsonl"), "--text-key", "body", "--vocab-size", "700", "--out", str(out)]
    return out, fnrecipe("tokenizer", "train", *args, cwd=folder)


def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path) -> Ended:
    return fnrecipe_here(monkeypatch, capsys, "tokenizer", "train", *args)


def test_it_has_the_tokens_asked_for_and_an_end_of_text(trained: tuple[Path, Ended]) -> None:
    path, ended = trained
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"{path}: 700 tokens; use it by --config ")
    vocab = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    assert sorted(vocab.values()) == list(range(700))
    assert END in vocab
    found = huggingface_tokenizer(str(path))
    assert found.vocab_size == 700
    assert found.eos == found.bos == vocab[END]
    assert len(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) & vocab.keys()) == 256


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(trained: tuple[Path, Ended], text: str) -> None:
    tokenizer = huggingface_tokenizer(str(trained[0]))
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eos not in ids
    assert tokenizer.num_bytes[ids].sum() == len(text.encode())


@given(st.text())
def test_any_text_comes_back(trained: tuple[Path, Ended], text: str) -> None:
    tokenizer = huggingface_tokenizer(str(trained[0]))
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text


def test_it_is_good_at_what_it_was_trained_on(folder: Path, trained: tuple[Path, Ended]) -> None:
    tokenizer = huggingface_tokenizer(str(trained[0]))
    text = (folder / "words.txt").read_text(encoding="utf-8").replace("===", " ")
    assert len(tokenizer.encode([text])[0]) < len(text.encode()) / 2


def test_the_pairs_that_it_tells_are_all_that_a_run_needs(folder: Path, trained: tuple[Path, Ended]) -> None:
    pairs = shlex.split(trained[1].out.split("use it by --config ")[1])
    assert pairs[:2] == ["tokenizer.family=hf", f"tokenizer.path={trained[0]}"]
    source = "dataset.sources=[{path: words.jsonl, text_key: body}]"
    ended = fnrecipe("data", "stats", "lm", "--batches", "2", "--config", source, *pairs, cwd=folder)
    assert (ended.status, ended.err) == (0, "")
    (line,) = [line for line in ended.out.splitlines() if "words" in line]
    tokenizer = huggingface_tokenizer(str(trained[0]))
    texts = [json.loads(line)["body"] for line in (folder / "words.jsonl").read_text().splitlines()]
    assert f"{sum(map(len, tokenizer.encode(texts))):,}" in line


def test_a_tokenizer_is_used_by_a_run_with_room_for_it(folder: Path, trained: tuple[Path, Ended]) -> None:
    pairs = ["tokenizer.family=hf", f"tokenizer.path={trained[0]}", "model.config.vocab_size=700"]
    source = "dataset.sources=[{path: words.jsonl, text_key: body}]"
    ended = fnrecipe("data", "show", "lm", "--rows", "1", "--config", source, *pairs, cwd=folder)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[3] in (folder / "words.txt").read_text(encoding="utf-8")


def test_special_tokens_take_the_place_of_the_end_of_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    special = ["--special-token", "<stop>", "--special-token", "<pad>"]
    args = [folder / "words.txt", "--separator", "===", "--vocab-size", "300", *special, "--out", out]
    ended = train(monkeypatch, capsys, *args)
    assert ended.status == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(out))
    vocab = tokenizer.get_vocab()
    assert len(vocab) == 300
    assert END not in vocab
    assert {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special} == {"<stop>", "<pad>"}
    assert huggingface_tokenizer(str(out), "<stop>").eos == vocab["<stop>"]
    assert "tokenizer.eos_token=<stop>" in shlex.split(ended.out), "without it the tokenizer is refused"


def test_the_same_text_by_any_way_makes_the_same_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (folder / "words.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some").mkdir()
    for number in range(2):
        (tmp_path / f"some/{number}.lines").write_text("".join(words[number * 100 : number * 100 + 100]))
    ways = {
        "one": [folder / "words.jsonl"],
        "two": [tmp_path / "some/0.lines", tmp_path / "some/1.lines", "--format", "jsonl"],
        "glob": [f"{tmp_path}/some/*.lines", "--format", "jsonl"],
    }
    found = []
    for name, way in ways.items():
        out = tmp_path / f"{name}.json"
        ended = train(monkeypatch, capsys, *way, "--text-key", "body", "--vocab-size", "400", "--out", out)
        assert ended.status == 0, ended
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_text_that_does_not_allow_so_many_gives_fewer_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    ended = train(monkeypatch, capsys, tmp_path / "a.txt", "--out", tmp_path / "t.json")
    size = huggingface_tokenizer(str(tmp_path / "t.json")).vocab_size
    assert 257 < size < 262
    assert re.match(rf".*t.json: {size} tokens; ", ended.out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.txt", "--vocab-size", "256"], "Invalid value for '--vocab-size': 256 is not in the range x>=257"),
        (
            ["a.txt", "--vocab-size", "257", "--special-token", "<a>", "--special-token", "<b>"],
            "error: --vocab-size: expected at least 258 for 256 bytes and special tokens, found 257",
        ),
        (["none.txt"], "error: none.txt: expected data, found no file, directory or match"),
        (["empty.txt"], "error: empty.txt: expected at least one document, found only empty files"),
        (["a.csv"], "error: a.csv: expected a file called "),
        (["a.txt", "--format", "csv"], "Invalid value for '--format'"),
        (["a.txt", "--out", "a.txt/t.json"], "error: a.txt/t.json: cannot write the tokenizer: "),
        (["a.txt", "--out", "folder"], "error: folder: cannot write the tokenizer: Is a directory"),
        (["a.txt", "--out", "/proc/none/t.json"], "error: /proc/none/t.json: cannot write the tokenizer: "),
        ([], "Missing argument 'PATH...'"),
        (["blank.txt"], "error: blank.txt: expected text to train on, found none"),
        (["a.txt", "a.npy"], "error: a.npy: expected text, found token ids"),
    ],
)
def test_wrong_usage_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.csv").write_text("some,text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n ")
    np.save("a.npy", np.array([3, 256], np.uint16))
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_usage_error(train(monkeypatch, capsys, "--out", "t.json", *args), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_record_ends_it_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    ended = train(monkeypatch, capsys, tmp_path / "a.jsonl", "--out", tmp_path / "t.json")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(
        f"error: {tmp_path}/a.jsonl:2 (byte 14): expected the field 'text', found none; did you mean txt?"
    )
    assert not (tmp_path / "t.json").exists()


WATCHED = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from fnrecipe.cli.main import main
main()
"""


def test_training_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    args = ["tokenizer", "train", folder / "words.txt", "--vocab-size", "300", "--out", tmp_path / "t.json"]
    ended = python("-c", WATCHED, *args, cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "False\n")
