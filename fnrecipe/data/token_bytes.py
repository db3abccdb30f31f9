"""How many bytes of text tokens stand for: by a table of tokens, or by offsets where the table is not enough.

A byte of text counts if its character went into a token other than the unknown one. A character that a normalizer changes
counts with its bytes in the text; one that the normalizer, a pre-tokenizer or the model drops does not count.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import orjson
from numpy.typing import NDArray

from fnrecipe.data.document import Ids
from fnrecipe.data.tokenizer_file import BYTE, Content, added_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

_SPACE, _LONGEST = "▁", 4


def bytes_by_token(content: Content, vocab: Mapping[str, int], silent: Collection[str]) -> NDArray[np.int64]:
    """The bytes that each token stands for by its name, int64 [largest id + 1]: 0 for `silent` tokens and the unknown one.

    In a byte-level vocabulary a character stands for one byte, else for its UTF-8; `<0x0A>` for one byte; `▁` for a space if
    the tokenizer writes spaces so. The marks for the inside or the end of a word stand for nothing.
    """
    model, parts = content["model"], _parts(content, "normalizer", "pre_tokenizer", "decoder")
    byte_level, marked, by_bytes = b'"ByteLevel"' in parts, _SPACE.encode() in parts, bool(model.get("byte_fallback"))
    inside, end = _mark(model, "continuing_subword_prefix"), _mark(model, "end_of_word_suffix")
    added = {token["content"] for token in added_tokens(content)}
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    for token, number in vocab.items():
        if token in silent:
            continue
        if token in added:
            sizes[number] = len(token.encode())
        elif by_bytes and BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            text = token.removeprefix(inside).removesuffix(end)
            sizes[number] = len(text) if byte_level else len((text.replace(_SPACE, " ") if marked else text).encode())
    sizes[_unknown(content, vocab)] = 0
    return sizes


def byte_counter(inner: Tokenizer, content: Content, sizes: NDArray[np.int64]) -> Callable[[str, Ids], int]:
    """(text, its ids) -> the bytes of the text that its ids stand for."""
    # Where the tokenizer changes nothing, the table is exact. Otherwise it can only prove that nothing is lost, by a sum equal
    # to the size of the text (and of a space that the tokenizer puts before it). Any other text is encoded once more, by the
    # slower call that computes offsets.
    parts = _parts(content, "normalizer", "pre_tokenizer")
    before = _put_before(inner)
    literal = content.get("normalizer") is None and not before and _SPACE.encode() not in parts

    def count(text: str, ids: Ids) -> int:
        found = int(sizes[ids].sum())
        if literal:
            return found
        size = len(text.encode())
        if found == size + before and not (before and text[:1].isspace()):
            return size
        return _stood_for(text, inner, sizes)

    return count


def _mark(model: Content, key: str) -> str:
    """The prefix or suffix by which a model marks tokens inside a word, or at its end."""
    found = model.get(key)
    return found if isinstance(found, str) else ""


def _parts(content: Content, *names: str) -> bytes:
    return orjson.dumps([content.get(name) for name in names])


def _unknown(content: Content, vocab: Mapping[str, int]) -> list[int]:
    model = content["model"]
    number = model.get("unk_id") if isinstance(model["vocab"], list) else vocab.get(model.get("unk_token") or "")
    return [] if number is None else [number]


def _put_before(inner: Tokenizer) -> int:
    """How many characters the tokenizer puts before a text that does not begin with white space: one space, or none."""
    with suppress(Exception):  # a tokenizer may be unable to encode this text
        text = inner.normalizer.normalize_str("x") if inner.normalizer else "x"
        pieces = inner.pre_tokenizer.pre_tokenize_str(text) if inner.pre_tokenizer else [(text, (0, 1))]
        return sum(len(piece) for piece, _ in pieces) - 1
    return 0


def _stood_for(text: str, inner: Tokenizer, sizes: NDArray[np.int64]) -> int:
    """The bytes of the characters of `text` that went into known tokens only, those of a size above 0."""
    # `edges` marks where the spans of unknown (row 0) and known (row 1) tokens begin and end; its running sum is the number of
    # spans over each character.
    encoding = inner.encode(text, add_special_tokens=False)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    known = (sizes[np.array(encoding.ids, np.int64)] > 0).astype(np.int64)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    edges = np.zeros((2, len(points) + 1), np.int64)
    np.add.at(edges, (known, spans[:, 0]), 1)
    np.add.at(edges, (known, spans[:, 1]), -1)
    in_unknown, in_known = edges.cumsum(1)[:, :-1] > 0
    found = in_known & ~in_unknown
    if inner.normalizer is not None:
        for place in np.flatnonzero(~in_known & ~in_unknown).tolist():
            found[place] = _is_merged(text, place, found, inner.normalizer)
    return int(widths[found].sum())


def _is_merged(text: str, place: int, found: NDArray[np.bool_], normalizer: Normalizer) -> bool:
    """Whether a normalizer merges a character without a token into the ones before it, as NFC does with an accent."""
    if not place or not found[place - 1]:
        return False
    before = text[max(place - _LONGEST, 0) : place]
    accent = unicodedata.combining(text[place]) or _adds_nothing(before, text[place], partial(unicodedata.normalize, "NFKC"))
    return bool(accent) and _adds_nothing(before, text[place], normalizer.normalize_str)


def _adds_nothing(before: str, character: str, normalize: Callable[[str], str]) -> bool:
    return len(normalize(before + character)) <= len(normalize(before))
