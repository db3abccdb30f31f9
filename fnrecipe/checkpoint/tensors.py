"""Trees of tensors in safetensors files: each rank writes its shards, and reads the slices that its own shards need.

A rank that has much to write deals it over several files, which are written, summed and verified beside each other.

Slices are recorded in coordinates of the unsharded tensors, so that a state may be restored under another sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias

import attrs
import torch
from safetensors import safe_open
from torch import Tensor

from fnrecipe import tree
from fnrecipe.checkpoint.shard_file import AT_ONCE, DTYPES, write_files
from fnrecipe.errors import one_line
from fnrecipe.parallel.mesh import Mesh, global_slice, is_primary, is_shard
from fnrecipe.runtime.clock import record_event
from fnrecipe.tree import Tree

Ranges: TypeAlias = Sequence[Sequence[int]]
"""(start, stop) along each dimension."""

Header: TypeAlias = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor in a file."""

Entry: TypeAlias = tuple[str, Sequence[int], dict[str, Ranges]]
"""The fields of a `Saved`, as JSON."""

_FILE_BYTES = 1 << 25
"""The fewest bytes for which a rank adds a file, up to as many as are written at once."""


class _Slice(Protocol):
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...
    def __getitem__(self, slices: tuple[slice, ...], /) -> Tensor: ...


class _File(Protocol):
    """What `safe_open` opens, which the library leaves untyped."""

    def get_slice(self, name: str, /) -> _Slice: ...
    def get_tensor(self, name: str, /) -> Tensor: ...


@attrs.frozen
class Saved:
    """A tensor on disk: its dtype, its unsharded shape, and the slice of it in each file that holds one."""

    dtype: str
    shape: Sequence[int]
    slices: dict[str, Ranges]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@attrs.frozen(eq=False)
class Snapshot:
    """What one rank writes of a state: its shards by dotted path, and the unsharded shape of each, with the slice that it is.

    They are the state's own tensors, or (`copied`) copies in host memory that do not change when the state goes on.
    """

    tensors: Mapping[str, Tensor]
    slices: Mapping[str, tuple[Sequence[int], Ranges]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dealt(self) -> list[list[str]]:
        """The paths of the tensors of each file, of which there are as many as there is something to write to."""
        # What a file has depends on sizes alone, not on how many cores there are: a state is the same bytes everywhere.
        count = min(max(self.num_bytes // _FILE_BYTES, 1), AT_ONCE)
        files, filled = [list[str]() for _ in range(count)], [0] * count
        for path in sorted(self.tensors, key=lambda path: (-self.tensors[path].nbytes, path)):
            least = filled.index(min(filled))
            files[least].append(path)
            filled[least] += self.tensors[path].nbytes
        return list(filter(None, files))


def snapshot(state: Tree, mesh: Mesh = Mesh()) -> Snapshot:
    """This rank's shards of `state`, without those that a lower rank holds too."""
    primary = {name: leaf for name, leaf in tree.paths(state, is_shard).items() if is_primary(leaf, mesh)}
    slices = {name: global_slice(leaf) for name, leaf in primary.items()}
    return Snapshot({name: tree.leaves(leaf)[0].detach() for name, leaf in primary.items()}, slices)


def copied(taken: Snapshot, into: Mapping[str, Tensor]) -> Snapshot:
    """A snapshot in host memory: in that of the tensors `into` where they fit, else in new one, pinned if it is of a GPU."""

    def buffer(name: str, tensor: Tensor) -> Tensor:
        old = into.get(name)
        if old is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype):
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    tensors = {name: buffer(name, tensor).copy_(tensor, non_blocking=True) for name, tensor in taken.tensors.items()}
    for device in {tensor.device for tensor in taken.tensors.values()}:
        record_event(device).wait()
    return attrs.evolve(taken, tensors=tensors)


def write(folder: Path, taken: Snapshot, first: int = 0) -> tuple[dict[str, str], dict[str, Saved]]:
    """Writes a snapshot to new files, numbered from `first`; the SHA-256 of each by name, and what lies where."""
    files = {file_name(first + number): paths for number, paths in enumerate(taken.dealt())}
    sums = write_files({folder / name: {path: taken.tensors[path].cpu() for path in paths} for name, paths in files.items()})
    place = {path: name for name, paths in files.items() for path in paths}
    saved = {
        path: Saved(_dtype(taken.tensors[path]), list(shape), {place[path]: ranges})
        for path, (shape, ranges) in taken.slices.items()
    }
    return {path.name: digest for path, digest in sums.items()}, saved


def file_name(number: int) -> str:
    return f"state_{number:04d}.safetensors"


def copy(source: Path, target: Path, names: Sequence[str]) -> str:
    """Writes some tensors of a file to another one, which is on disk then; its SHA-256.

    Raises:
        OSError, safetensors.SafetensorError: if one cannot be read, or the other not written.
    """
    with safe_open(source, framework="pt") as file:
        return write_files({target: {name: file.get_tensor(name) for name in names}})[target]


def num_bytes(state: Tree, names: Callable[[str], bool] = lambda name: True) -> int:
    """Bytes of the tensors of a state on disk, each element once, whatever its sharding; of those with some `names` alone."""
    leaves = [leaf for name, leaf in tree.paths(state, is_shard).items() if names(name)]
    return sum(math.prod(global_slice(leaf)[0]) * tree.leaves(leaf)[0].element_size() for leaf in leaves)


def merged(written: Iterable[Mapping[str, Saved]]) -> dict[str, Saved]:
    """The tensors of all ranks, each with the slices of all files."""
    found: dict[str, Saved] = {}
    for rank in written:
        for name, saved in rank.items():
            slices = {**found[name].slices, **saved.slices} if name in found else saved.slices
            found[name] = attrs.evolve(saved, slices=slices)
    return found


def read(folder: Path, saved: Mapping[str, Saved], like: Tree) -> Tree:
    """The tensors in the structure of `like`: this rank's shards, on its devices; reads no more than these."""
    with ExitStack() as stack:

        @cache
        def opened(name: str) -> _File:
            file: _File = stack.enter_context(safe_open(folder / name, framework="pt"))
            return file

        def shard(name: str, leaf: Tree) -> Tensor:
            local, wanted = tree.leaves(leaf)[0], global_slice(leaf)[1]
            values = torch.empty(local.shape, dtype=local.dtype)
            for file, stored in saved[name].slices.items():
                common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, stored, strict=True)]
                if values.numel() and all(start < stop for start, stop in common):
                    values[_slices(common, wanted)] = _values(opened(file), name, _slices(common, stored))
            return values.to(local.device)

        return tree.like(like, [shard(name, leaf) for name, leaf in tree.paths(like, is_shard).items()])


def header(path: Path) -> Header:
    """The header of a file. The library refuses a file whose header does not describe each of its bytes exactly once.

    Raises:
        OSError, safetensors.SafetensorError, RuntimeError: if there is no such file, or it is not a safetensors file.
    """

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        return {name: (DTYPES.get(found.get_dtype(), ""), found.get_shape()) for name, found in slices.items()}


def mismatches(saved: Mapping[str, Saved], like: Tree) -> list[str]:
    """A line for each tensor that only one of them has, or that differs in dtype or shape; sorted."""
    wanted = {name: Saved(_dtype(leaf), list(global_slice(leaf)[0]), {}) for name, leaf in tree.paths(like, is_shard).items()}
    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - saved.keys()]
    problems += [f"{one_line(name)}: not in the state of this config" for name in saved.keys() - wanted.keys()]
    for name in wanted.keys() & saved.keys():
        if str(wanted[name]) != str(saved[name]):
            problems.append(f"{name}: expected {wanted[name]}, found {saved[name]} in the checkpoint")
    return sorted(problems)


def _slices(inner: Ranges, outer: Ranges) -> tuple[slice, ...]:
    """`inner` relative to the start of `outer`."""
    return tuple(slice(start - offset, stop - offset) for (start, stop), (offset, _) in zip(inner, outer, strict=True))


def _values(file: _File, name: str, slices: tuple[slice, ...]) -> Tensor:
    return file.get_slice(name)[slices] if slices else file.get_tensor(name)


def _dtype(leaf: Tree) -> str:
    return str(tree.leaves(leaf)[0].dtype).removeprefix("torch.")
