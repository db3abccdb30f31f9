"""Checkpoints that are complete or not there.

    step_00000100/state_0000.safetensors   rank 0's parts of the state's tensors, by dotted path; state_0001 rank 1's, …
    step_00000100/state.json               step, stream cursor, the run's identity, and for every tensor its dtype, its
                                           shape, and which file has which slice of it
    step_00000100/SHA256SUMS               written last: `sha256sum -c SHA256SUMS` checks a checkpoint without fnrecipe

A checkpoint is written beside its place, synced to disk and renamed: the rename is the only commit. All ranks write and read
together, in a directory that all of them see; none of them holds more than its own part. Loading checks every byte against
SHA256SUMS, each rank some of the files, and SHA256SUMS, state.json, the headers of the files and the directory's name against
each other; it unpickles nothing, follows no link, and falls back to the checkpoint before a damaged one.

    step_00000100.tmp       half written or half removed, by a process that was killed
    step_00000100.damaged   a checkpoint that was found damaged and set aside, until another one is; it counts for nothing
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import safetensors

from fnrecipe.checkpoint import manifest
from fnrecipe.checkpoint import tensors as shards
from fnrecipe.checkpoint.damage import DAMAGE, STATE, SUMS, UNKNOWN, check, described, digest, told, visible_damage
from fnrecipe.checkpoint.manifest import Manifest
from fnrecipe.checkpoint.tensors import Saved
from fnrecipe.errors import CheckpointError
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.files import sync
from fnrecipe.runtime.gang import Gang, all_gather_objects
from fnrecipe.tree import Tree

_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
_TMP, _DAMAGED = ".tmp", ".damaged"
_log = logging.getLogger(__name__)

T = TypeVar("T")


@attrs.frozen(eq=False)
class Checkpoint:
    """A state at rest: its directory, step, cursor of the stream behind it, facts of the run's identity, its tensors."""

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
    beside, name = _beside(place, _TMP), f"state_{gang.rank:04d}.safetensors"
    if all_gather_objects(gang, os.path.lexists(place))[0] and isinstance(_verified(place, gang), Manifest):
        return place

    def write() -> tuple[str, dict[str, Any]]:
        written = shards.write(beside / name, state, mesh)
        if not written:
            return "", {}
        sync(beside / name)
        return f"{digest(beside / name)}  {name}\n", {path: attrs.astuple(saved) for path, saved in written.items()}

    def commit(lines: Sequence[str], tensors: dict[str, Saved]) -> None:
        names = [line.split()[1] for line in lines]
        _write_state(beside, lines, Manifest(step, cursor, dict(files), names, tensors))
        beside.rename(place)
        _set_aside_after(root, step)  # or the run would have gone on from there
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
    steps, aside = all_gather_objects(gang, [[_step(place) for place in _named(root)], bool(_named(root, _DAMAGED))])[0]
    for step in reversed(steps):
        place = _place(root, step)
        found = _verified(place, gang)
        if isinstance(found, Manifest):
            return Checkpoint(place, found.step, found.cursor, found.files, found.tensors)
        if not all_gather_objects(gang, os.path.lexists(place))[0]:  # pruned by another process, which has written newer ones
            return newest(root, warn, gang)
        warn(f"{place}: damaged checkpoint passed over: {found}")
    if steps or aside:
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
    except DAMAGE as error:
        raise CheckpointError(f"{checkpoint.place}: cannot read the checkpoint: {told(error)}") from error


def tidy(root: Path, step: int) -> None:
    """Sets aside the checkpoints after `step`, which `newest` passed over as damaged: the last of them is kept.

    What a killed process left half written is removed.
    """
    _set_aside_after(root, step)
    _remove_halves(root)


def prune(root: Path, keep: int, after: int = -1) -> None:
    """Removes all but the `keep` newest checkpoints of steps after `after`, and what a killed process left half written.

    A damaged checkpoint does not count and is set aside. To find it, all but the bytes of the tensors is read again.
    """
    for place in committed(root):
        problem = visible_damage(place, _step(place))
        if problem:
            _log.warning("%s: damaged checkpoint set aside: %s", place, problem)
            _set_aside(place)
    _remove_halves(root)
    for place in [place for place in committed(root) if _step(place) > after][:-keep]:
        gone = _beside(place, _TMP)
        place.rename(gone)
        shutil.rmtree(gone)


def committed(root: Path) -> list[Path]:
    """The checkpoint directories below `root`, oldest first."""
    return [place for place in _named(root) if place.is_dir() and not place.is_symlink()]


def _named(root: Path, suffix: str = "") -> list[Path]:
    """What is called like a checkpoint below `root`, by its step."""
    try:
        places = [place for place in root.iterdir() if _NAME.fullmatch(place.name.removesuffix(suffix))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((place for place in places if place.name.endswith(suffix)), key=_step)


def _place(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def _beside(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step_").partition(".")[0])


def _on_all_ranks(gang: Gang, place: Path, work: Callable[[], T]) -> list[T]:
    """What `work` gives on each rank.

    Raises:
        CheckpointError: on all ranks, if it failed on one of them.
    """
    given, problem = None, ""
    try:
        given = work()
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    results = all_gather_objects(gang, [given, problem])
    for rank, (_, problem) in enumerate(results):
        if problem:
            shutil.rmtree(_beside(place, _TMP), ignore_errors=True)
            by = "" if gang.alone else f"rank {rank}: "
            raise CheckpointError(f"{place}: cannot write the checkpoint: {by}{problem}")
    return [given for given, _ in results]


def _make_room(place: Path, beside: Path) -> None:
    if os.path.lexists(place):
        _set_aside(place)
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(exist_ok=True)  # not its parents: they are the output directory
    beside.mkdir()


def _write_state(beside: Path, lines: Sequence[str], what: Manifest) -> None:
    (beside / STATE).write_text(manifest.text(what), encoding="utf-8")
    (beside / SUMS).write_text("".join([*lines, f"{digest(beside / STATE)}  {STATE}\n"]), encoding="utf-8")
    for path in (beside / STATE, beside / SUMS, beside):
        sync(path)


def _verified(place: Path, gang: Gang) -> Manifest | str:
    """The manifest of a checkpoint, of whose files each rank reads some; or what is wrong with it.

    Raises:
        CheckpointError: on all ranks, if it is of another format, or of another user who lets nobody read it.
    """
    found: Manifest | None = None
    damage, refusal = "", ""
    try:
        found, sums = described(place, _step(place))
        check(place, found, found.shards[gang.rank :: gang.size], sums)
    except UNKNOWN as error:
        refusal = f"{place}: {told(error)}"
    except DAMAGE as error:
        damage = told(error)
    damages, refusals = zip(*all_gather_objects(gang, [damage, refusal]), strict=True)
    if any(refusals):
        raise CheckpointError(next(filter(None, refusals)))
    if found is None or any(damages):
        return str(next(filter(None, damages)))
    return found


def _set_aside_after(root: Path, step: int) -> None:
    for place in committed(root):
        if _step(place) > step:
            _set_aside(place)


def _set_aside(place: Path) -> None:
    """Renames a damaged checkpoint; it takes the place of the one that was set aside before it."""
    for before in _named(place.parent, _DAMAGED):
        shutil.rmtree(before, ignore_errors=True)
    place.rename(_beside(place, _DAMAGED))


def _remove_halves(root: Path) -> None:
    for place in _named(root, _TMP):
        shutil.rmtree(place, ignore_errors=True)  # which passes over files and links
