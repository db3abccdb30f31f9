"""What a value of a config changes: the result of a run, or only how it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs

RUNTIME: Mapping[str, str] = MappingProxyType({"affects": "runtime"})
"""The metadata of a field that changes how a run is computed, and nothing of what it computes: `field(metadata=RUNTIME)`."""


def runtime_paths(config: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of the fields that are marked so, in a config and its sections."""
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if field.metadata.get("affects") == RUNTIME["affects"]:
            yield f"{path}{field.name}"
        elif attrs.has(type(value)):
            yield from runtime_paths(value, f"{path}{field.name}.")
