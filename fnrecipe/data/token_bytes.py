"""How many bytes of text tokens stand for: by a table, and by where they come from where the table cannot say it.

A byte of a text is stood for if its character went into a token other than the unknown one. What a normalizer changes counts
as it stands in the text; what it, a pre-tokenizer or the model drops does not count, and neither does the unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from fnrecipe.data.document import Ids
from fnrecipe.data.tokenizer_file import BYTE, Content, added_tokens

_SPACE = "▁"


def bytes_by_token(content: Content, vocab: Mapping[str, int], silent: Collection[str]) -> NDArray[np.int64]:
    """The bytes that each token stands for by its name, int64 [largest id + 1]: 0 for `silent` tokens and the unknown one.

    In a byte-level vocabulary a character stands for a byte, else for its own; `<0x0A>` for one; `▁` for a space where the
    tokenizer writes spaces so. What marks the inside or the end of a word stands for nothing.
    """
    model, parts = content["model"], _parts(content, "normalizer", "pre_tokenizer", "decoder")
    byte_level, marked, by_bytes = b'"ByteLevel"' in parts, _SPACE.encode() in parts, bool(model.get("byte_fallback"))
    inside, end = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
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
        return _covered(text, inner.encode(text, add_special_tokens=False), sizes)

    return count


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


def _covered(text: str, encoding: Any, sizes: NDArray[np.int64]) -> int:
    """The bytes of the characters of `text` that went into a token that stands for some, and into none that stands for none."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    edges = np.zeros((2, len(points) + 1), np.int64)
    known = (sizes[encoding.ids] > 0).astype(np.int64) if len(spans) else np.zeros(0, np.int64)
    np.add.at(edges, (known, spans[:, 0]), 1)
    np.add.at(edges, (known, spans[:, 1]), -1)
    unknown, stood_for = edges.cumsum(1)[:, :-1] > 0
    return int(widths[stood_for & ~unknown].sum())
