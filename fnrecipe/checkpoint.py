"""Checkpoints that are complete or not there.

    step_00000100/state_0000.safetensors   rank 0's parts of the state's tensors, by dotted path; state_0001 rank 1's, …
    step_00000100/state.json               step, stream cursor, fingerprints of the data, and for every tensor its dtype, its
                                           shape, and which file has which slice of it
    step_00000100/SHA256SUMS               written last: `sha256sum -c SHA256SUMS` checks a checkpoint without fnrecipe

A checkpoint is written beside its place, synced to disk and renamed: the rename is the only commit. All ranks write and read
together, in a directory that all of them see; none of them holds more than its own part. Loading checks every byte against
SHA256SUMS, each rank some of the files, unpickles nothing, and falls back to the checkpoint before a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import safetensors

from fnrecipe import shards
from fnrecipe.errors import CheckpointError
from fnrecipe.files import sync
from fnrecipe.gang import Gang, gather
from fnrecipe.parts import Mesh
from fnrecipe.shards import Saved
from fnrecipe.tree import Tree

FORMAT = 3
_NAME = re.compile(r"step_(\d{8,})")
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.]+)\n")
_STATE, _SUMS = "state.json", "SHA256SUMS"

T = TypeVar("T")


@attrs.frozen(eq=False)
class Checkpoint:
    """A state at rest: its directory, step, cursor of the stream behind it, fingerprints of the data's files, its tensors."""

    place: Path
    step: int
    cursor: Any
    files: dict[str, str]
    tensors: dict[str, Saved]


def save(
    root: Path, step: int, state: Tree, cursor: Any, files: Mapping[str, str], gang: Gang = Gang(), mesh: Mesh = Mesh()
) -> Path:
    """Writes the checkpoint of `step` below `root`; one that is already there, and whole, stays as it is.

    Raises:
        CheckpointError: on every rank, if one of them cannot write; what was there before is still there.
    """
    place = _place(root, step)
    beside, name = place.with_suffix(".tmp"), f"state_{gang.rank:04d}.safetensors"
    if place.exists() and not _damage(place, gang):
        return place

    def write() -> tuple[str, dict[str, Any]]:
        written = shards.write(beside / name, state, mesh)
        if not written:
            return "", {}
        sync(beside / name)
        return f"{_digest(beside / name)}  {name}\n", {path: attrs.astuple(saved) for path, saved in written.items()}

    def commit(lines: Sequence[str], tensors: Mapping[str, Saved]) -> None:
        _write_state(beside, lines, {"step": step, "cursor": cursor, "files": dict(files)}, tensors)
        beside.rename(place)
        for later in committed(root):
            if _step(later) > step:  # damaged, or the run would have gone on from there; `prune` must not count it
                _set_aside(later)
        sync(root)

    _on_all_ranks(gang, place, lambda: _make_room(place, beside) if gang.leads else None)
    lines, written = zip(*_on_all_ranks(gang, place, write), strict=True)
    lines = tuple(filter(None, lines))
    tensors = shards.merged({path: Saved(*saved) for path, saved in rank.items()} for rank in written)
    _on_all_ranks(gang, place, lambda: commit(lines, tensors) if gang.leads else None)
    return place


def newest(root: Path, warn: Callable[[str], None], gang: Gang = Gang()) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole; None if there is none at all.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged.
    """
    steps = gather(gang, [_step(place) for place in committed(root)])[0]
    for step in reversed(steps):
        damage = _damage(_place(root, step), gang)
        if not damage:
            return _read(_place(root, step))
        warn(f"{_place(root, step)}: damaged checkpoint passed over: {damage}")
    if steps:
        raise CheckpointError(f"{root}: every checkpoint is damaged; move the directory away to start from scratch")
    return None


def restore(checkpoint: Checkpoint, like: Tree) -> Tree:
    """The checkpoint's tensors in the structure of `like`, cut like it, on its devices.

    Raises:
        CheckpointError: naming each tensor that is missing, unknown, or of another dtype or shape; if it cannot be read.
    """
    problems = shards.mismatches(checkpoint.tensors, like)
    if problems:
        raise CheckpointError("\n".join(["the checkpoint does not fit this config", *problems]))
    try:
        return shards.read(checkpoint.place, checkpoint.tensors, like)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.place}: cannot read the checkpoint: {error}") from error


def prune(root: Path, keep: int, after: int = -1) -> None:
    """Removes all but the `keep` newest checkpoints, if they are of steps after `after`, and what a killed process left."""
    for place in [place for place in committed(root) if _step(place) > after][:-keep]:
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


def _on_all_ranks(gang: Gang, place: Path, work: Callable[[], T]) -> list[T]:
    """What `work` gives on each rank.

    Raises:
        CheckpointError: on all ranks, if it failed on one of them.
    """
    given, problem = None, ""
    try:
        given = work()
    except (OSError, safetensors.SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    results = gather(gang, [given, problem])
    for rank, (_, problem) in enumerate(results):
        if problem:
            shutil.rmtree(place.with_suffix(".tmp"), ignore_errors=True)
            by = "" if gang.alone else f"rank {rank}: "
            raise CheckpointError(f"{place}: cannot write the checkpoint: {by}{problem}")
    return [given for given, _ in results]


def _make_room(place: Path, beside: Path) -> None:
    if place.exists():
        _set_aside(place)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)


def _write_state(beside: Path, lines: Sequence[str], facts: Mapping[str, Any], tensors: Mapping[str, Saved]) -> None:
    names = [line.split()[1] for line in lines]
    saved = {path: attrs.astuple(saved) for path, saved in tensors.items()}
    document = {"format": FORMAT, **facts, "shards": names, "tensors": saved}
    (beside / _STATE).write_text(_lines(document) + "\n")
    (beside / _SUMS).write_text("".join([*lines, f"{_digest(beside / _STATE)}  {_STATE}\n"]))
    for path in (beside / _STATE, beside / _SUMS, beside):
        sync(path)


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a mapping, and none for those of a list."""
    if not isinstance(value, dict):
        return json.dumps(value)
    entries = [f"{indent} {json.dumps(key)}: {_lines(entry, indent + ' ')}" for key, entry in value.items()]
    return "\n".join(["{", ",\n".join(entries), indent + "}"]) if entries else "{}"


def _read(place: Path) -> Checkpoint:
    document = json.loads((place / _STATE).read_text())
    if document["format"] != FORMAT:
        raise CheckpointError(f"{place}: expected checkpoint format {FORMAT}, found {document['format']}")
    tensors = {path: Saved(*saved) for path, saved in document["tensors"].items()}
    return Checkpoint(place, document["step"], document["cursor"], document["files"], tensors)


def _damage(place: Path, gang: Gang) -> str:
    """What is wrong with the bytes of a checkpoint, of whose files each rank looks at some; empty if nothing."""
    try:
        found = _damage_of_files(place, gang.rank, gang.size)
    except (OSError, UnicodeDecodeError) as error:
        found = str(error)
    return next(filter(None, gather(gang, found)), "")


def _damage_of_files(place: Path, rank: int, size: int) -> str:
    text = (place / _SUMS).read_text()
    sums = {name: digest for digest, name in _LINE.findall(text)}
    if "".join(f"{digest}  {name}\n" for name, digest in sums.items()) != text:
        return f"{_SUMS} is not what was written"
    shares = [_STATE, *[name for name in sums if name != _STATE][rank::size]]
    if any(_digest(place / name) != sums.get(name) for name in shares):
        return f"its files are not what {_SUMS} says"
    document = json.loads((place / _STATE).read_text())
    if document["format"] == FORMAT and list(sums) != [*document["shards"], _STATE]:
        return f"{_SUMS} does not have all files"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(place: Path) -> None:
    aside = place.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)
