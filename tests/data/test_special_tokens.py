"""Text never becomes the tokens that begin and end documents, nor any special one; which tokens these are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fnrecipe.data import Tokenizer, huggingface_tokenizer
from fnrecipe.data.tokenizer import describe
from fnrecipe.errors import DataError
from tests.data.kinds import EOS, byte_level, save, unigram, word_level, word_piece

TEXT = f"a {EOS} b</s> <s>the <unk>{EOS}"


def added_as_text() -> Library:
    """The end of text was added, but not as a special token."""
    found = byte_level("<pad>")
    found.add_tokens([EOS])
    return found


def word_of_the_vocabulary() -> Library:
    return word_level("a", "b</s>", "<s>the", "<unk><eos>", "b")


def made_by_merges() -> Library:
    """The end of text is an ordinary token, which its letters merge to."""
    letters = [*"ab <>/sthunkeo", "<e", "os", "os>", EOS]
    merges = [("<", "e"), ("o", "s"), ("os", ">"), ("<e", "os>")]
    return Library(models.BPE({name: number for number, name in enumerate(letters)}, merges))


def whole_words_first() -> Library:
    """Llama 3's way: a word that is a token is taken as it is."""
    letters = [*"ab <>/sthunkeo", EOS]
    found = Library(models.BPE({name: number for number, name in enumerate(letters)}, [], ignore_merges=True))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


def learnt_as_a_word() -> Library:
    """A word of the text was given as special token: training made it of its letters too."""
    found = Library(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>", "the"], show_progress=False)
    found.train_from_iterator(["the theme the"] * 9 + ["<s></s> ab"], trainer)
    return found


KINDS: dict[str, Callable[[], Library]] = {
    "special": byte_level,
    "added as text": added_as_text,
    "a word of the vocabulary": word_of_the_vocabulary,
    "made by merges": made_by_merges,
    "whole words first": whole_words_first,
    "learnt as a word": learnt_as_a_word,
    "Unigram": lambda: unigram(by_bytes=True),
    "Unigram without bytes": lambda: unigram(by_bytes=False),
    "WordPiece": word_piece,
}


def loaded(folder: Path, found: Library, *names: str | None) -> Tokenizer:
    return huggingface_tokenizer(save(folder, found), *names)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_the_end_of_documents_becomes_ordinary_tokens(tmp_path: Path, kind: str) -> None:
    library = KINDS[kind]()
    tokenizer = loaded(tmp_path, library)
    special = {number for number, token in library.get_added_tokens_decoder().items() if token.special}
    texts = [TEXT, "a [SEP] b", EOS, "</s>", "the"]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        unknown = library.token_to_id("<unk>")
        assert not set(ids.tolist()) & ({tokenizer.bos, tokenizer.eos} | special) - {unknown}, text


@given(pieces=st.lists(st.sampled_from([EOS, "<pad>", "<", "eos", ">", " ", "ü", "def "])))
def test_what_spells_special_tokens_comes_back_as_it_was(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = loaded(tmp_path_factory.getbasetemp(), added_as_text())
    [ids] = tokenizer.encode(["".join(pieces)])
    assert tokenizer.decode([tokenizer.bos, *ids.tolist(), tokenizer.eos]) == "".join(pieces)


@pytest.mark.parametrize("kind", ["special", "added as text", "learnt as a word", "WordPiece"])
def test_other_text_has_the_tokens_of_the_library(tmp_path: Path, kind: str) -> None:
    library = KINDS[kind]()
    texts = ["ab größe\n", "def add(a, b)", "a quick fox", ""]
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in loaded(tmp_path, library).encode(texts)] == expected


@pytest.mark.parametrize(
    ("vocab", "unknown", "eos", "text"),
    [
        ({EOS: 0, "a": 1}, EOS, EOS, "a zz"),
        ({EOS: 0, "a": 0, "b": 1}, "b", EOS, "b a"),
        ({"b": 0, ".": 1}, "b", ".", "b b ."),
    ],
    ids=["the unknown token ends documents", "two names of one id", "a single character"],
)
def test_text_that_can_only_become_the_end_of_documents_is_an_error(
    tmp_path: Path, vocab: dict[str, int], unknown: str, eos: str, text: str
) -> None:
    content = json.loads(word_level().to_str())
    content["model"] |= {"vocab": vocab, "unk_token": unknown}
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = huggingface_tokenizer(str(tmp_path / "t.json"), eos)
    first = text.split()[0]
    assert [ids.tolist() for ids in tokenizer.encode([first])] == [[vocab[first]]]
    with pytest.raises(DataError) as caught:
        tokenizer.encode([first, text, first])
    (line,) = str(caught.value).splitlines()
    assert f"found {eos!r} ({vocab[eos]}), which begins or ends documents, in {text!r}" in line


# Which tokens begin and end documents.


def around(first: str | None, last: str | None) -> Callable[[Library], Any]:
    def processor(library: Library) -> Any:
        names = [name for name in (first, last) if name is not None]
        single = " ".join(filter(None, [first, "$A", last]))
        return processors.TemplateProcessing(
            single=single, special_tokens=[(name, library.token_to_id(name)) for name in names]
        )

    return processor


def within_a_sequence(library: Library) -> Any:
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), around("<one>", None)(library)])


def roberta(library: Library) -> Any:
    return processors.RobertaProcessing(("<one>", library.token_to_id("<one>")), ("<two>", library.token_to_id("<two>")))


CHOICES = {
    "the end begins, where there is nothing else": (["<pad>", "<|endoftext|>"], None, (None, None), ("<|endoftext|>",) * 2),
    "Llama 2": (["<unk>", "<s>", "</s>"], None, (None, None), ("<s>", "</s>")),
    "Llama 3": (["<|begin_of_text|>", "<|end_of_text|>"], None, (None, None), ("<|begin_of_text|>", "<|end_of_text|>")),
    "Gemma": (["<pad>", "<eos>", "<bos>"], None, (None, None), ("<bos>", "<eos>")),
    "BERT": (["[UNK]", "[CLS]", "[SEP]"], around("[CLS]", "[SEP]"), (None, None), ("[CLS]", "[SEP]")),
    "BERT, by the names": (["[UNK]", "[CLS]", "[SEP]"], None, (None, None), ("[CLS]", "[SEP]")),
    "T5": (["<pad>", "</s>"], around(None, "</s>"), (None, None), ("</s>", "</s>")),
    "a template before names": (["<s>", "</s>", "<one>", "<two>"], around("<two>", "<one>"), (None, None), ("<two>", "<one>")),
    "a template within a sequence": (["</s>", "<one>"], within_a_sequence, (None, None), ("<one>", "</s>")),
    "RoBERTa's processor": (["<one>", "<two>"], roberta, (None, None), ("<two>", "<one>")),
    "the config before all": (["<s>", "</s>", "<one>"], around("<s>", "</s>"), ("<one>", "<s>"), ("<s>", "<one>")),
}


@pytest.mark.parametrize(("special", "processor", "asked", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_beginning_and_the_end_are_the_tokenizers_own(
    tmp_path: Path,
    special: Sequence[str],
    processor: Callable[[Library], Any] | None,
    asked: tuple[str | None, str | None],
    expected: tuple[str, str],
) -> None:
    library = byte_level(*special)
    if processor is not None:
        library.post_processor = processor(library)
    tokenizer = loaded(tmp_path, library, *asked)
    assert tokenizer.names == expected
    assert (tokenizer.bos, tokenizer.eos) == tuple(map(library.token_to_id, expected))
    bos, eos = (f"{name} ({library.token_to_id(name)})" for name in expected)
    ends = f"BOS and EOS {eos}" if bos == eos else f"BOS {bos}, EOS {eos}"
    assert describe(tokenizer) == f"{tokenizer.vocab_size} tokens, {ends}"


def test_a_word_is_not_taken_for_the_beginning(tmp_path: Path) -> None:
    """`<s>` that a vocabulary learnt from HTML is text."""
    library = Library(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))  # noqa: S106
    library.add_special_tokens(["</s>"])
    tokenizer = loaded(tmp_path, library)
    assert (tokenizer.bos, tokenizer.eos) == (1, 1)
    assert [ids.tolist() for ids in tokenizer.encode(["<s>"])] == [[0]]


def test_a_directory_stands_for_the_tokenizer_in_it(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level())
    assert huggingface_tokenizer(str(tmp_path)).fingerprint == huggingface_tokenizer(path).fingerprint


def test_two_ids_in_each_others_place_are_another_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path, byte_level())
    before = huggingface_tokenizer(path).fingerprint
    content = json.loads(Path(path).read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    Path(path).write_text(json.dumps(content))
    assert huggingface_tokenizer(path).fingerprint != before
