"""Tokenizers by the library `tokenizers`: loaded from a `tokenizer.json`, or trained."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import orjson

from fnrecipe.data.document import Ids
from fnrecipe.data.token_bytes import byte_counter, bytes_by_token
from fnrecipe.data.tokenizer import END_OF_TEXT, Tokenizer
from fnrecipe.data.tokenizer_file import Content, added_tokens, closed, ends, hidden_name, read, silent_tokens, vocabulary
from fnrecipe.errors import DataError, UsageError, did_you_mean, one_line

if TYPE_CHECKING:
    import tokenizers

_BOS = ("<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<s>", "<bos>", "[BOS]", "[CLS]")
_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|eos|>", "[EOS]", "[SEP]")


def huggingface_tokenizer(path: str, eos_token: str | None = None, bos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face `tokenizer.json`, or of the one in a directory.

    Without `eos_token`, documents end with the token that the file's own post-processor puts behind a text, else with a token
    of a common name. Without `bos_token`, they begin with the token that it puts before a text, else with an added token of a
    common name, else with the token that ends them.

    Raises:
        UsageError: if the file is missing or not a tokenizer, or a token is not in its vocabulary.
    """
    path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    content = read(path)
    vocab = vocabulary(content, path)
    if content["model"].get("dropout"):
        raise UsageError(f"tokenizer.path: {path}: expected no dropout, by which a text has other tokens every time")
    bos_name, eos_name = _names_of_ends(content, vocab, path, bos_token, eos_token)
    silent = silent_tokens(content, {bos_name, eos_name})
    inner, fingerprint = _load(content, silent, vocab, path)
    bos, eos = vocab[bos_name], vocab[eos_name]

    def encode(texts: Sequence[str]) -> list[Ids]:
        ids = [np.frombuffer(array("I", e.ids), np.uint32).view(np.int32) for e in _encode(inner, list(texts), path)]
        flat = np.concatenate([np.empty(0, np.int32), *ids])
        if ((flat == bos) | (flat == eos)).any():
            raise _end_in_text(texts, ids, {bos: bos_name, eos: eos_name}, path)
        return ids

    def decode(ids: Sequence[int]) -> str:
        return str(inner.decode(list(ids)))

    sizes = bytes_by_token(content, vocab, silent)
    counter = byte_counter(inner, content, sizes)
    return Tokenizer(len(sizes), bos, eos, encode, decode, sizes, counter, fingerprint, (bos_name, eos_name))


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


def _names_of_ends(
    content: Content, vocab: Mapping[str, int], path: str, bos_token: str | None, eos_token: str | None
) -> tuple[str, str]:
    """The names of BOS and EOS: as asked for, else those of the post-processor, else common ones."""
    before, behind = ends(content.get("post_processor"))
    added = {token["content"] for token in added_tokens(content)}
    bos_likely = [*before, *(name for name in _BOS if name in added)]
    eos_likely = [*reversed(behind), *(name for name in _EOS if name in added), *_EOS]
    eos = next((name for name in eos_likely if name in vocab), None) if eos_token is None else eos_token
    if eos is None:
        raise _missing("eos_token", "a common end-of-text token", END_OF_TEXT, vocab, path)
    bos = next((name for name in bos_likely if name in vocab), eos) if bos_token is None else bos_token
    for key, name in {"eos_token": eos, "bos_token": bos}.items():
        if name not in vocab:
            raise _missing(key, f"the token {name!r}", name, vocab, path)
    return bos, eos


def _missing(key: str, expected: str, name: str, vocab: Iterable[str], path: str) -> UsageError:
    hint = did_you_mean(name, [token for token in vocab if token[:1] + token[-1:] in ("<>", "[]")])
    return UsageError(one_line(f"tokenizer.{key}: expected {expected} in {path}, found none; {hint}".removesuffix("; ")))


def _load(content: Content, silent: Collection[str], vocab: dict[str, int], path: str) -> tuple[tokenizers.Tokenizer, str]:
    """The library's tokenizer of `content` without its `silent` tokens, and its fingerprint.

    It encodes a text once, because the library checks some parts only then.
    """
    import tokenizers

    try:
        data = orjson.dumps(closed(content, silent, vocab))
        with _mute():
            inner = tokenizers.Tokenizer.from_buffer(data)
            inner.encode_special_tokens = True
            with suppress(Exception):  # an unknown token, say, which depends on the text
                inner.encode("a text")
    except BaseException as error:
        if _is_ours(error):
            raise
        raise UsageError(one_line(f"tokenizer.path: {path} is not a tokenizer.json: {error}")) from None
    for name in (token["content"] for token in added_tokens(content)):
        if inner.token_to_id(hidden_name(name) if name in silent else name) != vocab[name]:
            expected = f"expected added tokens with ids that follow those before them, found {vocab[name]} for {name!r}"
            raise UsageError(f"tokenizer.path: {path}: {expected}")
    return inner, hashlib.sha256(data).hexdigest()[:16]


def _encode(inner: tokenizers.Tokenizer, texts: list[str], path: str) -> list[tokenizers.Encoding]:
    """The library's encodings of `texts`; if that fails, one by one, to name the text that cannot be encoded."""
    try:
        # No offsets, in 0.75 of the time of `encode_batch`, with the same ids.
        found = inner.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        if _is_ours(error):
            raise
        if len(texts) > 1:
            return [encoding for text in texts for encoding in _encode(inner, [text], path)]
        raise DataError(one_line(f"tokenizer.path: {path} cannot encode the text {texts[0][:80]!r}: {error}")) from None
    return found


def _end_in_text(texts: Sequence[str], ids: Sequence[Ids], names: Mapping[int, str], path: str) -> DataError:
    text, end = next((text, i) for text, found in zip(texts, ids, strict=True) for i in found.tolist() if i in names)
    what = f"found {names[end]!r} ({end}), which begins or ends documents, in {text[:80]!r}"
    return DataError(f"tokenizer.path: {path}: expected text to become ordinary tokens, {what}; set tokenizer.eos_token")


def _is_ours(error: BaseException) -> bool:
    """Whether an error is not the library's, which raises bare Exceptions, and panics, whose class cannot be imported."""
    return not isinstance(error, Exception) and type(error).__name__ != "PanicException"


@contextmanager
def _mute() -> Iterator[None]:
    """Redirects standard error to nowhere: the library prints a panic there before it can be caught."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
