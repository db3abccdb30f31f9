"""Tokenizers as values of a few functions, from text to ids and back; text never encodes to a special token."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.document import Document, Ids
from fnrecipe.data.stream import Cursor, Source, Stream, map_chunks
from fnrecipe.data.token_spans import Encoded, Piece, byte_spans, encode_each
from fnrecipe.errors import one_line

END_OF_TEXT = "<|endoftext|>"
_CHUNK = 64
_log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Tokenizer:
    """`encode` maps texts to id arrays without any special token.

    bos, eos      the tokens that begin and end a document; the same token if a vocabulary has only one for both
    num_bytes     int64 [vocab_size]: the bytes of text that each token stands for
    count_bytes   (text, its ids) -> the bytes of the text that the ids stand for: without dropped and unknown characters
    fingerprint   different for tokenizers whose `encode` may differ
    encode_pieces (texts and special tokens) -> their ids, and where in them each token's characters are: for chats
    special       the tokens that text never becomes, by their names; those of `bos` and `eos` among them
    names         the names of `bos` and `eos`
    answer_ends   the tokens that end what a model says: `eos`, and what a chat template writes behind an answer
    """

    vocab_size: int
    bos: int
    eos: int
    encode: Callable[[Sequence[str]], list[Ids]]
    decode: Callable[[Sequence[int]], str]
    num_bytes: NDArray[np.int64]
    count_bytes: Callable[[str, Ids], int]
    fingerprint: str
    encode_pieces: Callable[[Sequence[Piece]], Encoded]
    special: Mapping[str, int]
    names: tuple[str, str] = (END_OF_TEXT, END_OF_TEXT)
    answer_ends: frozenset[int] = attrs.field(default=attrs.Factory(lambda self: frozenset({self.eos}), takes_self=True))


@attrs.frozen(eq=False)
class Tokens:
    """A document or a piece of one.

    ids        int32 [n]
    num_bytes  bytes of the text that its predictions stand for, of which there are n - 1, or as many as `trained` leaves
    source     index of its source
    epoch      how many times that source had been read before
    lost       bytes of a document's text that no token stands for
    trained    bool [n]: the tokens whose prediction is trained; None: all
    place      says where the document is (`Document.place`)
    """

    ids: Ids
    num_bytes: int
    source: int = 0
    epoch: int = 0
    lost: int = 0
    trained: NDArray[np.bool_] | None = None
    place: Callable[[], str] | None = None


def byte_tokenizer() -> Tokenizer:
    """One token a byte of UTF-8; 256 begins and ends a document."""

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    sizes, special = np.array([1] * 256 + [0]), {END_OF_TEXT: 256}
    pieces = partial(encode_each, encode=encode, spans=partial(byte_spans, num_bytes=sizes), special=special)
    return Tokenizer(257, 256, 256, encode, decode, sizes, lambda _, ids: len(ids), "byte", pieces, special)


def describe(tokenizer: Tokenizer) -> str:
    """`32,000 tokens, BOS <s> (1), EOS </s> (2)`."""
    bos, eos = map(one_line, tokenizer.names)
    if tokenizer.bos == tokenizer.eos:
        return f"{tokenizer.vocab_size:,} tokens, BOS and EOS {eos} ({tokenizer.eos})"
    return f"{tokenizer.vocab_size:,} tokens, BOS {bos} ({tokenizer.bos}), EOS {eos} ({tokenizer.eos})"


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, in which special tokens stand by their names."""
    names = {number: name for name, number in tokenizer.special.items()}
    runs = groupby(ids, lambda number: number in names)
    return "".join("".join(names[i] for i in run) if special else tokenizer.decode(list(run)) for special, run in runs)


def tokenize(
    documents: Sequence[Document],
    *,
    tokenizer: Tokenizer,
    add_bos: bool = True,
    add_eos: bool = True,
    source: int = 0,
    epoch: int = 0,
) -> list[Tokens]:
    """Each document's ids between BOS, from which its first token is predicted, and EOS."""
    bos, eos = (np.array([token], np.int32) for token in (tokenizer.bos, tokenizer.eos))
    before, after = [bos] * add_bos, [eos] * add_eos
    encoded = iter(tokenizer.encode([document.text or "" for document in documents if document.ids is None]))
    found = []
    for document in documents:
        ids = next(encoded) if document.ids is None else document.ids
        if document.text is None:
            kept = size = int(tokenizer.num_bytes[ids].sum())
        else:
            kept, size = tokenizer.count_bytes(document.text, ids), len(document.text.encode())
        unpredicted = 0 if add_bos else int(tokenizer.num_bytes[ids[:1]].sum())
        full = np.concatenate([*before, ids, *after])
        found.append(Tokens(full, max(kept - unpredicted, 0), source, epoch, size - kept, place=document.place))
    return found


def tokenized(
    source: Source[Document],
    cursor: Cursor = None,
    *,
    tokenizer: Tokenizer,
    name: str,
    number: int = 0,
    epoch: int = 0,
    add_bos: bool = True,
    add_eos: bool = True,
) -> Stream[Tokens]:
    """The documents of the source called `name` as tokens; warns about the first chunk that loses some of its text."""
    encode = partial(tokenize, tokenizer=tokenizer, add_bos=add_bos, add_eos=add_eos, source=number, epoch=epoch)
    told = False

    def encode_and_tell(documents: Sequence[Document]) -> list[Tokens]:
        nonlocal told
        found = encode(documents)
        if not told and any(tokens.lost for tokens in found):
            told = True
            size = sum(len(document.text.encode()) for document in documents if document.text is not None)
            _log.warning("%s", loss(name, sum(tokens.lost for tokens in found), size), extra={"once": f"loss of {name}"})
        return found

    return map_chunks(source, cursor, size=_CHUNK, function=encode_and_tell)


def loss(name: str, lost: int, size: int) -> str:
    """The warning about a source of which `lost` of `size` bytes are in no token."""
    share = f"{100 * lost / size:.2g} % of the text ({lost:,} of {size:,} bytes)"
    return f"{name}: the tokenizer loses {share}: characters that it drops or does not know; bits per byte do not count them"
