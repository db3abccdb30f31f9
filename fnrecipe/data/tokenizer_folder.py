"""A directory in Hugging Face's layout: the tokenizer's file in it, and what the files beside it say of special tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fnrecipe.data.tokenizer_file import Content, read
from fnrecipe.errors import UsageError, one_line

_CONFIG, _MAP, _GENERATION, _ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
)


def in_folder(path: str, *names: str) -> tuple[str | None, str]:
    """The directory that `path` is, else None; and the file: the first of `names` that is in it, or `path` itself."""
    if not os.path.isdir(path):
        return None, path
    there = [name for name in names if os.path.exists(os.path.join(path, name))]
    return path, os.path.join(path, (there or list(names))[0])


def token_names(folder: str) -> dict[str, str]:
    """What a directory calls its tokens, as `{"bos_token": "<s>", …}`: by its special_tokens_map and tokenizer_config."""
    found: dict[str, str] = {}
    for name in (_MAP, _CONFIG):
        for key, value in _optional(folder, name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def ends_in_folder(folder: str | None, vocab: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The tokens that a directory calls BOS, and those that it calls EOS; by name, else by id in its generation_config.

    Raises:
        UsageError: if a name is not in the vocabulary.
    """
    if folder is None:
        return [], []
    names, numbers = token_names(folder), {number: name for name, number in vocab.items()}
    generation = _optional(folder, _GENERATION)
    found: list[list[str]] = []
    for key in ("bos_token", "eos_token"):
        if key in names and names[key] not in vocab:
            expected = f"expected the {key} that {_CONFIG} or {_MAP} names in the vocabulary, found none called {names[key]!r}"
            raise UsageError(one_line(f"tokenizer.path: {folder}: {expected}; set tokenizer.{key}"))
        value = generation.get(f"{key}_id")
        ids = value if isinstance(value, list) else [value]
        found.append([names[key]] if key in names else [numbers[i] for i in ids if type(i) is int and i in numbers])
    return found[0], found[1]


def tokens_beyond(folder: str | None, size: int) -> dict[str, int]:
    """The tokens that a directory adds to a vocabulary of `size` tokens, which follow it.

    Raises:
        UsageError: if their ids do not follow each other.
    """
    if folder is None:
        return {}
    listed = _optional(folder, _CONFIG).get("added_tokens_decoder")
    found = dict(_optional(folder, _ADDED))
    if isinstance(listed, dict):
        found |= {token["content"]: int(number) for number, token in listed.items() if _is_token(number, token)}
    beyond = {name: number for name, number in found.items() if type(number) is int and number >= size}
    if sorted(beyond.values()) != list(range(size, size + len(beyond))):
        expected = f"expected added tokens with ids from {size:,} on without holes"
        raise UsageError(one_line(f"tokenizer.path: {folder}: {expected}, found {sorted(beyond.values())[:8]}"))
    return beyond


def _is_token(number: str, token: object) -> bool:
    return number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)


def _optional(folder: str, name: str) -> Content:
    path = os.path.join(folder, name)
    return read(path, name) if os.path.exists(path) else {}
