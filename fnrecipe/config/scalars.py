"""Plain scalars of YAML 1.2's core schema: null, true, integers, floats and text.

Three things differ from the core schema. Digits may be grouped by single underscores, as in Python (`1_000`). A number has no
leading zero: YAML 1.1 read `012` as 10, the core schema reads it as 12. And what looks like a number and is none (`1__0`,
`0x_`, `012`) is refused, where the core schema would take it for text.
"""

from __future__ import annotations

import re

_MAX_DIGITS = 1000
"""Of an integer; none that a config takes has more than 64 bits."""
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_WHOLE = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_NAMES: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGERS = {
    10: re.compile(rf"[-+]?{_WHOLE}"),
    8: re.compile(r"0o[0-7]+(?:_[0-7]+)*"),
    16: re.compile(r"0x[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*"),
}
_POWER = rf"[eE][-+]?{_DIGITS}"
_FLOAT = re.compile(rf"[-+]?(?:(?:{_WHOLE}\.(?:{_DIGITS})?|\.{_DIGITS})(?:{_POWER})?|{_WHOLE}{_POWER})")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_LIKE_A_NUMBER = re.compile(r"[-+]?(?:0[xXoO][0-9a-fA-F_]*|0[bB][01_]+|\.?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]*)?)")


def read(text: str) -> bool | int | float | str | None:
    """The value of a scalar that is written without quotes.

    Raises:
        ValueError: if it looks like a number and is none, or is an integer of more than a thousand digits.
    """
    if text in _NAMES:
        return _NAMES[text]
    for base, pattern in _INTEGERS.items():
        if pattern.fullmatch(text) and len(text) <= _MAX_DIGITS:
            return int(text, base)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _LIKE_A_NUMBER.fullmatch(text):
        raise ValueError(text)
    return text


def is_text(text: str) -> bool:
    """Whether `text` is read as itself where it stands without quotes."""
    try:
        return read(text) == text
    except ValueError:
        return False
