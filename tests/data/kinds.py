"""Kinds of tokenizers, as real files are made, each with the part of a text that its tokens stand for, known by other means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS, UNKNOWN = "<eos>", "<unk>"
CORPUS = ["the quick brown fox", "def add(a, b):\n    return a + b\n", "größe straße the the", "ab ab abba baa"] * 5
KNOWN = "abcdefghijklmnopqrstuvwxyz ö"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = [
    *"abt ",
    "  ",
    "ö",
    "é",
    "e\u0301",
    "e\u0302\u0301",
    "ｶ\uff9e",
    "\u1112\u1161\u11ab",
    "\u0301",
    "東",
    "🙂",
    "\n",
    "Q",
    "½",
    "ﬁ",
    "▁",
    "<eos>",
    "##",
    " the",
    "größe",
]


@attrs.frozen
class Kind:
    """`make()` gives a tokenizer; `kept(text)`, the characters of a text that its tokens stand for."""

    make: Callable[[], Tokenizer]
    kept: Callable[[str], str]


def byte_level(*special: str, prefix: bool = False, normalizer: Any = None) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    if normalizer is not None:
        found.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special or [EOS]), initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    return found


def clip() -> Tokenizer:
    """CLIP's: words end with a mark of their own."""
    found = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=[EOS], end_of_word_suffix="</w>", show_progress=False)
    found.train_from_iterator(["".join(KNOWN.split()), *"".join(KNOWN.split()), "the ab ab"], trainer)
    return found


def llama() -> Tokenizer:
    """Llama 2's: spaces are written as marks by a normalizer, which puts one before the text; unknown characters are bytes."""
    vocab = {
        name: number for number, name in enumerate([UNKNOWN, "<s>", EOS, *BYTES, "▁", *KNOWN.replace(" ", ""), "ab", "▁the"])
    }
    merges = [("a", "b")]
    found = Tokenizer(models.BPE(vocab, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens([UNKNOWN, "<s>", EOS])
    return found


def unigram(*, by_bytes: bool, normalizer: Any = None) -> Tokenizer:
    names = [UNKNOWN, "<s>", EOS, *(BYTES if by_bytes else []), "▁", "▁the", *KNOWN.replace(" ", "")]
    vocab = [(name, 0.0 if name.startswith("<") else -float(8 - len(name))) for name in names]
    found = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=by_bytes))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if normalizer is not None:
        found.normalizer = normalizer
    found.add_special_tokens([UNKNOWN, "<s>", EOS])
    return found


def word_piece() -> Tokenizer:
    letters = KNOWN.replace(" ", "")
    names = [UNKNOWN, "[CLS]", "[SEP]", "the", *letters, *(f"##{letter}" for letter in letters)]
    found = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token=UNKNOWN))
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens([UNKNOWN, "[CLS]", "[SEP]"])
    return found


def word_level(*words: str, unk: str = UNKNOWN) -> Tokenizer:
    vocab = {name: number for number, name in enumerate([EOS, unk, *words])}
    found = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


def dropping() -> Tokenizer:
    """A BPE that drops in silence the characters that it does not know."""
    found = Tokenizer(models.BPE({name: number for number, name in enumerate([EOS, *KNOWN, "ab"])}, [("a", "b")]))
    found.add_special_tokens([EOS])
    return found


def with_added() -> Tokenizer:
    found = byte_level()
    found.add_tokens([AddedToken("größe"), AddedToken(" the", normalized=False)])
    return found


def known(text: str, characters: str = KNOWN) -> str:
    return "".join(character for character in text if character in characters)


def known_words(text: str) -> str:
    """A word may begin as the rest of another, ##a: that is a name, too."""
    words = [(word, word.lower().removeprefix("##")) for word in text.split()]
    return "".join(word for word, letters in words if letters and not set(letters) - set(KNOWN))


KINDS = {
    "byte level": Kind(byte_level, lambda text: text),
    "byte level with tokens added": Kind(with_added, lambda text: text),
    "byte level after a space": Kind(lambda: byte_level(prefix=True), lambda text: text),
    "byte level after NFC": Kind(lambda: byte_level(normalizer=normalizers.NFC()), lambda text: text),
    "byte level after NFKC in lower case": Kind(
        lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])), lambda text: text
    ),
    "byte level, stripped": Kind(lambda: byte_level(normalizer=normalizers.Strip()), str.strip),
    "ends of words": Kind(clip, lambda text: known("".join(text.split()))),
    "Llama 2's": Kind(llama, lambda text: text),
    "Unigram with bytes": Kind(lambda: unigram(by_bytes=True), lambda text: text),
    "Unigram": Kind(lambda: unigram(by_bytes=False), lambda text: known(text, KNOWN + "▁")),
    "WordPiece": Kind(word_piece, known_words),
    "WordLevel": Kind(
        lambda: word_level("ab", "größe", "東"), lambda text: "".join(re.findall(r"(?<!\S)(?:ab|größe|東)(?!\S)", text))
    ),
    "BPE that drops": Kind(dropping, known),
}


def save(folder: Path, found: Tokenizer) -> str:
    path = folder / "tokenizer.json"
    found.save(str(path))
    return str(path)
