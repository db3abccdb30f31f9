"""The tokens that begin and end documents: found in a vocabulary by their names, and never made of text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from fnrecipe.data.document import Ids
from fnrecipe.data.tokenizer import END_OF_TEXT
from fnrecipe.errors import DataError, UsageError, did_you_mean, one_line

_BOS = ("<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<s>", "<bos>", "[BOS]", "[CLS]")
_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|eos|>", "[EOS]", "[SEP]")


def choose_ends(
    vocab: Mapping[str, int],
    special: Collection[str],
    path: str,
    *,
    asked: tuple[str | None, str | None],
    before: Sequence[str] = (),
    behind: Sequence[str] = (),
) -> tuple[str, str]:
    """The names of BOS and EOS: those `asked` for, else the first known of `before` and `behind`, else common names.

    A common name begins documents only if it is one of the `special` tokens; without any, the token that ends them does.

    Raises:
        UsageError: if a token that was asked for is not in the vocabulary, or none is found that ends documents.
    """
    bos_token, eos_token = asked
    bos_likely = [*before, *(name for name in _BOS if name in special)]
    eos_likely = [*behind, *(name for name in _EOS if name in special), *_EOS]
    eos = next((name for name in eos_likely if name in vocab), None) if eos_token is None else eos_token
    if eos is None:
        raise _missing("eos_token", "a common end-of-text token", END_OF_TEXT, vocab, path)
    bos = next((name for name in bos_likely if name in vocab), eos) if bos_token is None else bos_token
    for key, name in {"eos_token": eos, "bos_token": bos}.items():
        if name not in vocab:
            raise _missing(key, f"the token {name!r}", name, vocab, path)
    return bos, eos


def check_no_ends(texts: Sequence[str], ids: Sequence[Ids], ends: Mapping[int, str], path: str) -> None:
    """Checks that no text was encoded to one of the tokens `ends`.

    Raises:
        DataError: if one was; it names the token and the text.
    """
    flat = np.concatenate([np.empty(0, np.int32), *ids])
    if not any((flat == end).any() for end in ends):
        return
    text, end = next((text, i) for text, found in zip(texts, ids, strict=True) for i in found.tolist() if i in ends)
    what = f"found {ends[end]!r} ({end}), which begins or ends documents, in {text[:80]!r}"
    raise DataError(f"tokenizer.path: {path}: expected text to become ordinary tokens, {what}; set tokenizer.eos_token")


def _missing(key: str, expected: str, name: str, vocab: Iterable[str], path: str) -> UsageError:
    hint = did_you_mean(name, [token for token in vocab if token[:1] + token[-1:] in ("<>", "[]")])
    return UsageError(one_line(f"tokenizer.{key}: expected {expected} in {path}, found none; {hint}".removesuffix("; ")))
