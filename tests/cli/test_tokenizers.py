"""What `fnrecipe data` and `fnrecipe train` say of a tokenizer: its ends, what it loses, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here
from tests.data.kinds import EOS, byte_level, dropping, save, word_level

Data = Callable[[str], Ended]
SMALL = "dataset={max_seq_len: 32, batch_size: 2, num_lanes: 2, valid_fraction: 0.0}"
TEXTS = ["ab ab", "a1b2", f"größe {EOS}", "the ab"] * 8


def pairs(folder: Path) -> list[str]:
    """The config of a source and a tokenizer in `folder`."""
    source = f"dataset.sources=[{{path: {folder}/a.jsonl}}]"
    size = "model.config={vocab_size: 320, max_seq_len: 32, model_dim: 32, num_layers: 1}"
    return [SMALL, source, size, "gang={num_microbatches: 2, device: cpu}", "tokenizer.family=hf", f"tokenizer.path={folder}"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Data:
    """`fnrecipe data WHAT lm` on TEXTS with the tokenizer in `tmp_path`."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def run(what: str) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, "data", what, "lm", "--config", *pairs(tmp_path))

    return run


def test_show_begins_with_the_tokenizer(tmp_path: Path, data: Data) -> None:
    save(tmp_path, byte_level("<s>", EOS))
    ended = data("show")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == "tokenizer: 300 tokens, BOS <s> (0), EOS <eos> (1)"
    assert f"größe {EOS}" in ended.out.splitlines()


def test_show_and_stats_tell_once_what_a_tokenizer_loses(tmp_path: Path, data: Data) -> None:
    save(tmp_path, dropping())
    size = 8 * sum(len(text.encode()) for text in TEXTS[:4])
    lost = 8 * len("12ß<>".encode())
    for what in ("show", "stats"):
        ended = data(what)
        assert ended.status == 0
        (line,) = ended.err.splitlines()
        assert line.startswith("a: the tokenizer loses ")
    assert f" % of the text ({lost} of {size} bytes): " in line, "of all documents"


def test_a_text_that_cannot_be_encoded_is_named_in_one_line(tmp_path: Path, data: Data) -> None:
    content = json.loads(word_level("ab").to_str())
    content["model"] |= {"unk_token": "absent"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ended = data("show")
    assert ended.status == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: tokenizer.path: {tmp_path}/tokenizer.json cannot encode the text 'a")


def test_special_tokens_of_one_character_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    for token in ("a", ""):
        args = [tmp_path / "a.txt", "--out", tmp_path / "t.json", "--special-token", token]
        ended = fnrecipe_here(monkeypatch, capsys, "tokenizer", "train", *args)
        assert_usage_error(ended, f"error: --special-token: expected two characters at least, found {token!r}")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.slow
def test_training_tells_once_what_the_tokenizer_loses_and_which_it_is(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, dropping())
    regime = "regime={num_steps: 2, num_sample_tokens: 4, publish_metrics_every_n_steps: 1}"
    rest = [regime, "lr_scheduler.config.num_warmup_steps=1", "trainer.jit=off"]
    out = tmp_path / "out"
    ended = fnrecipe_here(monkeypatch, capsys, "train", "lm", "--out", out, "--config", *pairs(tmp_path), *rest)
    assert (ended.status, ended.err) == (0, ""), ended
    lines = ended.out.splitlines()
    assert len([line for line in lines if line.startswith("a: the tokenizer loses ")]) == 1
    (line,) = [line for line in lines if line.startswith("tokenizer: ")]
    assert line.startswith("tokenizer: 30 tokens, BOS and EOS <eos> (0), ")


CHAT = [{"role": "user", "content": "the</s>"}, {"role": "assistant", "content": "quick fox"}]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_show_prints_a_text_and_a_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, byte_level("<s>", "</s>"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "chat.json").write_text(json.dumps({"messages": CHAT, "tools": None}))
    args = [tmp_path, "--text", "theö", "--messages", tmp_path / "chat.json"]
    ended = fnrecipe_here(monkeypatch, capsys, "tokenizer", "show", *args)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"{tmp_path}: 300 tokens, BOS <s> (0), EOS </s> (1), ")
    assert lines[1] == "special tokens: <s> (0), </s> (1)"
    count = int(lines[2].removesuffix(" tokens for 5 bytes"))
    assert "'the'" in lines[3]
    chat = lines[3 + count :]
    assert chat[0].endswith(" of them trained (>)")
    assert chat[1:] == ["  '<s>user: the</s><s>assistant:'", "> ' quick fox</s>'"], "a token has the space and a letter"


def test_show_of_a_rank_file_and_of_a_sentencepiece_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.data.test_sentencepiece import train
    from tests.data.test_tiktoken import RANKS, written

    (tmp_path / "a.tiktoken").write_bytes(written(RANKS))
    train(tmp_path / "a.model", "Llama")
    for args, expected in {
        (
            "a.tiktoken",
            "--pattern",
            "gpt2",
            "--special-token",
            "<|endoftext|>",
        ): "271 tokens, BOS and EOS <|endoftext|> (270), ",
        ("a.model",): "330 tokens, BOS <s> (1), EOS </s> (2), ",
    }.items():
        ended = fnrecipe_here(monkeypatch, capsys, "tokenizer", "show", tmp_path / args[0], *args[1:], "--text", "the")
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.startswith(f"{tmp_path / args[0]}: {expected}")
    ended = fnrecipe_here(monkeypatch, capsys, "tokenizer", "show", tmp_path / "a.tiktoken")
    assert_usage_error(ended, "error: tokenizer.pattern: expected how text is cut before BPE, found null; valid names: gpt2, ")


@pytest.mark.parametrize("content", ["{", "3", '{"messages": 3}', "[3]"])
def test_a_file_that_is_no_chat_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    save(tmp_path, byte_level("<s>", "</s>"))
    (tmp_path / "chat.json").write_text(content)
    ended = fnrecipe_here(monkeypatch, capsys, "tokenizer", "show", tmp_path, "--messages", tmp_path / "chat.json")
    assert_usage_error(ended, f"error: {tmp_path}/chat.json: expected a ")
