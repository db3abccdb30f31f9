from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fnrecipe.data import Tokenizer, byte_tokenizer, huggingface_tokenizer, tokenize
from fnrecipe.errors import UsageError

EOS = "<|endoftext|>"
TEXTS = st.text(st.characters(codec="utf-8"))
SAMPLES = ["", "a", "def main() -> None:\n\treturn 1\n", "größe 東京都 🙂👩‍👩‍👧", "\x00\r\n\u2028", " leading and trailing  "]
CORPUS = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog ", "größe, straße, 東京都\n"] * 20


def train(path: Path, special: list[str], *, with_eos_around: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE, as real ones are made; saved at `path`."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if with_eos_around:
        eos = inner.token_to_id(EOS)
        inner.post_processor = processors.TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, eos)])
        inner.enable_truncation(8)
        inner.enable_padding(pad_id=eos, pad_token=EOS)
    inner.save(str(path))
    return inner


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train(path, [EOS, "<|user|>"])
    return path


@pytest.fixture(scope="module")
def bpe(bpe_path: Path) -> Tokenizer:
    return huggingface_tokenizer(str(bpe_path))


@pytest.fixture(scope="module")
def library(bpe_path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(bpe_path))


@given(texts=st.lists(TEXTS, max_size=4))
def test_bytes_are_the_tokens(texts: list[str]) -> None:
    tokenizer = byte_tokenizer()
    encoded = tokenizer.encode(texts)
    assert [ids.tolist() for ids in encoded] == [list(text.encode()) for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert [tokenizer.decode(ids.tolist()) for ids in encoded] == texts


def test_byte_tokenizer_ends_documents_with_256() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.decode([256, 97, 256, 98, 256]) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_library(bpe: Tokenizer, library: tokenizers.Tokenizer, texts: list[str]) -> None:
    texts = [text for text in [*texts, *SAMPLES] if "<|" not in text]  # the library reads its special tokens out of text
    encoded = bpe.encode(texts)
    assert [ids.tolist() for ids in encoded] == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_the_tokenizer_has_learnt_something(bpe: Tokenizer, library: tokenizers.Tokenizer) -> None:
    [ids] = bpe.encode(["the quick brown fox"])
    assert 0 < len(ids) < 12
    assert (bpe.vocab_size, bpe.eos) == (library.get_vocab_size(), library.token_to_id(EOS))


@given(pieces=st.lists(st.sampled_from([EOS, "<|user|>", "<|", "endoftext", "|>", " ", "ü", "def "])))
def test_special_tokens_in_text_stay_text(bpe: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    [ids] = bpe.encode([text])
    assert not {bpe.eos, 1} & set(ids.tolist())
    assert bpe.decode(ids.tolist()) == text


@given(text=TEXTS)
def test_bpe_round_trip(bpe: Tokenizer, text: str) -> None:
    [ids] = bpe.encode([text])
    assert bpe.decode(ids.tolist()) == text
    assert bpe.decode([bpe.eos, *ids.tolist(), bpe.eos]) == text


def test_the_file_adds_cuts_and_pads_nothing(tmp_path: Path) -> None:
    train(tmp_path / "t.json", [EOS], with_eos_around=True)
    tokenizer = huggingface_tokenizer(str(tmp_path / "t.json"))
    texts = ["a", "the quick brown fox jumps over the lazy dog " * 3]
    encoded = [ids.tolist() for ids in tokenizer.encode(texts)]
    assert tokenizer.eos not in encoded[0] + encoded[1]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(encoded[0]) == 1


@pytest.mark.parametrize("eos_token", ["<|user|>", EOS])
def test_the_end_of_text_token_by_name(bpe_path: Path, library: tokenizers.Tokenizer, eos_token: str) -> None:
    assert huggingface_tokenizer(str(bpe_path), eos_token).eos == library.token_to_id(eos_token)


@pytest.mark.parametrize("eos", ["<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>"])
def test_a_common_end_of_text_token_is_found(tmp_path: Path, eos: str) -> None:
    inner = train(tmp_path / "t.json", ["<pad>", eos])
    assert huggingface_tokenizer(str(tmp_path / "t.json")).eos == inner.token_to_id(eos) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.path: cannot read .*absent\.json: No such file"):
        huggingface_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(UsageError, match=r"tokenizer\.path: cannot read .*: Is a directory"):
        huggingface_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": {"type": "none"}}', b"\xff\xfe\x00"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.path: .*t\.json is not a tokenizer\.json: "):
        huggingface_tokenizer(str(path))


def test_an_unknown_end_of_text_token(bpe_path: Path) -> None:
    expected = r"tokenizer\.eos_token: expected the token '<\|endoftxt\|>' in .*, found none; did you mean <\|endoftext\|>\?$"
    with pytest.raises(UsageError, match=expected):
        huggingface_tokenizer(str(bpe_path), "<|endoftxt|>")


def test_the_hint_is_the_nearest_of_many_special_tokens(tmp_path: Path) -> None:
    train(tmp_path / "t.json", [*(f"<|reserved_{number}|>" for number in range(200)), "<|im_end|>"])
    with pytest.raises(UsageError, match=r"did you mean <\|im_end\|>\?$"):
        huggingface_tokenizer(str(tmp_path / "t.json"), "<|im_ned|>")


def test_no_common_end_of_text_token(tmp_path: Path) -> None:
    train(tmp_path / "t.json", ["<bos>", "<stop>"])
    expected = r"tokenizer\.eos_token: expected a common end-of-text token in .*, found none; valid names: .*<bos>, <stop>"
    with pytest.raises(UsageError, match=expected):
        huggingface_tokenizer(str(tmp_path / "t.json"))


def test_every_id_is_below_vocab_size(tmp_path: Path) -> None:
    """Ids with holes between them, as files have from which tokens were taken out."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "a": 9, "b": 3}))
    inner.save(str(tmp_path / "t.json"))
    tokenizer = huggingface_tokenizer(str(tmp_path / "t.json"))
    assert [ids.tolist() for ids in tokenizer.encode(["a", "b"])] == [[9], [3]]
    assert tokenizer.vocab_size == 10


@pytest.mark.parametrize("name", ["byte", "bpe"])
@given(texts=st.lists(TEXTS, max_size=4))
def test_tokenize_puts_texts_between_ends(bpe: Tokenizer, name: str, texts: list[str]) -> None:
    tokenizer = {"byte": byte_tokenizer(), "bpe": bpe}[name]
    documents = tokenize(texts, tokenizer=tokenizer)
    expected = [[tokenizer.eos, *ids.tolist(), tokenizer.eos] for ids in tokenizer.encode(texts)]
    assert [document.ids.tolist() for document in documents] == expected
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in texts]
    assert all(document.ids.dtype == np.int32 for document in documents)
