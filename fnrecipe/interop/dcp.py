"""Checkpoints as torch's distributed ones (`torch.distributed.checkpoint`, DCP), both ways, outside of every load path.

Each tensor has its own path as its name. One more, `fnrecipe`, has step, cursor and facts of the data, as the bytes of JSON.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from fnrecipe import checkpoint
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.checkpoint.compare import whole
from fnrecipe.config.nested import nested
from fnrecipe.errors import UsageError, one_line, shortened
from fnrecipe.interop.dcp_pickles import Record, unpickled
from fnrecipe.runtime.files import read

METADATA, OURS = ".metadata", "fnrecipe"
_FILE = re.compile(r"[\w.-]+\.distcp")
_MAX_BYTES = 1 << 30


@attrs.frozen
class _Item:
    """Where a slice of a tensor lies: its offsets and sizes in the tensor, and a range of bytes in a file."""

    offsets: Sequence[int]
    sizes: Sequence[int]
    file: str
    start: int
    length: int


class _Planner(DefaultSavePlanner):
    """Reads each tensor when it is about to be written: no two are in memory."""

    def __init__(self, found: Checkpoint, facts: Tensor) -> None:
        super().__init__()
        self._found, self._facts = found, facts

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        path = write_item.index.fqn
        return self._facts if path == OURS else whole(self._found, path)


def write(found: Checkpoint, out: Path) -> None:
    """Writes a checkpoint as a distributed one to the directory `out`, which is made; it is there complete or not at all.

    Raises:
        UsageError: if it is there already, or cannot be written.
    """
    if out.exists():
        raise UsageError(f"{out}: expected a new directory, found one that is there")
    text = json.dumps({"step": found.step, "cursor": found.cursor, "files": found.files})
    facts = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    like = {
        path: torch.empty(tuple(saved.shape), dtype=getattr(torch, saved.dtype), device="meta")
        for path, saved in found.tensors.items()
    }
    tmp = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # A file for each tensor, because the writer keeps what it has put into a file until that is closed.
            writer = FileSystemWriter(tmp, single_file_per_rank=False)
            save({**like, OURS: facts}, storage_writer=writer, planner=_Planner(found, facts), no_dist=True)
        tmp.rename(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot write it: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def convert_back(path: Path, root: Path) -> Path:
    """Writes a distributed checkpoint that fnrecipe has written as a checkpoint below `root`; all of it is in memory.

    Raises:
        UsageError: if it is another one, is damaged, or has more in it than tensors; if there is one of its step.
    """
    try:
        items = _items(unpickled(read(path / METADATA, _MAX_BYTES)))
        tensors = {name: _tensor(path, *entry) for name, entry in items.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        found = shortened(one_line(str(error)) or type(error).__name__, 300)
        raise UsageError(f"{path}: expected a distributed checkpoint of tensors, found {found}") from None
    if OURS not in tensors:
        raise UsageError(f"{path}: expected a distributed checkpoint of fnrecipe, found no {OURS!r}, by which step it is")
    try:
        facts = json.loads(tensors.pop(OURS).numpy().tobytes())
        step, cursor, files = facts["step"], facts["cursor"], facts["files"]
        state = nested(tensors)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: expected {OURS!r} as fnrecipe writes it, found {one_line(str(error))}") from None
    if not isinstance(step, int) or checkpoint.step_of(root / f"step_{step:08d}") != step:
        raise UsageError(f"{path}: expected the number of a step, found {shortened(repr(step), 60)}")
    if (root / f"step_{step:08d}").exists():
        raise UsageError(f"{root}: expected no checkpoint of step {step:,}, found one")
    return checkpoint.save(root, step, state, cursor, files)


def _items(metadata: Any) -> dict[str, tuple[str, Sequence[int], list[_Item]]]:
    """The dtype, the shape and the slices of each tensor."""
    found: dict[str, tuple[str, Sequence[int], list[_Item]]] = {}
    for name, described in metadata.state["state_dict_metadata"].items():
        if "size" not in (described.state or {}):
            raise ValueError(f"{one_line(name)}, which is no tensor")
        dtype = described.state["properties"].state[0]
        sizes = {tuple(chunk.state["offsets"]): tuple(chunk.state["sizes"]) for chunk in described.state["chunks"]}
        found[name] = dtype, described.state["size"], [_Item(offsets, size, "", 0, 0) for offsets, size in sizes.items()]
    places = {_key(index): info.state for index, info in metadata.state["storage_data"].items()}
    for name, (dtype, shape, items) in found.items():
        located = [(item, places[name, tuple(item.offsets)]) for item in items]
        placed = [
            attrs.evolve(item, file=place["relative_path"], start=place["offset"], length=place["length"])
            for item, place in located
            if not place.get("transform_descriptors")
        ]
        if len(placed) != len(items):
            raise ValueError(f"{one_line(name)}, which was transformed, compressed say")
        found[name] = dtype, shape, placed
    return found


def _key(index: Record) -> tuple[str, tuple[int, ...]]:
    return index.state["fqn"], tuple(index.state["offset"] or ())


def _tensor(path: Path, dtype: str, shape: Sequence[int], items: Sequence[_Item]) -> Tensor:
    """A tensor of its slices, each element of which must be in one of them."""
    result = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    covered = torch.zeros(tuple(shape), dtype=torch.int8)
    for item in items:
        where = tuple(slice(start, start + size) for start, size in zip(item.offsets, item.sizes, strict=True))
        values = _slice(path, item, result.dtype)
        if tuple(values.shape) != tuple(item.sizes) or result[where].shape != values.shape:
            raise ValueError("a slice of another shape")
        result[where] = values
        covered[where] += 1
    if not bool((covered == 1).all()):
        raise ValueError("slices that do not make up a tensor")
    return result


def _slice(path: Path, item: _Item, dtype: torch.dtype) -> Tensor:
    """A slice: a ZIP archive with a pickle of strides and the bytes of the storage; of each its sum is checked."""
    if not _FILE.fullmatch(item.file):
        raise ValueError(f"a file {item.file!r}")
    with (path / item.file).open("rb") as file:
        file.seek(item.start)
        data = file.read(item.length)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (described,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = described.removesuffix("data.pkl")
        if archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("numbers of another byte order")
        storage, offset, size, stride, *_ = unpickled(archive.read(described))
        content = bytearray(archive.read(f"{folder}data/{storage[2]}"))
    numbers = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return numbers.as_strided(size, stride, offset)
