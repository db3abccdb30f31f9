"""A byte-level BPE as the vocabulary of a GGUF file.

llama.cpp's converter knows published tokenizers by a hash of ids, and refuses every other one. What llama.cpp needs is less:
tokens, merges, and the name of the pattern by which a text is cut first. So a tokenizer that somebody has trained has a
vocabulary here, if its pattern is one of those that llama.cpp has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from fnrecipe.errors import UsageError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_ENGLISH + r"\p{N}{1,3}" + _REST: "llama-bpe", _ENGLISH + r"\p{N}" + _REST: "qwen2"}
"""Regular expressions of a `Split`, and llama.cpp's names of them."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""


@attrs.frozen
class Vocabulary:
    """Tokens with their types, in the order of ids; merges as pairs joined by a space; llama.cpp's name of the pattern."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pattern: str


def vocabulary(content: Mapping[str, Any], size: int) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`, for a model of `size` embeddings; those without a token are unused.

    Raises:
        UsageError: if it is no byte-level BPE, or llama.cpp has no such pattern.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise UsageError(f"tokenizer.json: model.type: expected a byte-level BPE for GGUF, found {_kind(model)}")
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise UsageError(f"tokenizer.json: normalizer: expected none, or NFC, for GGUF, found {normalizer}")
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens, types, merges, _pattern(content.get("pre_tokenizer"), merges))


def _pattern(given: Mapping[str, Any] | None, merges: list[str]) -> str:
    steps = [] if given is None else given["pretokenizers"] if given["type"] == "Sequence" else [given]
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        by_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and (by_regex or not merges):  # without merges a text becomes bytes, however it is cut
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_regex:
            name = PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
                return name
    known = "ByteLevel, Digits and ByteLevel, or Split by the pattern of Llama 3 or Qwen 2 and ByteLevel"
    raise UsageError(
        f"tokenizer.json: pre_tokenizer: expected one that llama.cpp has, {known}, found {', '.join(kinds) or 'none'}"
    )


def _kind(model: Mapping[str, object]) -> str:
    return f"{model.get('type', 'BPE')}{' with byte_fallback' if model.get('byte_fallback') else ''}"
