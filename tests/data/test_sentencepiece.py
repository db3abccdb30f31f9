"""SentencePiece models: the library's ids, bytes that add up, ends, added tokens, and files that are none."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Tokenizer, sentencepiece_tokenizer
from fnrecipe.errors import DataError, UsageError
from tests.data.kinds import CORPUS

TEXTS = st.text(st.one_of(st.sampled_from("ab  \n▁ö東🙂e\u0301ﬁ\0"), st.characters(codec="utf-8")))
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "Llama": {**LLAMA, "vocab_size": 330, "user_defined_symbols": ["<sep>"], "control_symbols": ["<ctl>"]},
    "Llama without a space before": {**LLAMA, "vocab_size": 330, "add_dummy_prefix": False},
    "T5": {"model_type": "unigram", "vocab_size": 60, "hard_vocab_limit": False, "bos_id": -1},
}


def train(path: Path, kind: str) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, minloglevel=2, **KINDS[kind]
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: train(folder / f"{number}.model", kind) for number, kind in enumerate(KINDS)}


@pytest.fixture(scope="module")
def ours(paths: Mapping[str, Path]) -> Mapping[str, Tokenizer]:
    return {kind: sentencepiece_tokenizer(str(path)) for kind, path in paths.items()}


@pytest.fixture(scope="module")
def libraries(paths: Mapping[str, Path]) -> Mapping[str, Any]:
    return {kind: sentencepiece.SentencePieceProcessor(model_file=str(path)) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_library(
    ours: Mapping[str, Tokenizer], libraries: Mapping[str, Any], kind: str, texts: list[str]
) -> None:
    found = ours[kind].encode(texts)
    assert [ids.tolist() for ids in found] == libraries[kind].encode(texts)
    assert all(ids.dtype == np.int32 for ids in found)
    for text, ids in zip(texts, found, strict=True):
        assert ours[kind].decode(ids.tolist()) == libraries[kind].decode(ids.tolist())
        if kind != "T5" and "▁" not in text:
            assert ours[kind].decode([ours[kind].bos, *ids.tolist(), ours[kind].eos]) == text


@pytest.mark.parametrize("kind", ["Llama", "Llama without a space before"])
@given(text=TEXTS)
def test_models_that_fall_back_on_bytes_lose_nothing(ours: Mapping[str, Tokenizer], kind: str, text: str) -> None:
    [ids] = ours[kind].encode([text])
    assert ours[kind].count_bytes(text, ids) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "lost"), [("ab ab", ""), ("ab  ab", ""), ("東 ab", "東"), ("  ab ", "   "), ("ﬁ a", ""), ("", "")]
)
def test_what_a_model_with_an_unknown_token_loses(ours: Mapping[str, Tokenizer], text: str, lost: str) -> None:
    [ids] = ours["T5"].encode([text])
    assert len(text.encode()) - ours["T5"].count_bytes(text, ids) == len(lost.encode())


def test_control_tokens_are_never_made_of_text_and_defined_ones_are(ours: Mapping[str, Tokenizer]) -> None:
    tokenizer = ours["Llama"]
    assert tokenizer.special == {"<s>": 1, "</s>": 2, "<ctl>": 3}
    assert (tokenizer.bos, tokenizer.eos, tokenizer.names) == (1, 2, ("<s>", "</s>"))
    [ids] = tokenizer.encode(["<s> <ctl><sep></s>"])
    assert set(ids.tolist()) & {1, 2, 3, 4} == {4}
    assert not tokenizer.num_bytes[[0, 1, 2, 3]].any()
    assert tokenizer.num_bytes[4] == len("<sep>")


def test_a_model_without_a_beginning_has_the_end_for_it(ours: Mapping[str, Tokenizer]) -> None:
    assert ours["T5"].names == ("</s>", "</s>")


def test_text_that_becomes_a_defined_token_that_ends_documents_is_an_error(paths: Mapping[str, Path]) -> None:
    tokenizer = sentencepiece_tokenizer(str(paths["Llama"]), "<sep>", "<ctl>")
    assert tokenizer.names == ("<ctl>", "<sep>")
    with pytest.raises(DataError, match=r"expected text to become ordinary tokens, found '<sep>' \(4\).* in 'a<sep>'"):
        tokenizer.encode(["a<sep>"])


def test_an_unknown_name(paths: Mapping[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.eos_token: expected the token '<stl>' in .*; did you mean <ctl>\?$"):
        sentencepiece_tokenizer(str(paths["Llama"]), "<stl>")


@given(pieces=st.lists(st.one_of(TEXTS, st.sampled_from([1, 2, 3]))))
def test_pieces_are_encoded_each_with_their_characters(ours: Mapping[str, Tokenizer], pieces: list[str | int]) -> None:
    tokenizer, names = ours["Llama"], {1: "<s>", 2: "</s>", 3: "<ctl>"}
    found = tokenizer.encode_pieces(pieces)
    separate = [tokenizer.encode([piece])[0].tolist() if isinstance(piece, str) else [piece] for piece in pieces]
    assert found.ids.tolist() == list(chain.from_iterable(separate))
    whole = "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
    covered = {place for first, last in found.spans.tolist() for place in range(first, last)}
    assert covered == set(range(len(whole)))
    for number, (first, last) in zip(found.ids.tolist(), found.spans.tolist(), strict=True):
        if number in names:
            assert whole[first:last] == names[number]


def test_a_directory_adds_tokens_and_names_the_ends(paths: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(paths["Llama"].read_bytes())
    size = sentencepiece_tokenizer(str(tmp_path)).vocab_size
    decoder = {"1": {"content": "<s>"}, str(size): {"content": "<|im_start|>"}, str(size + 1): {"content": "<|im_end|>"}}
    config = {"added_tokens_decoder": decoder, "eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = sentencepiece_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.names, tokenizer.eos) == (size + 2, ("<s>", "<|im_end|>"), size + 1)
    assert len(tokenizer.num_bytes) == size + 2
    assert size not in tokenizer.encode(["<|im_start|>"])[0]
    assert tokenizer.encode_pieces([size, "ab"]).ids.tolist()[0] == size
    assert tokenizer.decode([size, *tokenizer.encode(["ab"])[0].tolist(), size + 1]) == "ab"
    fingerprints = {sentencepiece_tokenizer(str(path)).fingerprint for path in (tmp_path, *paths.values())}
    assert len(fingerprints) == 1 + len(paths)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": size + 7}))
    with pytest.raises(UsageError, match=r"expected added tokens with ids from .* on without holes"):
        sentencepiece_tokenizer(str(tmp_path))


def test_files_that_are_no_models(paths: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = paths["Llama"].read_bytes()
    for data in (b"", b"abc", good[:-7], good[:300], b"\xff" * 4000):
        (tmp_path / "a.model").write_bytes(data)
        with pytest.raises(UsageError, match=r"^tokenizer\.path: .*a\.model is not a SentencePiece model: ") as caught:
            sentencepiece_tokenizer(str(tmp_path / "a.model"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot read .*tokenizer\.model: No such file"):
        sentencepiece_tokenizer(str(tmp_path))
    assert capfd.readouterr().err == ""


def test_without_the_library_one_line_says_how_to_install_it(
    paths: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"needs sentencepiece: pip install 'fnrecipe\[sentencepiece\]'$"):
        sentencepiece_tokenizer(str(paths["Llama"]))
