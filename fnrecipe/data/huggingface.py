"""Tokenizers by the library `tokenizers`: loaded from a `tokenizer.json`, or trained."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import orjson

from fnrecipe.data.document import Ids
from fnrecipe.data.panics import encoded, is_ours, mute
from fnrecipe.data.token_bytes import byte_counter, bytes_by_token
from fnrecipe.data.token_ends import check_no_ends, choose_ends
from fnrecipe.data.token_spans import Encoded, Piece
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.data.tokenizer_file import (
    Content,
    added_tokens,
    closed,
    ends,
    hidden_name,
    read,
    silent_tokens,
    vocabulary,
    with_margins,
)
from fnrecipe.data.tokenizer_folder import ends_in_folder, in_folder
from fnrecipe.errors import UsageError, one_line

if TYPE_CHECKING:
    import tokenizers


def huggingface_tokenizer(path: str, eos_token: str | None = None, bos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face `tokenizer.json`, or of the one in a directory.

    Without `eos_token`, documents end with the token that other files of the directory name so, else with the one that the
    file's own post-processor puts behind a text, else with a token of a common name. Without `bos_token`, they begin with
    what those files name, with the token that it puts before a text, or with an added token of a common name, else with the
    token that ends them.

    Raises:
        UsageError: if the file is missing or not a tokenizer, or a token is not in its vocabulary.
    """
    folder, path = in_folder(path, "tokenizer.json")
    content = read(path)
    vocab = vocabulary(content, path)
    if content["model"].get("dropout"):
        raise UsageError(f"tokenizer.path: {path}: expected no dropout, by which a text has other tokens every time")
    added = {token["content"] for token in added_tokens(content)}
    (before, behind), (first, last) = ends(content.get("post_processor")), ends_in_folder(folder, vocab)
    likely = {"before": [*first, *before], "behind": [*last, *reversed(behind)]}
    bos_name, eos_name = choose_ends(vocab, added, path, asked=(bos_token, eos_token), **likely)
    silent = silent_tokens(content, {bos_name, eos_name})
    inner, fingerprint = _load(content, silent, vocab, path)
    bos, eos = vocab[bos_name], vocab[eos_name]
    special = {name: vocab[name] for name in silent}

    def encode(texts: Sequence[str]) -> list[Ids]:
        # Without offsets: in 0.75 of the time of `encode_batch`, with the same ids.
        found = encoded(partial(inner.encode_batch_fast, add_special_tokens=False), list(texts), path)
        ids = [np.frombuffer(array("I", each.ids), np.uint32).view(np.int32) for each in found]
        check_no_ends(texts, ids, {bos: bos_name, eos: eos_name}, path)
        return ids

    def decode(ids: Sequence[int]) -> str:
        return str(inner.decode(list(ids)))

    sizes = bytes_by_token(content, vocab, silent)
    counter = byte_counter(inner, content, sizes)
    pieces = _piece_encoder(inner, added_tokens(content), special, path)
    names = (bos_name, eos_name)
    return Tokenizer(len(sizes), bos, eos, encode, decode, sizes, counter, fingerprint, pieces, special, names)


def train_bpe(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str], *, show_progress: bool
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE on `texts`, with GPT-2's pattern; `save(path)` of the result writes a `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _piece_encoder(
    inner: tokenizers.Tokenizer, added: Sequence[Content], special: Mapping[str, int], path: str
) -> Callable[[Sequence[Piece]], Encoded]:
    """Encodes texts and special tokens at once: what the library puts before a text, say, depends on what it follows.

    In `inner` special tokens have hidden names, which are written for them here, and which no text contains.
    """
    names = {number: name for name, number in special.items()}

    @cache
    def load() -> tokenizers.Tokenizer:  # not before it is needed: it takes as much memory again
        import tokenizers

        return tokenizers.Tokenizer.from_buffer(orjson.dumps(with_margins(orjson.loads(inner.to_str()), added)))

    def encode_pieces(pieces: Sequence[Piece]) -> Encoded:
        written = [piece if isinstance(piece, str) else hidden_name(names[piece]) for piece in pieces]
        shown = [len(piece if isinstance(piece, str) else names[piece]) for piece in pieces]
        places, place = [], 0  # where each written character is shown
        for text, size in zip(written, shown, strict=True):
            places += [place + min(number, size) for number in range(len(text))]
            place += size
        (found,) = encoded(partial(load().encode_batch, add_special_tokens=False), ["".join(written)], path)
        spans = np.array([*places, place], np.int64)[np.array(found.offsets, np.int64).reshape(-1, 2)]
        return Encoded(np.array(found.ids, np.int32), spans)

    return encode_pieces


def _load(content: Content, silent: Collection[str], vocab: dict[str, int], path: str) -> tuple[tokenizers.Tokenizer, str]:
    """The library's tokenizer of `content` without its `silent` tokens, and its fingerprint.

    It encodes a text once, because the library checks some parts only then.
    """
    import tokenizers

    try:
        data = orjson.dumps(closed(content, silent, vocab))
        with mute():
            inner = tokenizers.Tokenizer.from_buffer(data)
            inner.encode_special_tokens = True
            with suppress(Exception):  # an unknown token, say, which depends on the text
                inner.encode("a text")
    except BaseException as error:
        if is_ours(error):
            raise
        raise UsageError(one_line(f"tokenizer.path: {path} is not a tokenizer.json: {error}")) from None
    for name in (token["content"] for token in added_tokens(content)):
        if inner.token_to_id(hidden_name(name) if name in silent else name) != vocab[name]:
            expected = f"expected added tokens with ids that follow those before them, found {vocab[name]} for {name!r}"
            raise UsageError(f"tokenizer.path: {path}: {expected}")
    return inner, hashlib.sha256(data).hexdigest()[:16]
