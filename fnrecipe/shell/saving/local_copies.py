"""Copies of a run: some of its checkpoints, with its config and records, as a run in another directory."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from fnrecipe.checkpoint.copy import copy as copy_checkpoint
from fnrecipe.config.layers import difference, read_file, values
from fnrecipe.errors import UsageError, few
from fnrecipe.runtime.files import replace
from fnrecipe.shell.directory import layout, lock
from fnrecipe.shell.recording.jsonl import last_step
from fnrecipe.shell.saving.listing import checkpoint_at, root_of

FACTS, RECORDS = (layout.CONFIG, layout.RUN, layout.PRODUCTS, layout.ROLLBACKS), ("metrics", "samples")
"""Files that a run has written of itself, and folders with its records, which go along with its checkpoints."""


def copy(path: Path, out: Path, steps: Sequence[int] = (), *, link: bool = False) -> list[Path]:
    """Copies checkpoints of the run or checkpoint `path` to the run in `out`: those of `steps`, or the newest whole one.

    Returns their directories. What the run has written of itself comes along: its config, and records that `out` has not, or
    not as far.

    Raises:
        UsageError: if there are none, or `out` has another run.
        CheckpointError: if one is damaged or cannot be copied.
    """
    run = root_of(path).parent
    found = [checkpoint_at(path, step).directory for step in steps] or [checkpoint_at(path).directory]
    check_same(run, out)
    with lock.claimed(out):
        copied = [copy_checkpoint(directory, out / layout.CHECKPOINTS, link=link) for directory in found]
        copy_records(run, out)
    return copied


def copy_records(run: Path, out: Path) -> None:
    """Copies config, facts, metrics and samples of a run, but for records that `out` has as far as the run.

    Raises:
        OSError: if that fails.
    """
    for name in FACTS:
        if (run / name).is_file():
            replace(out / name, (run / name).read_bytes())
    for source in records(run):
        target = out / source.parent.name / source.name
        if not target.exists() or last_step(target) < last_step(source):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


def records(run: Path) -> list[Path]:
    """The records of a run."""
    return [path for name in RECORDS for path in sorted((run / name).glob("*.jsonl"))]


def check_same(run: Path, out: Path, runtime: Collection[str] = ()) -> None:
    """Whether `out` has a run with the same config, if it has any; values at the paths `runtime` may differ.

    Raises:
        UsageError: naming what differs.
    """
    if (run / layout.CONFIG).is_file() and (out / layout.CONFIG).is_file():
        old, new = (values(read_file(each / layout.CONFIG, bounded=False)) for each in (out, run))
        changes = [name for name in difference(old, new) if name not in ("regime.num_steps", *runtime)]
        if changes:
            raise UsageError(f"{out}: expected a new directory, or the same run, found one with another {few(changes, 3)}")
