"""Text to token ids and back. A tokenizer is a value of two functions; no special token is ever read out of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.errors import UsageError, did_you_mean

Ids = NDArray[np.int32]

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


@attrs.frozen
class Tokenizer:
    """`encode` maps texts to id arrays without any special token; `eos` ends (and begins) a document."""

    vocab_size: int
    eos: int
    encode: Callable[[Sequence[str]], list[Ids]]
    decode: Callable[[Sequence[int]], str]


@attrs.frozen(eq=False)
class Tokens:
    """Ids of a document or of a piece of one, int32 [n]; and how many bytes of text its n - 1 predictions stand for."""

    ids: Ids
    num_bytes: int


def byte_tokenizer() -> Tokenizer:
    """One token a byte of UTF-8; 256 ends a document."""

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    return Tokenizer(257, 256, encode, decode)


def huggingface_tokenizer(path: str, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face `tokenizer.json`; without `eos_token`, its end-of-text token is found by name.

    Raises:
        UsageError: if the file is missing or not a tokenizer, or the end-of-text token is not in its vocabulary.
    """
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"tokenizer.path: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception for a file that is not a tokenizer
        raise UsageError(f"tokenizer.path: {path} is not a tokenizer.json: {error}") from None
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    vocab = inner.get_vocab()
    eos = _end_of_text(vocab, path, eos_token)

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.array(e.ids, np.int32) for e in inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(ids: Sequence[int]) -> str:
        return str(inner.decode(list(ids)))

    return Tokenizer(max(vocab.values()) + 1, eos, encode, decode)


def tokenize(texts: Sequence[str], *, tokenizer: Tokenizer) -> list[Tokens]:
    """Each text between two end-of-text tokens: the first gives its first token something to be predicted from."""
    bounds = np.array([tokenizer.eos], np.int32)
    ids = tokenizer.encode(texts)
    return [Tokens(np.concatenate([bounds, i, bounds]), len(t.encode())) for i, t in zip(ids, texts, strict=True)]


def _end_of_text(vocab: dict[str, int], path: str, name: str | None) -> int:
    found = [token for token in ([name] if name else _END_OF_TEXT) if token in vocab]
    if not found:
        special = [token for token in vocab if token.startswith("<") and token.endswith(">")]
        expected = f"the token {name!r}" if name else "a common end-of-text token"
        hint = did_you_mean(name or "<|endoftext|>", special)
        raise UsageError(f"tokenizer.eos_token: expected {expected} in {path}, found none; {hint}".removesuffix("; "))
    return vocab[found[0]]
