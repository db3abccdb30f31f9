"""A tokenizer by the name of its family, as a config names it."""

from __future__ import annotations

from collections.abc import Sequence

from fnrecipe.data.huggingface import huggingface_tokenizer
from fnrecipe.data.sentencepiece_file import sentencepiece_tokenizer
from fnrecipe.data.tiktoken_file import tiktoken_tokenizer
from fnrecipe.data.tokenizer import Tokenizer, byte_tokenizer
from fnrecipe.errors import UsageError, did_you_mean

FAMILIES = ("byte", "hf", "sentencepiece", "tiktoken")


def open_tokenizer(
    family: str,
    path: str | None = None,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pattern: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a family, from a file or a directory at `path`; `pattern` and `special_tokens` are for tiktoken.

    Raises:
        UsageError: if there is no such family, or the file is missing or none of its.
    """
    if family == "byte":
        return byte_tokenizer()
    if family not in FAMILIES:
        raise UsageError(f"tokenizer.family: expected a known family, found {family!r}; {did_you_mean(family, FAMILIES)}")
    if path is None:
        raise UsageError(f"tokenizer.path: expected a path for tokenizer.family={family}, found none")
    if family == "hf":
        return huggingface_tokenizer(path, eos_token, bos_token)
    if family == "sentencepiece":
        return sentencepiece_tokenizer(path, eos_token, bos_token)
    return tiktoken_tokenizer(path, pattern, eos_token, bos_token, special_tokens)
