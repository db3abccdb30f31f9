"""Trees of tensors in safetensors files: each rank writes the parts that it holds, and reads the parts that it wants.

What lies where is told in the coordinates of the whole tensors, so that a reader may be cut otherwise than the writers were.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import one_line
from fnrecipe.parallel.mesh import Mesh, global_slice, is_primary, is_shard
from fnrecipe.tree import Tree

Ranges: TypeAlias = Sequence[Sequence[int]]
"""(start, stop) along each dimension."""

Header: TypeAlias = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor in a file."""


@attrs.frozen
class Saved:
    """A tensor on disk: its dtype, the shape of the whole, and for each file that has a part of it where that lies."""

    dtype: str
    shape: Sequence[int]
    parts: dict[str, Ranges]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def write(path: Path, state: Tree, mesh: Mesh) -> dict[str, Saved]:
    """Writes this rank's parts of `state`, but what a rank before it writes; what it wrote, by dotted path.

    A rank for which nothing is left writes no file.
    """
    mine = {name: leaf for name, leaf in tree.paths(state, is_shard).items() if is_primary(leaf, mesh)}
    tensors = {name: tree.leaves(leaf)[0].detach().cpu().contiguous() for name, leaf in mine.items()}
    if tensors:
        with path.open("xb") as file:  # the library gives what it writes to its owner alone, whatever the umask says
            mode = os.fstat(file.fileno()).st_mode
        safetensors.torch.save_file(tensors, path)
        path.chmod(stat.S_IMODE(mode))
    return {
        name: Saved(_dtype(leaf), list(shape), {path.name: ranges})
        for name, leaf in mine.items()
        for shape, ranges in [global_slice(leaf)]
    }


def merged(written: Iterable[Mapping[str, Saved]]) -> dict[str, Saved]:
    """What all ranks wrote."""
    found: dict[str, Saved] = {}
    for rank in written:
        for name, saved in rank.items():
            parts = {**found[name].parts, **saved.parts} if name in found else saved.parts
            found[name] = attrs.evolve(saved, parts=parts)
    return found


def read(folder: Path, saved: Mapping[str, Saved], like: Tree) -> Tree:
    """The tensors in the structure of `like`, each rank's parts, on its devices; reads no more than these."""
    with ExitStack() as stack:

        @cache
        def opened(name: str) -> Any:
            return stack.enter_context(safe_open(folder / name, framework="pt"))

        def part(name: str, leaf: Any) -> Tensor:
            local, ranges = tree.leaves(leaf)[0], global_slice(leaf)[1]
            found = torch.empty(local.shape, dtype=local.dtype)
            for file, there in saved[name].parts.items():
                common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(ranges, there, strict=True)]
                if all(start < stop for start, stop in common) or not found.numel():
                    found[_slices(common, ranges)] = _values(opened(file), name, _slices(common, there))
            return found.to(local.device)

        return tree.like(like, [part(name, leaf) for name, leaf in tree.paths(like, is_shard).items()])


def header(path: Path) -> Header:
    """What is in a file, by its own header. The library refuses one that does not describe all bytes of the file, each once.

    Raises:
        OSError, safetensors.SafetensorError, RuntimeError: if there is no such file, or it is none of these.
    """

    def facts(file: Any, name: str) -> tuple[str, list[int]]:
        shape = file.get_slice(name).get_shape()
        nothing = _values(file, name, (slice(0, 0),) * len(shape))  # in torch's dtype
        return str(nothing.dtype).removeprefix("torch."), shape

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: facts(file, name) for name in names}


def mismatches(saved: Mapping[str, Saved], like: Tree) -> list[str]:
    """Each tensor that only one of them has, or that differs in dtype or shape; one line each, sorted."""
    wanted = {name: Saved(_dtype(leaf), list(global_slice(leaf)[0]), {}) for name, leaf in tree.paths(like, is_shard).items()}
    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
    problems += [f"{one_line(name)}: not in the state of this config" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        if str(wanted[name]) != str(saved[name]):
            problems.append(f"{name}: expected {wanted[name]}, found {saved[name]} in the checkpoint")
    return sorted(problems)


def _slices(inner: Ranges, outer: Ranges) -> tuple[slice, ...]:
    """`inner`, counted from where `outer` starts."""
    return tuple(slice(start - offset, stop - offset) for (start, stop), (offset, _) in zip(inner, outer, strict=True))


def _values(file: Any, name: str, slices: tuple[slice, ...]) -> Tensor:
    values: Tensor = file.get_slice(name)[slices] if slices else file.get_tensor(name)
    return values


def _dtype(leaf: Any) -> str:
    return str(tree.leaves(leaf)[0].dtype).removeprefix("torch.")
