"""How many bytes of text tokens stand for: by a table, and by where they come from where the table cannot say it.

A byte of a text is stood for if its character went into a token other than the unknown one. What a normalizer changes counts
as it stands in the text; what it, a pre-tokenizer or the model drops does not count, and neither does the unknown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from fnrecipe.data.document import Ids
from fnrecipe.data.tokenizer_file import BYTE, Content, added_tokens

_SPACE, _LONGEST = "▁", 4


def bytes_by_token(content: Content, vocab: Mapping[str, int], silent: Collection[str]) -> NDArray[np.int64]:
    """The bytes that each token stands for by its name, int64 [largest id + 1]: 0 for `silent` tokens and the unknown one.

    In a byte-level vocabulary a character stands for a byte, else for its own; `<0x0A>` for one; `▁` for a space where the
    tokenizer writes spaces so. What marks the inside or the end of a word stands for nothing.
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


def byte_counter(inner: Any, content: Content, sizes: NDArray[np.int64]) -> Callable[[str, Ids], int]:
    """(text, its ids) -> the bytes of the text that its ids stand for.

    Where tokens are made of the text as it stands, they add up by the table. Otherwise the table proves only that nothing is
    lost, by the size of the whole text (and of a space that the tokenizer puts before it): what does not add up is encoded once
    more, by the slower call that tells where in the text each token comes from.
    """
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
    """What stands before or behind the tokens of a model inside a word, or at its end."""
    found = model.get(key)
    return found if isinstance(found, str) else ""


def _parts(content: Content, *names: str) -> bytes:
    return orjson.dumps([content.get(name) for name in names])


def _unknown(content: Content, vocab: Mapping[str, int]) -> list[int]:
    model = content["model"]
    number = model.get("unk_id") if isinstance(model["vocab"], list) else vocab.get(model.get("unk_token") or "")
    return [] if number is None else [number]


def _put_before(inner: Any) -> int:
    """How many characters a tokenizer puts before a text that does not begin with white space: a space, or nothing."""
    with suppress(Exception):  # of a tokenizer that cannot encode this text
        text = inner.normalizer.normalize_str("x") if inner.normalizer else "x"
        pieces = inner.pre_tokenizer.pre_tokenize_str(text) if inner.pre_tokenizer else [(text, (0, 1))]
        return sum(len(piece) for piece, _ in pieces) - 1
    return 0


def _stood_for(text: str, inner: Any, sizes: NDArray[np.int64]) -> int:
    """The bytes of the characters of `text` that went into a token that stands for some, and into none that stands for none."""
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


def _is_merged(text: str, place: int, found: NDArray[np.bool_], normalizer: Any) -> bool:
    """Whether a normalizer puts a character that no token comes from into the ones before it, as NFC does with an accent."""
    if not place or not found[place - 1]:
        return False
    before = text[max(place - _LONGEST, 0) : place]
    accent = unicodedata.combining(text[place]) or _adds_nothing(before, text[place], partial(unicodedata.normalize, "NFKC"))
    return bool(accent) and _adds_nothing(before, text[place], normalizer.normalize_str)


def _adds_nothing(before: str, character: str, normalize: Callable[[str], str]) -> bool:
    return len(normalize(before + character)) <= len(normalize(before))
