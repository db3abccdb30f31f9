"""Tokenizers by the library `sentencepiece`: from a `.model` file, with the tokens that a directory adds to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.document import Ids
from fnrecipe.data.panics import mute
from fnrecipe.data.token_ends import check_no_ends, choose_ends
from fnrecipe.data.token_spans import Spans, encode_each
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.data.tokenizer_file import read_bytes
from fnrecipe.data.tokenizer_folder import ends_in_folder, in_folder, tokens_beyond
from fnrecipe.errors import UsageError, one_line

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "▁"


def sentencepiece_tokenizer(path: str, eos_token: str | None = None, bos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a SentencePiece model, or of the `tokenizer.model` in a directory and what that adds to it.

    Control tokens and added ones are never made of text; user-defined ones are, as the library does. Without `eos_token` and
    `bos_token`, documents end and begin with what the directory's other files name, else with the model's own `</s>` and `<s>`.

    Raises:
        UsageError: if the file is no model, a token is not in its vocabulary, or sentencepiece is missing.
    """
    folder, path = in_folder(path, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    data = read_bytes(path)
    inner = _load(data, path)
    size = inner.vocab_size()
    vocab = {inner.id_to_piece(i): i for i in range(size)}
    beyond = tokens_beyond(folder, size)
    vocab |= beyond
    special = {name: i for name, i in vocab.items() if i >= size or inner.is_control(i)}
    (first, last), own = ends_in_folder(folder, vocab), [inner.bos_id(), inner.eos_id()]
    bos_own, eos_own = ([inner.id_to_piece(i)] if 0 <= i < size else [] for i in own)
    likely = {"before": [*first, *bos_own], "behind": [*last, *eos_own]}
    ends = choose_ends(vocab, special, path, asked=(bos_token, eos_token), **likely)
    special |= {name: vocab[name] for name in ends}
    silent = set(special.values())

    def encode(texts: Sequence[str]) -> list[Ids]:
        ids = [np.array(found, np.int32) for found in inner.encode(list(texts))]
        check_no_ends(texts, ids, {vocab[name]: name for name in ends}, path)
        return ids

    def decode(ids: Sequence[int]) -> str:
        return str(inner.decode([int(i) for i in ids if i not in silent]))

    sizes = _sizes(inner, size + len(beyond), silent)
    told = repr(sorted(beyond.items())).encode() if beyond else b""
    return Tokenizer(
        len(sizes),
        vocab[ends[0]],
        vocab[ends[1]],
        encode,
        decode,
        sizes,
        _byte_counter(inner, sizes),
        hashlib.sha256(b"sentencepiece\0" + told + data).hexdigest()[:16],
        partial(encode_each, encode=encode, spans=lambda text, ids: _spans(inner, text), special=special),
        special,
        ends,
    )


def _load(data: bytes, path: str) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        found = "reading a SentencePiece model needs sentencepiece: pip install 'fnrecipe[sentencepiece]'"
        raise UsageError(f"{path}: {found}") from None
    try:
        with mute():
            inner = SentencePieceProcessor(model_proto=data)
            inner.encode("a text")
            inner.id_to_piece(list(range(inner.vocab_size())))
    except Exception as error:
        raise UsageError(one_line(f"tokenizer.path: {path} is not a SentencePiece model: {error}")) from None
    return inner


def _sizes(inner: SentencePieceProcessor, size: int, silent: Collection[int]) -> NDArray[np.int64]:
    """The bytes of text that each token stands for, int64 [size]: `▁` for a space, `<0x0A>` for a byte, nothing for unknown."""
    sizes = np.zeros(size, np.int64)
    for i in range(inner.vocab_size()):
        if not (i in silent or inner.is_unknown(i) or inner.is_unused(i)):
            sizes[i] = 1 if inner.is_byte(i) else len(inner.id_to_piece(i).replace(_SPACE, " ").encode())
    return sizes


def _spans(inner: SentencePieceProcessor, text: str) -> Spans:
    found = inner.encode_as_offset_mapping(text)
    spans = np.array(found["offsets"], np.int64).reshape(-1, 2)
    # Of the bytes of a character the library gives all but the last an empty span, at the character's beginning.
    bytes_ = np.array([inner.is_byte(i) for i in found["ids"]], bool)
    spans[:, 1] = np.where(bytes_, np.maximum(spans[:, 1], spans[:, 0] + 1), spans[:, 1])
    return spans


def _byte_counter(inner: SentencePieceProcessor, sizes: NDArray[np.int64]) -> Callable[[str, Ids], int]:
    """(text, its ids) -> the bytes of the text that its ids stand for.

    A sum of the tokens' bytes that is that of the text, and of a space put before it, shows that nothing is lost. Any other
    text is encoded once more, for the parts of it that its tokens come from; the unknown token's part is lost.
    """
    before = int(sizes[inner.encode("x")].sum()) - 1

    def count(text: str, ids: Ids) -> int:
        size = len(text.encode())
        if int(sizes[ids].sum()) == size + before and not (before and text[:1].isspace()):
            return size
        known, spans = sizes[ids] > 0, _spans(inner, text)
        return sum(len(text[first:last].encode()) for first, last in np.unique(spans[known], axis=0).tolist())

    return count
