from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fnrecipe.data import Document, Tokenizer, byte_tokenizer, huggingface_tokenizer, tokenize
from fnrecipe.data.document import Ids
from fnrecipe.errors import UsageError
from tests.data.laws import plain

EOS = "<|endoftext|>"
TEXTS = st.text(st.characters(codec="utf-8"))
SAMPLES = [
    "",
    "a",
    "def main() -> None:\n\treturn 1\n",
    "größe 東京都 🙂👩‍👩‍👧",
    "\x00\r\n\u2028",
    "a\r\nb\r\r\n",
    " leading and trailing  ",
    "    four spaces",
    f"{EOS} in a text<|user|>",
    "e\u0301 \ufeff \ufffd",
]
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
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.encode_special_tokens = True
    return inner


@given(texts=st.lists(TEXTS, max_size=4))
def test_bytes_are_the_tokens(texts: list[str]) -> None:
    tokenizer = byte_tokenizer()
    encoded = tokenizer.encode(texts)
    assert [ids.tolist() for ids in encoded] == [list(text.encode()) for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)
    assert [tokenizer.decode(ids.tolist()) for ids in encoded] == texts


def test_byte_tokenizer_ends_documents_with_256() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (257, 256, 256)
    assert tokenizer.decode([256, 97, 256, 98, 256]) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_library(bpe: Tokenizer, library: tokenizers.Tokenizer, texts: list[str]) -> None:
    texts = [*texts, *SAMPLES]
    encoded = bpe.encode(texts)
    assert [ids.tolist() for ids in encoded] == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_ids_are_those_of_transformers(bpe: Tokenizer, bpe_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(bpe_path), split_special_tokens=True)
    expected = [theirs.encode(text, add_special_tokens=False) for text in SAMPLES]
    assert [ids.tolist() for ids in bpe.encode(SAMPLES)] == expected


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
    with pytest.raises(UsageError, match=r"tokenizer\.path: cannot read .*/tokenizer\.json: No such file"):
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


@given(text=TEXTS)
def test_bytes_of_a_byte_level_vocabulary_are_those_of_the_text(bpe: Tokenizer, text: str) -> None:
    for each in [text, *SAMPLES]:
        [ids] = bpe.encode([each])
        assert bpe.num_bytes[ids].sum() == len(each.encode())


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_the_table_of_bytes(bpe: Tokenizer, name: str) -> None:
    tokenizer = {"byte": byte_tokenizer(), "bpe": bpe}[name]
    assert (tokenizer.num_bytes.dtype, tokenizer.num_bytes.shape) == (np.int64, (tokenizer.vocab_size,))
    special = {tokenizer.bos, tokenizer.eos} | ({1} if name == "bpe" else set())
    assert set(np.flatnonzero(tokenizer.num_bytes == 0).tolist()) == special


def test_added_tokens_that_are_not_special_stand_for_what_they_spell(tmp_path: Path) -> None:
    inner = train(tmp_path / "t.json", [EOS])
    inner.add_tokens(["<\uff5cUser\uff5c>", "größe", "<think>"])
    inner.save(str(tmp_path / "t.json"))
    tokenizer = huggingface_tokenizer(str(tmp_path / "t.json"))
    for text in ["größe größe 東京", "<\uff5cUser\uff5c> hi<think>", "a größer"]:
        [ids] = tokenizer.encode([text])
        assert max(ids) >= 320
        assert tokenizer.num_bytes[ids].sum() == len(text.encode())


def test_bytes_of_a_byte_level_decoder_within_a_sequence(bpe: Tokenizer, bpe_path: Path, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(bpe_path))
    inner.decoder = decoders.Sequence([decoders.ByteLevel()])
    inner.save(str(tmp_path / "t.json"))
    assert huggingface_tokenizer(str(tmp_path / "t.json")).num_bytes.tolist() == bpe.num_bytes.tolist()


WORDS = ["▁", "▁the", "▁quick", "the", "ö", "東", "京", "s"]


def sentencepiece(path: Path, scheme: str) -> Tokenizer:
    """A vocabulary as SentencePiece makes it: words that begin with ▁, characters, and bytes for all others."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = [(name, -20.0 if name.startswith("<") else -float(8 - len(name))) for name in names]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", int(scheme == "always"), 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(path))
    return huggingface_tokenizer(str(path), "</s>", "<s>")


@pytest.mark.parametrize(("scheme", "added"), [("never", 0), ("always", 1)])
def test_bytes_of_a_sentencepiece_vocabulary(tmp_path: Path, scheme: str, added: int) -> None:
    tokenizer = sentencepiece(tmp_path / "t.json", scheme)
    for text in ["the quick", "the  東京 größe 🙂\n", "thethes ö", "x"]:
        [ids] = tokenizer.encode([text])
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.num_bytes[ids].sum() == len(text.encode()) + added  # the space that is put before the text
    sizes = tokenizer.num_bytes.tolist()
    assert sizes == [0, 0, 0, *[1] * 256, 1, 4, 6, 3, 2, 3, 3, 1]


def test_the_beginning_and_the_end_of_documents(bpe_path: Path, library: tokenizers.Tokenizer) -> None:
    end, user = library.token_to_id(EOS), library.token_to_id("<|user|>")
    for names, expected in {(None, None): (end, end), (None, "<|user|>"): (user, end), (EOS, EOS): (end, end)}.items():
        tokenizer = huggingface_tokenizer(str(bpe_path), *names)
        assert (tokenizer.bos, tokenizer.eos) == expected


def test_an_unknown_token_for_the_beginning(bpe_path: Path) -> None:
    expected = r"tokenizer\.bos_token: expected the token '<\|usr\|>' in .*, found none; did you mean <\|user\|>\?$"
    with pytest.raises(UsageError, match=expected):
        huggingface_tokenizer(str(bpe_path), None, "<|usr|>")


def test_fingerprints_tell_files_apart(bpe: Tokenizer, bpe_path: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_bytes(bpe_path.read_bytes())
    train(other, [EOS, "<|system|>"])
    assert huggingface_tokenizer(str(copy)).fingerprint == bpe.fingerprint
    assert len({bpe.fingerprint, huggingface_tokenizer(str(other)).fingerprint, byte_tokenizer().fingerprint}) == 3


def tokenizer_of(bpe: Tokenizer, name: str) -> Tokenizer:
    """Tokenizers whose tokens for the beginning and the end differ, so that one in the other's place shows."""
    return attrs.evolve({"byte": byte_tokenizer(), "bpe": bpe}[name], bos=1)


ENDS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("add_bos", "add_eos"), ENDS)
@pytest.mark.parametrize("name", ["byte", "bpe"])
@given(texts=st.lists(TEXTS, max_size=4))
def test_tokenize_puts_texts_between_ends(bpe: Tokenizer, name: str, add_bos: bool, add_eos: bool, texts: list[str]) -> None:
    tokenizer = tokenizer_of(bpe, name)
    found = tokenize(list(map(Document, texts)), tokenizer=tokenizer, add_bos=add_bos, add_eos=add_eos, source=3)
    encoded = [ids.tolist() for ids in tokenizer.encode(texts)]
    assert [tokens.ids.tolist() for tokens in found] == [
        [*[tokenizer.bos] * add_bos, *ids, *[tokenizer.eos] * add_eos] for ids in encoded
    ]
    unpredicted = [0 if add_bos else int(tokenizer.num_bytes[ids[:1]].sum()) for ids in encoded]
    expected = [len(text.encode()) - first for text, first in zip(texts, unpredicted, strict=True)]
    assert [tokens.num_bytes for tokens in found] == expected
    assert all((tokens.ids.dtype, tokens.source) == (np.int32, 3) for tokens in found)


def test_tokenize_written_out() -> None:
    tokenizer, documents = tokenizer_of(byte_tokenizer(), "byte"), [Document("aö"), Document("")]
    found = {
        ends: [(tokens.ids.tolist(), tokens.num_bytes) for tokens in tokenize(documents, tokenizer=tokenizer, **ends_of(ends))]
        for ends in ENDS
    }
    assert found == {
        (True, True): [([1, 97, 195, 182, 256], 3), ([1, 256], 0)],
        (True, False): [([1, 97, 195, 182], 3), ([1], 0)],
        (False, True): [([97, 195, 182, 256], 2), ([256], 0)],
        (False, False): [([97, 195, 182], 2), ([], 0)],
    }
    assert {tokens.source for tokens in tokenize(documents, tokenizer=tokenizer)} == {0}


def ends_of(ends: tuple[bool, bool]) -> dict[str, bool]:
    return dict(zip(("add_bos", "add_eos"), ends, strict=True))


@pytest.mark.parametrize("ends", ENDS)
def test_documents_with_ids_are_not_encoded_again(bpe: Tokenizer, ends: tuple[bool, bool]) -> None:
    def encode(texts: Sequence[str]) -> list[Ids]:
        encoded.extend(texts)
        return bpe.encode(texts)

    encoded: list[str] = []
    texts = ["the quick größe", "東京都", "", "def add(a, b)"]
    ids = bpe.encode(texts)
    documents = [Document(texts[0], ids[0]), Document(texts[1]), Document(ids=ids[2]), Document(ids=ids[3])]
    tokenizer = attrs.evolve(bpe, encode=encode)
    found = tokenize(documents, tokenizer=tokenizer, **ends_of(ends))
    assert encoded == ["東京都"]
    expected = tokenize(list(map(Document, texts)), tokenizer=bpe, **ends_of(ends))
    assert list(map(plain, found)) == list(map(plain, expected))


def test_bytes_are_those_that_the_tokens_stand_for() -> None:
    document = Document("größe", np.array([1, 2], np.int32))
    [tokens] = tokenize([document], tokenizer=byte_tokenizer())
    assert (tokens.ids.tolist(), tokens.num_bytes, tokens.lost) == ([256, 1, 2, 256], 2, 5)
