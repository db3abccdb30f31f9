"""The regular expressions by which published vocabularies in tiktoken's format cut text before BPE, with their special tokens.

A rank file holds neither. The expressions are part of the vocabularies: gpt2, cl100k and o200k as `tiktoken` defines them,
llama3 and qwen2 as the models' own tokenizers do.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.frozen
class Pattern:
    """How text is cut, and the special tokens of the published vocabulary: the names and ids of those that it names."""

    regex: str
    special: Mapping[str, int]


_O200K_PREFIX, _O200K_SUFFIX = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    f"{_O200K_PREFIX}{_UPPER}*{_LOWER}+{_O200K_SUFFIX}",
    f"{_O200K_PREFIX}{_UPPER}+{_LOWER}*{_O200K_SUFFIX}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_NAMED = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|step_id|>": 128005,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
    "<|image|>": 128011,
}
_LLAMA3_RESERVED = [128002, 128003, *range(128012, 128256)]
_LLAMA3 = {**_LLAMA3_NAMED, **{f"<|reserved_special_token_{index}|>": i for index, i in enumerate(_LLAMA3_RESERVED)}}

PATTERNS: Mapping[str, Pattern] = {
    "gpt2": Pattern(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s", {"<|endoftext|>": 50256}
    ),
    "cl100k": Pattern(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k": Pattern("|".join(_O200K), {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "llama3": Pattern(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", _LLAMA3),
    "qwen2": Pattern(rf"{_WORDS}|\p{{N}}|{_REST}", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}
