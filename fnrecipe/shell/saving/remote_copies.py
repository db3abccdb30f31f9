"""Copies of a run on remote file systems: its checkpoints, its config and its records, there and back."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fnrecipe import checkpoint
from fnrecipe.checkpoint import remote
from fnrecipe.errors import CheckpointError, UsageError
from fnrecipe.runtime.remote import RemoteDirectory, remote_directory
from fnrecipe.shell.directory import layout, lock
from fnrecipe.shell.saving.listing import checkpoint_at, root_of
from fnrecipe.shell.saving.local_copies import FACTS, RECORDS, check_same, copy_records, records

_RECORD = re.compile(rf"({'|'.join(RECORDS)})/[^/\0]+\.jsonl")
_log = logging.getLogger(__name__)


def copy_to(path: Path, address: str, steps: Sequence[int] = ()) -> list[str]:
    """Copies checkpoints of the run or checkpoint `path` to an address: those of `steps`, or the newest whole one.

    Returns their addresses. What the run has written of itself comes along, but for records that are further there.

    Raises:
        UsageError: if there are none, or another run is there.
        FnrecipeError: if one is damaged or cannot be copied.
    """
    run, there = root_of(path).parent, remote_directory(address)
    found = [checkpoint_at(path, step).directory for step in steps] or [checkpoint_at(path).directory]
    with fetched_records(there) as merged:
        check_same(run, merged)
        copy_records(run, merged)
        upload_records(merged, there)
    return [remote.upload(directory, there) for directory in found]


def copy_from(address: str, out: Path, steps: Sequence[int] = ()) -> list[Path]:
    """Copies checkpoints of the run at an address, or the one that it is of, to the run in `out`; every byte is verified.

    Those of `steps`, or the newest: then damaged ones are passed over, with a warning. What the run has written of itself
    comes along, but for records that `out` has as far.

    Raises:
        UsageError: if there are none, or `out` has another run.
        CheckpointError: if all are damaged.
        FnrecipeError: if one cannot be read.
    """
    folder, _, last = address.rstrip("/").rpartition("/")
    mine = checkpoint.step_of(Path(last))
    there = remote_directory(folder.removesuffix(f"/{layout.CHECKPOINTS}") if mine is not None else address)
    names = _chosen(there, last if mine is not None else "", steps)
    with fetched_records(there) as run:
        check_same(run, out)
        with lock.claimed(out):
            root = out / layout.CHECKPOINTS
            every = bool(steps) or mine is not None
            copied = [remote.download(there, name, root) for name in names] if every else [_newest(there, names, root)]
            copy_records(run, out)
    return copied


def upload_records(run: Path, there: RemoteDirectory) -> None:
    """Writes what a run has written of itself.

    Raises:
        FnrecipeError: if it cannot be written or read back.
    """
    for path in (*(run / name for name in FACTS), *records(run)):
        if path.is_file():
            there.write(str(path.relative_to(run)), io.BytesIO(path.read_bytes()))


@contextmanager
def fetched_records(there: RemoteDirectory, only: Sequence[str] = ()) -> Iterator[Path]:
    """What a run has written of itself there, or those of its files, in a directory for the context.

    Raises:
        FnrecipeError: if it cannot be read.
    """
    with TemporaryDirectory(prefix="fnrecipe-") as folder:
        for name in sorted(there.names()):
            if name in only or (not only and (name in FACTS or _RECORD.fullmatch(name))):
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                there.fetch(name, Path(folder) / name)
        yield Path(folder)


def _chosen(there: RemoteDirectory, mine: str, steps: Sequence[int]) -> list[str]:
    """The names of the checkpoint `mine`, or of those of `steps`, or of all; the newest first.

    Raises:
        UsageError: if one of them is not there, or none is.
    """
    found = remote.complete(there)
    known = ", ".join(f"{step:,}" for step in found.values()) or "none"
    for step in steps:
        if step not in found.values():
            raise UsageError(f"{there.address}: expected a checkpoint of step {step:,}, found those of {known}")
    if not found or (mine and mine not in found):
        raise UsageError(f"{there.address}: expected {mine or 'a run with checkpoints that are complete'}, found {known}")
    wanted = [name for name, step in found.items() if name == mine or (not mine and (not steps or step in steps))]
    return wanted[::-1]


def _newest(there: RemoteDirectory, names: Sequence[str], root: Path) -> Path:
    """The newest of the checkpoints that can be copied and has the whole state."""
    for name in names:
        if not name.startswith("step_"):
            continue
        try:
            return remote.download(there, name, root)
        except CheckpointError as error:
            _log.warning("%s; passed over", error)
    raise CheckpointError(f"{there.address}: expected a whole checkpoint, found none")
