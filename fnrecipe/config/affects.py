"""What is said of values of a config beside them: whether they change the result of a run, what is cut into parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import attrs
from attrs import AttrsInstance

RUNTIME: Mapping[str, str] = MappingProxyType({"affects": "runtime"})
"""The metadata of a field that changes how a run is computed, and nothing of what it computes: `field(metadata=RUNTIME)`."""

CUT: Mapping[str, str] = MappingProxyType({"cut": "tensor_parallel_size"})
"""The metadata of a size of a model that tensor parallelism divides over its ranks: `field(metadata=CUT)`."""


def cut_sizes(config: AttrsInstance) -> dict[str, int]:
    """The fields of a model's config that are marked so, with their values."""
    return {field.name: getattr(config, field.name) for field in attrs.fields(type(config)) if field.metadata.get("cut")}


def runtime_paths(config: AttrsInstance, path: str = "") -> Iterator[str]:
    """The dotted paths of the fields that are marked so, in a config and its sections."""
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if field.metadata.get("affects") == RUNTIME["affects"]:
            yield f"{path}{field.name}"
        elif attrs.has(type(value)):
            yield from runtime_paths(value, f"{path}{field.name}.")
