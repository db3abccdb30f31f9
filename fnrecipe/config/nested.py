"""Values by dotted path as a tree of dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nested(values: Mapping[str, object]) -> dict[str, Any]:
    """Nested dicts of values by dotted path."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return found
