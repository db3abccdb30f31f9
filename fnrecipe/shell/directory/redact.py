"""Values that are written down: as they are, without the secrets of addresses."""

from __future__ import annotations

from typing import Any

from fnrecipe.errors import redacted


def redacted_values(value: Any) -> Any:
    """A copy of plain nested values, in which each text is redacted."""
    if isinstance(value, dict):
        return {redacted_values(key): redacted_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted_values, value))
    return redacted(value) if isinstance(value, str) else value
