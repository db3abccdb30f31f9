"""Tokenizers by the library `tiktoken`: byte-level BPE from a rank file, lines of a token in base64 and its rank."""

from __future__ import annotations

import hashlib
import os
from binascii import Error, a2b_base64
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fnrecipe.data.document import Ids
from fnrecipe.data.panics import encoded, mute
from fnrecipe.data.tiktoken_patterns import PATTERNS
from fnrecipe.data.token_ends import check_no_ends, choose_ends
from fnrecipe.data.token_spans import byte_spans, encode_each
from fnrecipe.data.tokenizer import Tokenizer
from fnrecipe.data.tokenizer_file import read_bytes
from fnrecipe.data.tokenizer_folder import ends_in_folder, in_folder
from fnrecipe.errors import UsageError, did_you_mean, few, one_line

if TYPE_CHECKING:
    import tiktoken

_MOST_HOLES = 1 << 20


def tiktoken_tokenizer(
    path: str,
    pattern: str | None,
    eos_token: str | None = None,
    bos_token: str | None = None,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a rank file, or of the one in a directory, with text cut by the `pattern` of that name.

    `special_tokens` follow the ranks in their order; without any, they are those of the vocabulary that the pattern comes from.

    Raises:
        UsageError: if the file is no rank file, there is no such pattern, special tokens do not fit, or tiktoken is missing.
    """
    if pattern is None or pattern not in PATTERNS:
        hint = did_you_mean(pattern or "", PATTERNS) if pattern else f"valid names: {', '.join(PATTERNS)}"
        found = "null" if pattern is None else repr(pattern)
        raise UsageError(f"tokenizer.pattern: expected how text is cut before BPE, found {found}; {hint}")
    names = sorted(name for name in os.listdir(path) if name.endswith(".tiktoken")) if os.path.isdir(path) else []
    folder, path = in_folder(path, "tokenizer.model", *names)
    data = read_bytes(path)
    ranks = _ranks(data, path)
    special = _special(ranks, pattern, special_tokens, path)
    before, behind = ends_in_folder(folder, special)
    names_of_ends = choose_ends(special, special, path, asked=(bos_token, eos_token), before=before, behind=behind)
    inner = _load(ranks, pattern, special, path)
    bos, eos = (special[name] for name in names_of_ends)

    def encode(texts: Sequence[str]) -> list[Ids]:
        ids = [np.array(found, np.int32) for found in encoded(partial(_encode, inner), list(texts), path)]
        check_no_ends(texts, ids, {special[name]: name for name in names_of_ends}, path)
        return ids

    silent = set(special.values())

    def decode(ids: Sequence[int]) -> str:
        return inner.decode_bytes([i for i in ids if i not in silent]).decode(errors="replace")

    sizes = np.zeros(max([*ranks.values(), *special.values()]) + 1, np.int64)
    sizes[list(ranks.values())] = list(map(len, ranks))
    told = repr((PATTERNS[pattern].regex, sorted(special.items()))).encode()
    return Tokenizer(
        len(sizes),
        bos,
        eos,
        encode,
        decode,
        sizes,
        lambda _, ids: int(sizes[ids].sum()),
        hashlib.sha256(b"tiktoken\0" + told + data).hexdigest()[:16],
        partial(encode_each, encode=encode, spans=partial(byte_spans, num_bytes=sizes), special=special),
        special,
        names_of_ends,
    )


def _ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Tokens and their ranks; every byte is a token, so that any text can be encoded."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _token(line)
        if not token or rank is None or token in ranks:
            expected = "a token in base64 that no earlier line has, a space and its rank"
            raise UsageError(
                one_line(f"tokenizer.path: {path}:{number}: expected {expected}, found {line[:80].decode('latin-1')!r}")
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UsageError(f"tokenizer.path: {path}: expected a rank for each of 256 bytes, found none for 0x{missing[0]:02x}")
    if len(set(ranks.values())) < len(ranks) or max(ranks.values()) >= len(ranks) + _MOST_HOLES:
        found = f"{len(set(ranks.values())):,} up to {max(ranks.values()):,}"
        raise UsageError(f"tokenizer.path: {path}: expected {len(ranks):,} different ranks, found {found}")
    return ranks


def _token(line: bytes) -> tuple[bytes, int | None]:
    token, _, rank = line.strip().partition(b" ")
    try:
        return a2b_base64(token, strict_mode=True), int(rank) if rank.isdigit() and len(rank) < 10 else None
    except Error:
        return b"", None


def _special(ranks: Mapping[bytes, int], pattern: str, names: Sequence[str], path: str) -> dict[str, int]:
    first = max(ranks.values()) + 1
    if names:
        if "" in names or len(set(names)) < len(names):
            raise UsageError(f"tokenizer.special_tokens: expected different names that are not empty, found {few(names)}")
        return {name: first + index for index, name in enumerate(names)}
    special = dict(PATTERNS[pattern].special)
    if not 0 <= min(special.values()) - first <= 1:  # cl100k leaves one id free
        expected = f"expected names for {path}, whose {first:,} ranks are not those of the vocabulary {pattern}"
        raise UsageError(f"tokenizer.special_tokens: {expected}, found none")
    return special


def _load(ranks: dict[bytes, int], pattern: str, special: dict[str, int], path: str) -> tiktoken.Encoding:
    try:
        import tiktoken
    except ImportError:
        raise UsageError(f"{path}: reading a rank file needs tiktoken: pip install 'fnrecipe[tiktoken]'") from None
    return tiktoken.Encoding(pattern, pat_str=PATTERNS[pattern].regex, mergeable_ranks=ranks, special_tokens=special)


def _encode(inner: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    with mute():  # it panics at millions of spaces in a row, say
        return inner.encode_ordinary_batch(texts)
