"""Rank files: the library's ids, bytes that add up, patterns and special tokens, and files that are none."""

from __future__ import annotations

import builtins
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public as published
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Tokenizer, tiktoken_tokenizer
from fnrecipe.data.tiktoken_patterns import PATTERNS
from fnrecipe.errors import DataError, UsageError

WORDS = [b" t", b" th", b" the", b"ab", b"  ", b"    ", b"\n\n", b"12", b"123", "ö".encode(), b"'s", b"He", b"Hel", b"Hell"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *WORDS])}
SPECIAL = ["<|begin_of_text|>", "<|endoftext|>", "<|im_start|>"]
TEXTS = st.text(st.one_of(st.sampled_from("the HELlo's12345  \n\r\t.!/öé東🙂e\u0301"), st.characters(codec="utf-8")))


def written(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "a.tiktoken"
    path.write_bytes(written(RANKS))
    return path


@pytest.fixture(scope="module")
def ours(path: Path) -> Mapping[str, Tokenizer]:
    return {name: tiktoken_tokenizer(str(path), name, special_tokens=SPECIAL) for name in PATTERNS}


@pytest.fixture(scope="module")
def libraries() -> Mapping[str, tiktoken.Encoding]:
    special = {name: len(RANKS) + index for index, name in enumerate(SPECIAL)}
    return {
        name: tiktoken.Encoding(name, pat_str=pattern.regex, mergeable_ranks=RANKS, special_tokens=special)
        for name, pattern in PATTERNS.items()
    }


@pytest.mark.parametrize("name", PATTERNS)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_library_and_bytes_add_up(
    ours: Mapping[str, Tokenizer], libraries: Mapping[str, tiktoken.Encoding], name: str, texts: list[str]
) -> None:
    texts = [*texts, "".join(SPECIAL)]
    found = ours[name].encode(texts)
    assert [ids.tolist() for ids in found] == libraries[name].encode_ordinary_batch(texts)
    for text, ids in zip(texts, found, strict=True):
        assert ids.dtype == np.int32
        assert ours[name].decode([ours[name].bos, *ids.tolist(), ours[name].eos]) == text
        assert ours[name].count_bytes(text, ids) == ours[name].num_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(("name", "constructor"), [("cl100k", "cl100k_base"), ("o200k", "o200k_base"), ("gpt2", "r50k_base")])
def test_patterns_and_special_tokens_are_those_that_the_library_defines(
    name: str, constructor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    defined = getattr(published, constructor)()
    assert (PATTERNS[name].regex, PATTERNS[name].special) == (defined["pat_str"], defined["special_tokens"])


def test_special_tokens_follow_the_ranks(ours: Mapping[str, Tokenizer]) -> None:
    tokenizer = ours["llama3"]
    assert tokenizer.special == {name: len(RANKS) + index for index, name in enumerate(SPECIAL)}
    assert (tokenizer.names, tokenizer.vocab_size) == ((SPECIAL[0], SPECIAL[1]), len(RANKS) + 3)
    assert np.flatnonzero(tokenizer.num_bytes == 0).tolist() == list(tokenizer.special.values())


def test_special_tokens_of_the_pattern_are_for_its_own_vocabulary(path: Path, tmp_path: Path) -> None:
    expected = (
        r"^tokenizer\.special_tokens: expected names for .*, whose 270 ranks are not those of the vocabulary qwen2, found none$"
    )
    with pytest.raises(UsageError, match=expected):
        tiktoken_tokenizer(str(path), "qwen2")
    filler = {b"\0" + number.to_bytes(4, "big"): number for number in range(len(RANKS), 50256)}
    (tmp_path / "gpt2.tiktoken").write_bytes(written({**RANKS, **filler}))
    tokenizer = tiktoken_tokenizer(str(tmp_path), "gpt2")
    assert (tokenizer.vocab_size, tokenizer.special, tokenizer.eos) == (50257, {"<|endoftext|>": 50256}, 50256)


def test_ends_by_name(path: Path) -> None:
    tokenizer = tiktoken_tokenizer(str(path), "gpt2", "<|im_start|>", "<|endoftext|>", SPECIAL)
    assert (tokenizer.bos, tokenizer.eos) == (len(RANKS) + 1, len(RANKS) + 2)
    with pytest.raises(UsageError, match=r"expected the token '<\|im_stat\|>' .*did you mean <\|im_start\|>\?"):
        tiktoken_tokenizer(str(path), "gpt2", "<|im_stat|>", special_tokens=SPECIAL)


@given(pieces=st.lists(st.one_of(TEXTS, st.sampled_from(range(len(RANKS), len(RANKS) + 3)))))
def test_pieces_are_encoded_each_with_their_characters(ours: Mapping[str, Tokenizer], pieces: list[str | int]) -> None:
    tokenizer = ours["llama3"]
    names = {number: name for name, number in tokenizer.special.items()}
    found = tokenizer.encode_pieces(pieces)
    whole = "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
    for number, (first, last) in zip(found.ids.tolist(), found.spans.tolist(), strict=True):
        if number in names:
            assert whole[first:last] == names[number]
        else:  # the characters that its bytes belong to
            token = next(token for token, rank in RANKS.items() if rank == number)
            assert token in whole[first:last].encode()
            assert len(token) > len(whole[first + 1 : last - 1].encode())


def test_fingerprints_tell_ranks_patterns_and_special_tokens_apart(
    ours: Mapping[str, Tokenizer], path: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.tiktoken").write_bytes(written({**RANKS, b"zz": len(RANKS)}))
    others = [tiktoken_tokenizer(str(path), "gpt2", special_tokens=SPECIAL[:2])]
    others += [tiktoken_tokenizer(str(tmp_path / "b.tiktoken"), "gpt2", special_tokens=SPECIAL)]
    assert len({tokenizer.fingerprint for tokenizer in (*ours.values(), *others)}) == len(PATTERNS) + 2
    assert tiktoken_tokenizer(str(path), "gpt2", special_tokens=SPECIAL).fingerprint == ours["gpt2"].fingerprint


FILES = {
    "nothing": (b"", "expected a rank for each of 256 bytes, found none for 0x00"),
    "no ranks": (b"YQ==\n", "a.tiktoken:1: expected a token in base64 that no earlier line has"),
    "no base64": (b"Y!= 3\n", "a.tiktoken:1: expected a token in base64"),
    "a rank that is no number": (b"YQ== -3\n", "a.tiktoken:1: expected a token in base64"),
    "a token twice": (written(RANKS) + b"YQ== 999\n", "a.tiktoken:271: expected a token in base64 that no earlier line has"),
    "a rank twice": (written(RANKS) + b"enp6 3\n", "expected 271 different ranks, found 270 up to 269"),
    "a far rank": (written(RANKS) + b"enp6 99999999\n", "expected 271 different ranks, found 271 up to 99,999,999"),
    "no byte 0xff": (written({t: r for t, r in RANKS.items() if t != b"\xff"}), "found none for 0xff"),
    "JSON": (b'{"model": {}}', "a.tiktoken:1: expected a token in base64"),
}


@pytest.mark.parametrize(("data", "expected"), FILES.values(), ids=FILES)
def test_files_that_are_no_ranks(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.tiktoken").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        tiktoken_tokenizer(str(tmp_path / "a.tiktoken"), "gpt2", special_tokens=SPECIAL)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_patterns_and_names_that_are_none(path: Path) -> None:
    with pytest.raises(UsageError, match=r"^tokenizer\.pattern: .*null; valid names: gpt2, cl100k, o200k, llama3, qwen2$"):
        tiktoken_tokenizer(str(path), None)
    with pytest.raises(UsageError, match=r"found 'lama3'; did you mean llama3\?$"):
        tiktoken_tokenizer(str(path), "lama3")
    for names in (["a", "a"], [""]):
        with pytest.raises(UsageError, match=r"^tokenizer\.special_tokens: expected different names"):
            tiktoken_tokenizer(str(path), "gpt2", special_tokens=names)


def test_text_on_which_the_library_panics_is_named_in_one_line(
    ours: Mapping[str, Tokenizer], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"cannot encode the text '   .*: .*StackOverflow") as caught:
        ours["gpt2"].encode(["a", " " * 2_000_000 + "a"])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_the_library_one_line_says_how_to_install_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"needs tiktoken: pip install 'fnrecipe\[tiktoken\]'$"):
        tiktoken_tokenizer(str(path), "gpt2", special_tokens=SPECIAL)
