"""Copies of checkpoints on remote file systems, complete or not there.

checkpoints/step_00000100/state_0000.safetensors, …, state.json   as on the disk, each read back once it is written
checkpoints/step_00000100/SHA256SUMS                              written last: what lacks it is no checkpoint
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from fnrecipe.checkpoint import keep, manifest
from fnrecipe.checkpoint.copy import arriving
from fnrecipe.checkpoint.damage import DAMAGE, MAX_SUMS, STATE, SUMS, described, problem, told
from fnrecipe.checkpoint.keep import Policy
from fnrecipe.checkpoint.places import CHECKPOINTS, step_of
from fnrecipe.errors import CheckpointError
from fnrecipe.runtime.files import opened, read
from fnrecipe.runtime.remote import RemoteDirectory


def complete(there: RemoteDirectory) -> dict[str, int]:
    """The names of the complete checkpoints, with their steps, the oldest first."""
    return _steps({name.split("/")[1] for name in there.names() if _is_in_checkpoint(name) and name.endswith(f"/{SUMS}")})


def upload(source: Path, there: RemoteDirectory) -> str:
    """Copies the checkpoint in the directory `source`; its address. One that is complete there already stays.

    Its files may be removed meanwhile, as a run prunes them.

    Raises:
        CheckpointError: if it is damaged, or another one of its name is there.
        FnrecipeError: if it cannot be written or read back.
    """
    step, base = step_of(source), f"{CHECKPOINTS}/{source.name}"
    assert step is not None
    with ExitStack() as stack:
        try:
            found, sums = described(source, step)
            files = {name: stack.enter_context(open(opened(source / name), "rb")) for name in (*found.shards, STATE)}
            marker = read(source / SUMS, MAX_SUMS)
        except DAMAGE as error:
            raise CheckpointError(f"{source}: expected a whole checkpoint, found a damaged one: {told(error)}") from error
        if source.name in complete(there):
            _check_same(there, base, marker)
            return f"{there.address}/{base}"
        for name, file in files.items():
            if there.write(f"{base}/{name}", file) != sums[name]:
                raise CheckpointError(
                    f"{source}: expected a whole checkpoint, found a damaged one: {name} is not what {SUMS} says"
                )
    there.write(f"{base}/{SUMS}", io.BytesIO(marker))
    return f"{there.address}/{base}"


def download(there: RemoteDirectory, name: str, root: Path) -> Path:
    """Copies the checkpoint `name` into the directory `root`, where it is once every byte has been verified.

    Raises:
        CheckpointError: if it is damaged, cannot be written, or another one of its name is in `root`.
        FnrecipeError: if it cannot be read.
    """
    base, target = f"{CHECKPOINTS}/{name}", root / name
    where, step = f"{there.address}/{base}", step_of(target)
    assert step is not None
    try:
        if os.path.lexists(target):
            if damage := problem(target, step, every_byte=True):
                raise CheckpointError(f"{target}: expected no checkpoint, or a whole one, found a damaged one: {damage}")
            _check_same(there, base, read(target / SUMS, MAX_SUMS))
            return target
        with arriving(target, where) as tmp:
            there.fetch(f"{base}/{SUMS}", tmp / SUMS, MAX_SUMS)
            there.fetch(f"{base}/{STATE}", tmp / STATE, manifest.MAX_BYTES)
            for shard in described(tmp, step)[0].shards:  # names that the manifest may have: none leads elsewhere
                there.fetch(f"{base}/{shard}", tmp / shard)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot copy the checkpoint: {told(error)}") from error
    except DAMAGE as error:
        raise CheckpointError(f"{where}: expected a whole checkpoint, found a damaged copy: {told(error)}") from error
    return target


def prune(there: RemoteDirectory, policy: Policy, scores: Mapping[int, float], *, untouched: int = -1) -> None:
    """Keeps what a policy says, as a run's directory does, but whole; and removes older halves that killed uploads left."""
    names = there.names()
    steps = {name: step for name, step in complete(there).items() if name.startswith("step_")}
    kept = keep.plan([keep.Entry(step, scores.get(step)) for step in steps.values()], policy, untouched=untouched)
    newest = max(steps.values(), default=-1)
    whole = {name.split("/")[1] for name in names if name.endswith(f"/{SUMS}")}
    halves = _steps({name.split("/")[1] for name in names if _is_in_checkpoint(name)} - whole)
    gone = [name for name, step in steps.items() if step in kept.removed]
    _remove(there, [*gone, *(name for name, step in halves.items() if step < newest)])


def forget_after(there: RemoteDirectory, step: int) -> None:
    """Removes the checkpoints after `step`, the newest first."""
    _remove(there, [name for name, each in reversed(complete(there).items()) if each > step])


def _remove(there: RemoteDirectory, names: Collection[str]) -> None:
    for name in names:
        there.remove(f"{CHECKPOINTS}/{name}/{SUMS}")  # first: nobody finds a checkpoint with some of its files
        there.remove_folder(f"{CHECKPOINTS}/{name}")


def _check_same(there: RemoteDirectory, base: str, sums: bytes) -> None:
    if there.read(f"{base}/{SUMS}", MAX_SUMS) != sums:
        raise CheckpointError(f"{there.address}/{base}: expected the same checkpoint, found another one of its step")


def _is_in_checkpoint(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == CHECKPOINTS and step_of(Path(parts[1])) is not None


def _steps(names: Collection[str]) -> dict[str, int]:
    steps = {name: step for name in names if (step := step_of(Path(name))) is not None}
    return dict(sorted(steps.items(), key=lambda item: item[1]))
