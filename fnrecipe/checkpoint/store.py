"""Checkpoints that are complete or not there.

    step_00000100/state_0000.safetensors   rank 0's shards of the state's tensors, by dotted path, in one file or more by their
                                           size; then rank 1's, …
    step_00000100/state.json               step, stream cursor, fingerprints of the data, and for every tensor its dtype, its
                                           shape, and which file has which slice of it
    step_00000100/SHA256SUMS               written last: `sha256sum -c SHA256SUMS` checks a checkpoint without fnrecipe

    step_00000100.tmp       half written or half removed, by a process that was killed
    step_00000100.damaged   the damaged checkpoint that was set aside last; it counts for nothing
    model_00000100/…        what is kept of an older one: the same files, with the model alone; no run goes on from it

All ranks save and restore together, in a directory that all of them see; none holds more than its own shards. Loading checks
every byte against SHA256SUMS, each rank some of the files, and SHA256SUMS, state.json, the headers of the files and the
directory's name against each other; it unpickles nothing, follows no link, and falls back to the checkpoint before a damaged
one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import attrs

from fnrecipe.checkpoint import places
from fnrecipe.checkpoint import tensors as shards
from fnrecipe.checkpoint.damage import DAMAGE, UNKNOWN, check, described, seal, told
from fnrecipe.checkpoint.manifest import Manifest
from fnrecipe.checkpoint.removal import set_aside, set_aside_after
from fnrecipe.checkpoint.tensors import Entry, Saved, Snapshot
from fnrecipe.data.stream import Cursor
from fnrecipe.errors import CheckpointError
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.runtime.files import sync
from fnrecipe.runtime.gang import Gang, all_gather_objects
from fnrecipe.tree import Tree

T = TypeVar("T")
_log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Checkpoint:
    """A checkpoint that has been verified: its directory, step, stream cursor, fingerprints of the data, and tensors."""

    directory: Path
    step: int
    cursor: Cursor
    files: dict[str, str]
    tensors: dict[str, Saved]


def save(
    root: Path, step: int, state: Tree, cursor: Cursor, files: Mapping[str, str], gang: Gang = Gang(), mesh: Mesh = Mesh()
) -> Path:
    """Writes the checkpoint of `step` below `root`; one that is already there and undamaged stays as it is.

    Raises:
        CheckpointError: on every rank, if one of them cannot write; earlier checkpoints are still there.
    """
    return write(root, step, shards.snapshot(state, mesh), cursor, files, gang)


def write(root: Path, step: int, taken: Snapshot, cursor: Cursor, files: Mapping[str, str], gang: Gang = Gang()) -> Path:
    """Writes the checkpoint of `step` of the ranks' snapshots, as `save` does.

    On a thread beside the step it needs a gang with a process group of its own (`fnrecipe.runtime.gang.apart`).
    """
    # The commit protocol. Everything is written to `step_….tmp` and synced; the rename to `step_…` is the only commit. Killed
    # before it, the run leaves a directory that no reader looks at and the next start removes. Killed after it, or by a loss
    # of power before the rename is on disk, it finds the new checkpoint complete or does not find it at all, because its
    # contents were on disk before the rename. (Files alone, renamed one by one, would leave old and new ones mixed.)
    #
    # The phases (make room, write shards, commit) end with an exchange of results: no rank begins one before all have ended
    # the one before, and what fails on one rank is raised on all, so none waits for another that is gone.
    directory = places.directory_of(root, step)
    tmp = places.with_suffix(directory, places.TMP)
    if all_gather_objects(gang, os.path.lexists(directory))[0] and isinstance(_verified(directory, gang), Manifest):
        return directory

    def make_room() -> int:
        if gang.leads:
            _make_room(directory, tmp)
        return len(taken.dealt())

    def write_shards(first: int) -> tuple[dict[str, str], dict[str, Entry]]:
        sums, tensors = _written(tmp, taken, first)
        return sums, {path: attrs.astuple(saved) for path, saved in tensors.items()}

    def commit(sums: dict[str, str], tensors: dict[str, Saved]) -> None:
        seal(tmp, sums, Manifest(step, cursor, dict(files), list(sums), tensors))
        tmp.rename(directory)
        set_aside_after(root, step)  # or the next start would find a later one, which this run has passed over
        sync(root)

    counts = _on_all_ranks(gang, directory, make_room)  # the files of the ranks before this one have the numbers before its own
    written = _on_all_ranks(gang, directory, lambda: write_shards(sum(counts[: gang.rank])))
    sums = {name: digest for rank, _ in written for name, digest in rank.items()}
    tensors = shards.merged({path: Saved(*saved) for path, saved in rank.items()} for _, rank in written)
    _on_all_ranks(gang, directory, lambda: commit(sums, tensors) if gang.leads else None)
    return directory


def newest(root: Path, warn: Callable[[str], None], gang: Gang = Gang(), *, up_to: int | None = None) -> Checkpoint | None:
    """The newest undamaged checkpoint below `root`, of a step `up_to` that one; None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged.
    """
    # Rank 0 says what there is: file systems may show different ranks different moments.
    aside = bool(places.named(root, places.DAMAGED) or places.named(root, kind=places.MODEL_ALONE))
    steps, aside = all_gather_objects(gang, ([places.step_in(path) for path in places.named(root)], aside))[0]
    if up_to is not None:
        steps, aside = [step for step in steps if step <= up_to], False
    for step in reversed(steps):
        directory = places.directory_of(root, step)
        found = _verified(directory, gang)
        if isinstance(found, Manifest):
            return Checkpoint(directory, found.step, found.cursor, found.files, found.tensors)
        if not all_gather_objects(gang, os.path.lexists(directory))[0]:  # pruned by a run, which has written newer ones
            return newest(root, warn, gang, up_to=up_to)
        warn(f"{directory}: damaged checkpoint passed over: {found}")
    if steps or aside:
        models = ", or holds its model alone" if places.named(root, kind=places.MODEL_ALONE) else ""
        raise CheckpointError(f"{root}: every checkpoint is damaged{models}; move the directory away to start from scratch")
    return None


def of_step(root: Path, step: int, gang: Gang = Gang()) -> Checkpoint:
    """The checkpoint of `step` below `root`, or what holds the model of one alone.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    found = [*places.named(root, kind=places.MODEL_ALONE), *places.named(root)]
    names = all_gather_objects(gang, [path.name for path in found])[0]
    there = {places.step_in(root / name): root / name for name in names}
    if step not in there:
        known = ", ".join(f"{each:,}" for each in sorted(there)) or "no step"
        raise CheckpointError(f"{root}: expected a checkpoint of step {step:,}, found those of {known}")
    directory = there[step]
    held = _verified(directory, gang)
    if not isinstance(held, Manifest):
        raise CheckpointError(f"{directory}: expected a whole checkpoint, found a damaged one: {held}")
    return Checkpoint(directory, held.step, held.cursor, held.files, held.tensors)


def of_run(
    directory: Path, step: int | None = None, gang: Gang = Gang(), *, warn: Callable[[str], None] = _log.warning
) -> Checkpoint:
    """The newest undamaged checkpoint of the run in a directory, or the one of `step`.

    Raises:
        CheckpointError: if there is none.
    """
    root = directory / places.CHECKPOINTS
    found = newest(root, warn, gang) if step is None else of_step(root, step, gang)
    if found is None:
        raise CheckpointError(f"{directory}: expected a checkpoint, found none")
    return found


def restore(checkpoint: Checkpoint, like: Tree) -> Tree:
    """The checkpoint's tensors in the structure of `like`, sharded like it, on its devices.

    Raises:
        CheckpointError: naming each tensor that is missing, unknown, or of another dtype or shape; if it cannot be read.
    """
    problems = shards.mismatches(checkpoint.tensors, like)
    if problems:
        raise CheckpointError("\n".join(["the checkpoint does not fit this config", *problems]))
    try:
        return shards.read(checkpoint.directory, checkpoint.tensors, like)
    except DAMAGE as error:
        raise CheckpointError(f"{checkpoint.directory}: cannot read the checkpoint: {told(error)}") from error


def _on_all_ranks(gang: Gang, directory: Path, work: Callable[[], T]) -> list[T]:
    """The results of `work` on all ranks, once it has ended on all of them.

    Raises:
        CheckpointError: on all ranks, if it failed on one of them.
    """
    result, problem = None, ""
    try:
        result = work()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    results = all_gather_objects(gang, (result, problem))
    for rank, (_, problem) in enumerate(results):
        if problem:
            shutil.rmtree(places.with_suffix(directory, places.TMP), ignore_errors=True)
            by = "" if gang.alone else f"rank {rank}: "
            raise CheckpointError(f"{directory}: cannot write the checkpoint: {by}{problem}")
    return cast("list[T]", [result for result, _ in results])


def _written(folder: Path, taken: Snapshot, first: int) -> tuple[dict[str, str], dict[str, Saved]]:
    """As `fnrecipe.checkpoint.tensors.write`; an error says how far it has come."""
    try:
        return shards.write(folder, taken, first)
    except OSError as error:
        paths = [folder / shards.file_name(first + number) for number in range(len(taken.dealt()))]
        done, needed = sum(path.stat().st_size for path in paths if path.exists()), taken.num_bytes
        raise OSError(error.errno, f"{error.strerror}, behind {done:,} of {needed:,} bytes") from error


def _make_room(directory: Path, tmp: Path) -> None:
    if os.path.lexists(directory):
        set_aside(directory)
    shutil.rmtree(tmp, ignore_errors=True)
    root = tmp.parent
    if not root.exists():
        root.mkdir()  # not its parents: they are the output directory
        sync(root.parent)
    tmp.mkdir()


def _verified(directory: Path, gang: Gang) -> Manifest | str:
    """The manifest of a checkpoint, or what is wrong with it; each rank reads some of its files.

    Raises:
        CheckpointError: on all ranks, if it is of another format, or belongs to another user and is not readable.
    """
    found: Manifest | None = None
    damage, refusal = "", ""
    try:
        found, sums = described(directory, places.step_in(directory))
        check(directory, found, found.shards[gang.rank :: gang.size], sums)
    except UNKNOWN as error:
        refusal = f"{directory}: {told(error)}"
    except DAMAGE as error:
        damage = told(error)
    damages, refusals = zip(*all_gather_objects(gang, (damage, refusal)), strict=True)
    if any(refusals):
        raise CheckpointError(next(filter(None, refusals)))
    if found is None or any(damages):
        return str(next(filter(None, damages)))
    return found
