"""Text to token ids and back. A tokenizer is a value of two functions; no special token is ever read out of text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.document import Document, Ids
from fnrecipe.errors import UsageError, did_you_mean

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")


@attrs.frozen(eq=False)
class Tokenizer:
    """`encode` maps texts to id arrays without any special token.

    bos, eos      the tokens that begin and end a document; the same one where a vocabulary has only one for both
    num_bytes     int64 [vocab_size]: the bytes of text that each token stands for
    fingerprint   differs where `encode` may
    """

    vocab_size: int
    bos: int
    eos: int
    encode: Callable[[Sequence[str]], list[Ids]]
    decode: Callable[[Sequence[int]], str]
    num_bytes: NDArray[np.int64]
    fingerprint: str


@attrs.frozen(eq=False)
class Tokens:
    """A document or a piece of one.

    ids        int32 [n]
    num_bytes  of the text that its n - 1 predictions stand for
    source     number of the source that it comes from
    epoch      how often that source had been read through before
    """

    ids: Ids
    num_bytes: int
    source: int = 0
    epoch: int = 0


def byte_tokenizer() -> Tokenizer:
    """One token a byte of UTF-8; 256 begins and ends a document."""

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    return Tokenizer(257, 256, 256, encode, decode, np.array([1] * 256 + [0]), "byte")


def huggingface_tokenizer(path: str, eos_token: str | None = None, bos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face `tokenizer.json`.

    Without `eos_token`, its end-of-text token is found by name; without `bos_token`, that token also begins documents.

    Raises:
        UsageError: if the file is missing or not a tokenizer, or a token is not in its vocabulary.
    """
    import tokenizers

    try:
        content = Path(path).read_text(encoding="utf-8")
        inner = tokenizers.Tokenizer.from_str(content)
    except OSError as error:
        raise UsageError(f"tokenizer.path: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception for a file that is not a tokenizer
        raise UsageError(f"tokenizer.path: {path} is not a tokenizer.json: {error}") from None
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    vocab = inner.get_vocab()
    eos = _find("eos_token", vocab, path, [eos_token] if eos_token else _END_OF_TEXT)
    bos = _find("bos_token", vocab, path, [bos_token]) if bos_token else eos

    def encode(texts: Sequence[str]) -> list[Ids]:
        found = inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.frombuffer(array("I", e.ids), np.uint32).view(np.int32) for e in found]

    def decode(ids: Sequence[int]) -> str:
        return str(inner.decode(list(ids)))

    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Tokenizer(max(vocab.values()) + 1, bos, eos, encode, decode, _num_bytes(inner, vocab), digest)


def tokenize(
    documents: Sequence[Document],
    *,
    tokenizer: Tokenizer,
    add_bos: bool = True,
    add_eos: bool = True,
    source: int = 0,
    epoch: int = 0,
) -> list[Tokens]:
    """Each document's ids between the tokens that begin and end it: from the first, its first token can be predicted."""
    bos, eos = (np.array([token], np.int32) for token in (tokenizer.bos, tokenizer.eos))
    before, after = [bos] * add_bos, [eos] * add_eos
    encoded = iter(tokenizer.encode([document.text or "" for document in documents if document.ids is None]))
    found = []
    for document in documents:
        ids = next(encoded) if document.ids is None else document.ids
        predicted = ids if add_bos else ids[1:]
        if document.text is not None and add_bos:
            num_bytes = len(document.text.encode())
        else:
            num_bytes = int(tokenizer.num_bytes[predicted].sum())
        found.append(Tokens(np.concatenate([*before, ids, *after]), num_bytes, source, epoch))
    return found


def train_bpe(texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str], *, show_progress: bool) -> Any:
    """A byte-level BPE of `tokenizers` for `texts`, with GPT-2's pattern: `save(path)` writes its `tokenizer.json`."""
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


def _find(key: str, vocab: dict[str, int], path: str, names: Sequence[str]) -> int:
    found = [name for name in names if name in vocab]
    if not found:
        special = [token for token in vocab if token.startswith("<") and token.endswith(">")]
        expected = f"the token {names[0]!r}" if len(names) == 1 else "a common end-of-text token"
        hint = did_you_mean(names[0], special)
        raise UsageError(f"tokenizer.{key}: expected {expected} in {path}, found none; {hint}".removesuffix("; "))
    return vocab[found[0]]


def _num_bytes(inner: Any, vocab: dict[str, int]) -> NDArray[np.int64]:
    """Bytes of text by token: in a byte-level vocabulary a character stands for a byte, else for its own, `<0x0A>` for one.

    Special tokens stand for none, other added tokens for what they spell.
    """
    byte_level = "ByteLevel" in str(inner.decoder)
    added = {token.content: token.special for token in inner.get_added_tokens_decoder().values()}
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    for token, number in vocab.items():
        if added.get(token):
            continue
        if byte_level:
            sizes[number] = len(token.encode() if token in added else token)
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace("▁", " ").encode())
    return sizes
