"""Checkpoints that are complete or not there.

    step_00000100/state.safetensors   the tensors of the state, by dotted path
    step_00000100/state.json          step, stream cursor, fingerprints of the data, dtype and shape of every tensor
    step_00000100/SHA256SUMS          written last: `sha256sum -c SHA256SUMS` checks a checkpoint without fnrecipe

A checkpoint is written beside its place, synced to disk and renamed: the rename is the only commit. Loading checks every
byte against SHA256SUMS, unpickles nothing, and falls back to the checkpoint before a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
from torch import Tensor

from fnrecipe import tree
from fnrecipe.errors import CheckpointError
from fnrecipe.files import sync
from fnrecipe.tree import Tree

FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")
_FILES = ("state.safetensors", "state.json")
_SUMS = "SHA256SUMS"


@attrs.frozen(eq=False)
class Checkpoint:
    """A state at rest: step, cursor of the stream behind it, fingerprints of the data's files, tensors by dotted path."""

    step: int
    cursor: Any
    files: dict[str, str]
    tensors: dict[str, Tensor]


def save(root: Path, step: int, state: Tree, cursor: Any, files: Mapping[str, str]) -> Path:
    """Writes the checkpoint of `step` below `root`; one that is already there, and whole, stays as it is.

    Raises:
        CheckpointError: if it cannot be written; what was there before is still there.
    """
    place = _place(root, step)
    if place.exists() and not _damage(place):
        return place
    beside = place.with_suffix(".tmp")
    try:
        if place.exists():
            _set_aside(place)
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        _write(beside, step, state, cursor, files)
        beside.rename(place)
        for later in committed(root):
            if _step(later) > step:  # damaged, or the run would have gone on from there; `prune` must not count it
                _set_aside(later)
        sync(root)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{place}: cannot write the checkpoint: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{place}: cannot write the checkpoint: {error}") from error
    return place


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole; None if there is none at all.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged.
    """
    places = committed(root)
    for place in reversed(places):
        damage = _damage(place)
        if not damage:
            return _read(place)
        warn(f"{place}: damaged checkpoint passed over: {damage}")
    if places:
        raise CheckpointError(f"{root}: every checkpoint is damaged; move the directory away to start from scratch")
    return None


def read(root: Path, step: int) -> Checkpoint:
    """The checkpoint of `step` below `root`.

    Raises:
        CheckpointError: if it is not there, or damaged.
    """
    place = _place(root, step)
    damage = _damage(place)
    if damage:
        raise CheckpointError(f"{place}: damaged checkpoint: {damage}")
    return _read(place)


def restore(checkpoint: Checkpoint, like: Tree) -> Tree:
    """The tree of the checkpoint's tensors in the structure of `like`, on its devices.

    Raises:
        CheckpointError: naming each tensor that is missing, unknown, or of another dtype or shape.
    """
    wanted = tree.paths(like)
    found = checkpoint.tensors
    problems = [f"{path}: not in the checkpoint" for path in wanted.keys() - found.keys()]
    problems += [f"{path}: not in the state of this config" for path in found.keys() - wanted.keys()]
    for path in wanted.keys() & found.keys():
        if _kind(wanted[path]) != _kind(found[path]):
            problems.append(f"{path}: expected {_kind(wanted[path])}, found {_kind(found[path])} in the checkpoint")
    if problems:
        raise CheckpointError("\n".join(["the checkpoint does not fit this config", *sorted(problems)]))
    return tree.from_paths(like, {path: found[path].to(leaf.device) for path, leaf in wanted.items()})


def prune(root: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what a killed process left half written."""
    for place in committed(root)[:-keep]:
        gone = place.with_suffix(".tmp")
        place.rename(gone)
        shutil.rmtree(gone)
    for place in root.glob("step_*.tmp"):
        shutil.rmtree(place, ignore_errors=True)


def committed(root: Path) -> list[Path]:
    """The checkpoint directories below `root`, oldest first."""
    if not root.is_dir():
        return []
    places = [place for place in root.iterdir() if _NAME.fullmatch(place.name) and place.is_dir() and not place.is_symlink()]
    return sorted(places, key=_step)


def _place(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def _step(place: Path) -> int:
    match = _NAME.fullmatch(place.name)
    assert match
    return int(match[1])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _write(place: Path, step: int, state: Tree, cursor: Any, files: Mapping[str, str]) -> None:
    tensors = {path: leaf.detach().cpu().contiguous() for path, leaf in tree.paths(state).items()}
    safetensors.torch.save_file(tensors, place / "state.safetensors")
    kinds = {path: _kind(tensor) for path, tensor in tensors.items()}
    document = {"format": FORMAT, "step": step, "cursor": cursor, "files": dict(files), "tensors": kinds}
    (place / "state.json").write_text(_lines(document) + "\n")
    (place / _SUMS).write_text("".join(f"{_digest(place / name)}  {name}\n" for name in _FILES))
    for name in (*_FILES, _SUMS):
        sync(place / name)
    sync(place)


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a mapping, and none for those of a list."""
    if not isinstance(value, dict):
        return json.dumps(value)
    entries = [f"{indent} {json.dumps(key)}: {_lines(entry, indent + ' ')}" for key, entry in value.items()]
    return "\n".join(["{", ",\n".join(entries), indent + "}"]) if entries else "{}"


def _read(place: Path) -> Checkpoint:
    document = json.loads((place / "state.json").read_text())
    if document["format"] != FORMAT:
        raise CheckpointError(f"{place}: expected checkpoint format {FORMAT}, found {document['format']}")
    try:
        tensors = safetensors.torch.load_file(place / "state.safetensors")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{place}: expected safetensors, found {error}") from error
    return Checkpoint(document["step"], document["cursor"], document["files"], tensors)


def _damage(place: Path) -> str:
    """What is wrong with the bytes of a checkpoint; empty if nothing is."""
    try:
        sums = (place / _SUMS).read_text()
        expected = "".join(f"{_digest(place / name)}  {name}\n" for name in _FILES)
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return "" if sums == expected else f"its files are not what {_SUMS} says"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(place: Path) -> None:
    aside = place.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)
