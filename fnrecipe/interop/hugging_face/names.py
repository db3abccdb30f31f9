"""Which tensors of a directory are which parameters, and what of their names and shapes does not fit. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import attrs

from fnrecipe.errors import SHOWN, UsageError, few
from fnrecipe.interop.hugging_face.directory import FLOATS, Held
from fnrecipe.models.hugging_face import HuggingFace, Stored

C = TypeVar("C")

Shape = tuple[int, ...]
BUFFERS = ("*.rotary_emb.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias")
"""What older versions of transformers saved beside the weights: constants that follow from the config."""


def places(part: HuggingFace[C], config: C, paths: Sequence[str]) -> dict[str, Stored]:
    """Where each parameter lies, by its path; the names have the numbers of layers in the place of `*`."""
    patterns = part.tensors(config)
    return {path: _numbered(patterns[re.sub(r"(?<=\.)\d+(?=\.)", "*", path)], path) for path in paths}


def _numbered(stored: Stored, path: str) -> Stored:
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", path))
    return attrs.evolve(stored, name=re.sub(r"\*", lambda _: next(numbers), stored.name))


def shape_there(stored: Stored, shape: Shape) -> Shape:
    """The shape of the tensor that a parameter of `shape` is, or is a part of."""
    whole = (shape[0] * stored.parts, *shape[1:])
    return whole[::-1] if stored.transposed else whole


def tied_head(part: HuggingFace[C], config: C) -> tuple[str, str] | None:
    """The names of the embedding and of the head that files may have though the config ties them; None if it does not."""
    if not getattr(config, "tied_embeddings", False):
        return None
    loose: C = attrs.evolve(config, tied_embeddings=False)  # type: ignore[misc]
    head = part.tensors(loose).get("head")
    return None if head is None else (part.tensors(config)["embedding"].name, head.name)


def with_prefix(held: Mapping[str, Held], wanted: Sequence[str]) -> dict[str, str]:
    """The names in the files by those that the family has: a model that was saved without its head lacks their first part."""
    prefix = f"{wanted[0].partition('.')[0]}."
    bare = not any(name.startswith(prefix) for name in held)
    return {f"{prefix}{name}" if bare and f"{prefix}{name}" in wanted else name: name for name in held}


def check(directory: Path, held: Mapping[str, Held], wanted: Mapping[str, Shape], also: Sequence[str] = ()) -> None:
    """Checks that the files hold the tensors `wanted`, and no others but buffers and those in `also`.

    Raises:
        UsageError: with a line for each kind of what is missing, left over, quantised, or of another shape.
    """
    missing = [name for name in wanted if name not in held]
    known = [name for name in held if name in wanted]
    extra = [name for name in held if name not in wanted and name not in also and not _is_buffer(name)]
    quantised = [f"{name} ({held[name].dtype})" for name in known if held[name].dtype not in FLOATS]
    wrong = [name for name in known if held[name].shape != wanted[name]]
    lines = []
    if missing:
        lines.append(f"{directory}: expected every tensor that model.config has, missing: {few(missing)}")
    if extra:
        lines.append(f"{directory}: expected no tensor that model.config has not, left over: {few(extra)}")
    if quantised:
        lines.append(f"{directory}: expected tensors of {', '.join(FLOATS)}, not quantised ones, found {few(quantised)}")
    for name in wrong[:SHOWN]:
        place = f"{directory / held[name].file}: {name}"
        lines.append(f"{place}: expected the shape {list(wanted[name])} by model.config, found {list(held[name].shape)}")
    if len(wrong) > SHOWN:
        lines.append(f"  … and {len(wrong) - SHOWN:,} more of another shape")
    if lines:
        raise UsageError("\n".join(lines))


def _is_buffer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in BUFFERS)
