"""Copies of checkpoints, complete or not there, as checkpoints themselves are."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fnrecipe.checkpoint.damage import DAMAGE, STATE, SUMS, described, problem, told
from fnrecipe.checkpoint.places import step_of
from fnrecipe.errors import CheckpointError
from fnrecipe.runtime.files import check_kind, read, sync


def copy(source: Path, root: Path, *, link: bool = False) -> Path:
    """Copies the checkpoint in the directory `source` into the directory `root`; with `link`, by hard links to its files.

    It is there, under its own name, once every byte of it has been read back from disk. One that is there already stays.

    Raises:
        CheckpointError: if it is damaged, cannot be written, or another one of its name is there.
    """
    step, target = step_of(source), root / source.name
    assert step is not None
    try:
        found, _ = described(source, step)
        if os.path.lexists(target):
            return _same(source, target, step)
        with arriving(target, str(source)) as tmp:
            for name in (*found.shards, STATE, SUMS):
                _put(source / name, tmp / name, link)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot copy the checkpoint: {_advice(error)}") from error
    except DAMAGE as error:
        raise CheckpointError(f"{source}: expected a whole checkpoint, found a damaged one: {told(error)}") from error
    return target


@contextmanager
def arriving(target: Path, source: str) -> Iterator[Path]:
    """A directory to fill, which becomes the checkpoint `target` once each byte of it has been read back; else it is removed.

    Raises:
        CheckpointError: if it is damaged then; `source` is where it came from.
        OSError: if it cannot be made.
    """
    tmp, step = target.with_name(f"{target.name}.tmp"), step_of(target)
    assert step is not None
    shutil.rmtree(tmp, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    tmp.mkdir()
    try:
        yield tmp
        sync(tmp)
        if damage := problem(tmp, step, every_byte=True):
            raise CheckpointError(f"{source}: expected a whole checkpoint, found a damaged copy: {damage}")
        tmp.rename(target)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    sync(target.parent)


def _same(source: Path, target: Path, step: int) -> Path:
    """The checkpoint `target`, if it is whole, and its sums are those of `source`."""
    damage = problem(target, step, every_byte=True)
    if damage:
        raise CheckpointError(f"{target}: expected no checkpoint, or a whole one, found a damaged one: {damage}")
    if read(source / SUMS, 1 << 24) != read(target / SUMS, 1 << 24):
        raise CheckpointError(f"{target}: expected no checkpoint, or the same one, found another one of its step")
    return target


def _put(source: Path, target: Path, link: bool) -> None:
    check_kind(source)
    if link:
        os.link(source, target, follow_symlinks=False)
        return
    shutil.copyfile(source, target, follow_symlinks=False)
    times = source.stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    sync(target)
    descriptor = os.open(target, os.O_RDONLY)
    try:  # so that it is read back from the disk, not from memory
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _advice(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return "hard links do not lead to another file system; leave out --link"
    return told(error) if error.filename is None else f"{error.strerror}"
