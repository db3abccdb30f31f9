"""A Hugging Face `tokenizer.json` as plain JSON: read within bounds and made safe before the library gets it.

The library trusts its files. Here a file is refused that would block, exhaust memory or nest too deep; and special tokens get
names that no text contains, so that the library's model cannot find them in one.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import orjson

from fnrecipe.errors import UsageError

Content: TypeAlias = dict[str, Any]
"""The JSON of a tokenizer.json, of which only the outermost object has been checked."""

_MOST_BYTES, _MOST_LEVELS, _MOST_HOLES = 1 << 28, 64, 1 << 20
BYTE = re.compile("<0x[0-9A-F]{2}>")


def read(path: str, name: str = "tokenizer.json") -> Content:
    """Reads a tokenizer.json, or another file of one JSON object that errors call `name`.

    Raises:
        UsageError: if it is not a regular file, or not JSON within the limits of size and depth.
    """
    try:
        content = orjson.loads(read_bytes(path))
    except orjson.JSONDecodeError as error:
        raise UsageError(f"tokenizer.path: {path} is not a {name}: {error}") from None
    if _is_deeper(content, _MOST_LEVELS):
        raise UsageError(f"tokenizer.path: {path}: expected at most {_MOST_LEVELS} levels of JSON, found more")
    if not isinstance(content, dict):
        raise UsageError(f"tokenizer.path: {path} is not a {name}: expected an object, found {type(content).__name__}")
    return content


def read_bytes(path: str) -> bytes:
    """The bytes of a regular file; never blocks, as opening a pipe would.

    Raises:
        UsageError: if it cannot be read, is no file, or is too large.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(
                    f"tokenizer.path: expected a file, or a directory with a tokenizer.json, found neither: {path}"
                )
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"tokenizer.path: cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"tokenizer.path: cannot read {path!r}: {error}") from None
    if len(data) > _MOST_BYTES:
        raise UsageError(f"tokenizer.path: {path}: expected at most {_MOST_BYTES >> 20} MiB, found more")
    return data


def vocabulary(content: Content, path: str) -> dict[str, int]:
    """Every token and its id.

    Raises:
        UsageError: if there is none, or an id is not an integer from 0 to a little more than the number of tokens.
    """
    try:
        vocab = content["model"]["vocab"]
        words = {piece: number for number, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        found = {**words, **{token["content"]: token["id"] for token in added_tokens(content)}}
    except (TypeError, KeyError, ValueError) as error:
        expected = "expected tokens in model.vocab and added_tokens"
        raise UsageError(f"tokenizer.path: {path} is not a tokenizer.json: {expected}: {error!r}") from None
    most = len(found) + _MOST_HOLES
    wrong = [item for item in found.items() if type(item[0]) is not str or type(item[1]) is not int or not 0 <= item[1] < most]
    if wrong or not found:
        at = "none" if not found else f"{wrong[0][1]!r} for {wrong[0][0]!r}"
        raise UsageError(f"tokenizer.path: {path}: expected ids below about the number of tokens, {len(found):,}, found {at}")
    return found


def added_tokens(content: Content) -> Sequence[Content]:
    return content.get("added_tokens") or ()


def ends(processor: object) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor puts before a text, and those that it puts behind it."""
    before: list[str] = []
    behind: list[str] = []
    match processor:
        case {"type": "Sequence", "processors": [*parts]}:
            for part in parts:
                inner_before, inner_behind = ends(part)
                before, behind = before + inner_before, behind + inner_behind
        case {"type": "TemplateProcessing", "single": [*pieces]}:
            side = before
            for piece in pieces:
                match piece:
                    case {"SpecialToken": {"id": str(name)}}:
                        side.append(name)
                    case _:  # the text
                        side = behind
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(first), *_], "sep": [str(last), *_]}:
            return [first], [last]
    return before, behind


def silent_tokens(content: Content, names: Collection[str]) -> set[str]:
    """The tokens that no text may encode to: those of `names`, and all special ones.

    Bytes and single characters are excepted even if they are marked as special: the model needs them to spell text.
    """
    special = {token["content"] for token in added_tokens(content) if token.get("special")}
    return {name for name in special.union(names) if len(name) > 1 and not BYTE.fullmatch(name)}


def hidden_name(name: str) -> str:
    return f"\0fnrecipe {name}\0"


def with_margins(hidden: Content, added: Sequence[Content]) -> Content:
    """`hidden`, the content with hidden names, whose tokens take the white space beside them as the `added` ones do."""
    margins = {hidden_name(token["content"]): token for token in added}
    none: Content = {}
    tokens = [
        {**token, **{key: bool(margins.get(token["content"], none).get(key, token[key])) for key in ("lstrip", "rstrip")}}
        for token in added_tokens(hidden)
    ]
    return {**hidden, "added_tokens": tokens}


def closed(content: Content, silent: Collection[str], vocab: dict[str, int]) -> Content:
    """`content` with names that no text contains for `silent` tokens, and without post-processor, truncation and padding."""
    names = {name: hidden_name(name) for name in silent}
    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    elif names.keys() & model["vocab"].keys():
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not _makes(merge, model, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    plain = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    hide = [{"id": vocab[name], "content": other, **plain} for name, other in names.items()]
    kept = [token for token in added_tokens(content) if token["content"] not in names]
    added = sorted([*hide, *kept], key=lambda token: int(token["id"]))
    return {**content, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None, "model": model}


def _makes(merge: str | Sequence[str], model: Content, names: Collection[str]) -> bool:
    """Whether a merge of a BPE has one of the tokens `names` as an input or as its result."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    prefix = model.get("continuing_subword_prefix") or ""
    return left in names or right in names or left + right[len(prefix) :] in names


def _is_deeper(content: object, levels: int) -> bool:
    containers = [content] if isinstance(content, dict | list) else []
    for _ in range(levels):
        inner = [item.values() if isinstance(item, dict) else item for item in containers]
        containers = [child for items in inner for child in items if isinstance(child, dict | list)]
        if not containers:
            return False
    return True
