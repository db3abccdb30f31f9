"""Checkpoints as a command line names them: those of a run, of a directory that holds some, or one by its own directory."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import attrs

from fnrecipe import checkpoint
from fnrecipe.checkpoint import Checkpoint
from fnrecipe.checkpoint.damage import problem
from fnrecipe.errors import UsageError
from fnrecipe.shell.directory import layout

_log = logging.getLogger(__name__)


@attrs.frozen
class Listed:
    """A checkpoint that is there, whole or not.

    written  when, in seconds since the epoch
    size     bytes of its files, of which there are `files`
    problem  what keeps it from being loaded; empty if nothing does
    """

    directory: Path
    step: int
    written: float
    size: int
    files: int
    problem: str


def root_of(path: Path) -> Path:
    """The directory with the checkpoints of a run, or of the checkpoint `path`; `path` itself where it holds some.

    Raises:
        UsageError: if there are no checkpoints.
    """
    root = path.parent if checkpoint.step_of(path) is not None else path
    for place in (root / layout.CHECKPOINTS, root):
        if directories(place):
            return place
    found = "none" if path.is_dir() else "no directory"
    raise UsageError(f"{path}: expected a run with checkpoints, or a checkpoint, found {found}")


def directories(root: Path) -> list[Path]:
    """What has the name of a checkpoint in `root`, of whatever kind it is, by step."""
    steps = {path: checkpoint.step_of(path) for path in root.iterdir()} if root.is_dir() else {}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def listed(path: Path, *, every_byte: bool, steps: Sequence[int] = ()) -> list[Listed]:
    """The checkpoints of `path`, or those of `steps`; the one alone that it is, if it is one.

    Raises:
        UsageError: if one of them is not there.
    """
    root = root_of(path)
    mine = checkpoint.step_of(path)
    wanted = list(steps) or ([] if mine is None else [mine])
    there = {step: each for each in directories(root) if (step := checkpoint.step_of(each)) is not None}
    for step in wanted:
        if step not in there:
            known = ", ".join(f"{step:,}" for step in there)
            raise UsageError(f"{root}: expected a checkpoint of step {step:,}, found those of {known}")
    return [_listed(there[step], step, every_byte) for step in wanted or there]


def checkpoint_at(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that `path` is, or the one of `step`, or the newest whole one of the run `path`; each byte is verified.

    Raises:
        UsageError: if there is none.
        CheckpointError: if it is damaged.
    """
    root, mine = root_of(path), checkpoint.step_of(path)
    if step is not None and mine not in (None, step):
        raise UsageError(f"--step {step}: expected the directory of a run, found a checkpoint of step {mine:,}: {path}")
    wanted = mine if step is None else step
    if wanted is not None:
        return checkpoint.of_step(root, wanted)
    found = checkpoint.newest(root, _log.warning)
    assert found is not None
    return found


def _listed(directory: Path, step: int, every_byte: bool) -> Listed:
    files = [entry.stat(follow_symlinks=False) for entry in os.scandir(directory)] if _is_directory(directory) else []
    sizes = [each.st_size for each in files if stat.S_ISREG(each.st_mode)]
    written = max([each.st_mtime for each in files], default=directory.lstat().st_mtime)
    return Listed(directory, step, written, sum(sizes), len(sizes), problem(directory, step, every_byte=every_byte))


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK)
