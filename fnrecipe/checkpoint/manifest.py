"""The manifest of a checkpoint, `state.json`: what each of its files holds, checked strictly before one of them is opened.

    {"format": 3, "step": 100, "cursor": any JSON, "files": {data file: fingerprint}, "shards": [file, …],
     "tensors": {path: [dtype, shape, {file: [[start, stop] along each dimension]}]}}

Valid checksums do not make a manifest valid: a faulty program, or an attacker, computes them too. So everything is checked
that can be checked without the tensors: types, ranges, names, and that the slices of each tensor cover it exactly once.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias, TypeGuard

import attrs

from fnrecipe.checkpoint.tensors import Header, Ranges, Saved
from fnrecipe.data.stream import Cursor
from fnrecipe.errors import CheckpointError

FORMAT = 3
ADVICE = "read it with the fnrecipe that wrote it, whose version the run.json of its run has"
MAX_BYTES, MAX_DEPTH = 1 << 28, 64
_SHARD = re.compile(r"state_[0-9]{4,}\.safetensors")

JSON: TypeAlias = Any
"""Parsed JSON that has not been checked yet."""


@attrs.frozen(eq=False)
class Manifest:
    """Step, stream cursor, fingerprints of the data's files, names of the shard files, and the slices of tensors in them."""

    step: int
    cursor: Cursor
    files: dict[str, str]
    shards: list[str]
    tensors: dict[str, Saved]

    def headers(self) -> dict[str, Header]:
        """The header that each shard file must have."""
        found: dict[str, Header] = {name: {} for name in self.shards}
        for path, saved in self.tensors.items():
            for name, ranges in saved.slices.items():
                found[name][path] = saved.dtype, [stop - start for start, stop in ranges]
        return found


def text(manifest: Manifest) -> str:
    """The JSON of a manifest.

    Raises:
        ValueError: if `read` would refuse it, for a cursor that is nested too deep, say.
    """
    tensors = {path: attrs.astuple(saved) for path, saved in manifest.tensors.items()}
    document = {"format": FORMAT, **attrs.asdict(manifest, recurse=False), "tensors": tensors}
    lines = _lines(document) + "\n"
    read(lines.encode())
    return lines


def read(data: bytes) -> Manifest:
    """Parses and checks the JSON of a manifest.

    Raises:
        ValueError: saying what is wrong.
        CheckpointError: if it is of another format.
    """
    _expect(len(data) <= MAX_BYTES, "size", f"at most {MAX_BYTES:,} bytes", len(data))
    document = _parsed(data)
    number = document.get("format") if isinstance(document, dict) else None
    _expect(_is_count(number), "format", "a number", number)
    if number != FORMAT:
        raise CheckpointError(f"expected checkpoint format {FORMAT}, found {number}; {ADVICE}")
    keys = ["format", *(field.name for field in attrs.fields(Manifest))]
    _expect(sorted(document) == sorted(keys), "keys", ", ".join(keys), sorted(document))
    step, cursor, files, shards, tensors = (document[key] for key in keys[1:])
    _expect(_is_count(step), "step", "a whole number", step)
    texts = isinstance(files, dict) and all(isinstance(fingerprint, str) for fingerprint in files.values())
    _expect(texts, "files", "a text for each file", files)
    names = isinstance(shards, list) and all(isinstance(name, str) and _SHARD.fullmatch(name) for name in shards)
    _expect(names and len(set(shards)) == len(shards), "shards", "names of files, each once", shards)
    _expect(isinstance(tensors, dict), "tensors", "a mapping", tensors)
    known = set(shards)
    return Manifest(step, cursor, files, shards, {path: _saved(path, entry, known) for path, entry in tensors.items()})


def _saved(path: str, entry: JSON, shards: Collection[str]) -> Saved:
    where = f"tensors: {path}"
    _expect(isinstance(entry, list) and len(entry) == 3, where, "[dtype, shape, parts]", entry)
    dtype, shape, parts = entry
    _expect(isinstance(dtype, str), where, "the name of a dtype", dtype)
    _expect(_is_counts(shape), where, "a shape of whole numbers", shape)
    _expect(isinstance(parts, dict) and all(name in shards for name in parts), where, "parts in the shards", parts)
    pairs = all(_is_ranges(ranges, len(shape)) for ranges in parts.values())
    _expect(pairs and _tiles(shape, list(parts.values())), where, f"parts that make up {_short(shape)} once", parts)
    return Saved(dtype, shape, parts)


def _tiles(shape: Sequence[int], slices: Sequence[Ranges]) -> bool:
    """Whether the slices are the cells of a grid over `shape`, each once, and so hold each element exactly once."""
    # Sharding along dimensions leads to grids only. In a grid it is enough that the intervals of each dimension are adjacent,
    # from 0 to its size, and that all combinations are there; slices of any form would have to be compared in pairs.
    cells = {tuple((start, stop) for start, stop in ranges) for ranges in slices}
    axes = [sorted({cell[dim] for cell in cells}) for dim in range(len(shape))]
    ends = [([start for start, _ in axis], [stop for _, stop in axis]) for axis in axes]
    cut = all([*starts, size] == [0, *stops] for (starts, stops), size in zip(ends, shape, strict=True))
    return cut and len(cells) == len(slices) == math.prod(map(len, axes))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_ranges(value: object, dims: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == dims
        and all(_is_counts(pair) and len(pair) == 2 and pair[0] <= pair[1] for pair in value)
    )


def _expect(holds: bool, where: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {expected}, found {_short(found)}")


def _short(value: object) -> str:
    return reprlib.repr(value)


def _parsed(data: bytes) -> JSON:
    """Parses JSON by its standard: no NaN, no duplicate key, no value nested so deep that other readers fail on it."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting") from None
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        _expect(depth <= MAX_DEPTH, "nesting", f"at most {MAX_DEPTH} levels", depth)
    return value


def _children(value: object) -> Collection[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    _expect(len(found) == len(pairs), "keys", "each once", [key for key, _ in pairs])
    return found


def _finite(number: str) -> float:
    _expect(math.isfinite(float(number)), "numbers", "finite ones", number)
    return float(number)


def _lines(value: object, indent: str = "") -> str:
    """JSON with each entry of a mapping on a line of its own, and lists on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    entries = [f"{indent} {json.dumps(key)}: {_lines(entry, indent + ' ')}" for key, entry in value.items()]
    return "\n".join(["{", ",\n".join(entries), indent + "}"]) if entries else "{}"
