"""One run at a time in an output directory, which stays where it is while the run goes on."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fnrecipe.errors import FnrecipeError, UsageError
from fnrecipe.runtime.files import make_folder, opened
from fnrecipe.shell.directory.layout import LOCK


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes `out` if need be, for what the context writes there.

    Raises:
        UsageError: if it cannot be made or written to.
    """
    try:
        make_folder(out)
        yield
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: expected a directory to write to, found a file") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot write to the output directory: {error.strerror}") from None


@contextmanager
def claimed(out: Path) -> Iterator[int]:
    """Makes `out` if need be and holds it for this process alone; gives a descriptor of it, by which `check_claim` knows it.

    Raises:
        UsageError: if it cannot be made or written to, or another run holds it.
    """
    with writing(out):
        for folder in ("metrics", "logs"):
            (out / folder).mkdir(exist_ok=True)
        claim = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    with _closed(claim), _closed(_open_lock(out)) as lock:
        _hold(out, lock)
        yield claim


def check_claim(out: Path, claim: int | None) -> None:
    """Whether `out` is still the directory that was claimed; None where it was not.

    Raises:
        FnrecipeError: if it was removed, renamed or replaced.
    """
    if claim is None:
        return
    there = False
    with suppress(FileNotFoundError, NotADirectoryError):
        there = os.path.samestat(out.stat(), os.fstat(claim))
    if not there:
        raise FnrecipeError(f"{out}: the output directory was removed, renamed or replaced while the run was writing to it")


def _open_lock(out: Path) -> int:
    path = out / LOCK
    try:
        return opened(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UsageError(f"{path}: cannot open the lock of the output directory: {error.strerror}") from None


def _hold(out: Path, lock: int) -> None:
    """Locks the open file `lock` and writes the number of this process into it, and a word that no other claim has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").partition("\n")[0]
        process = holder if holder.isdecimal() else "unknown"
        raise UsageError(f"{out}: another run (process {process}) is writing here") from None
    except OSError as error:
        advice = "choose an output directory on a file system that locks files"
        raise UsageError(f"{out}: cannot lock the output directory: {error.strerror}; {advice}") from None
    with writing(out):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n{secrets.token_hex(16)}\n".encode(), 0)
        os.fsync(lock)


@contextmanager
def _closed(descriptor: int) -> Iterator[int]:
    """The open file `descriptor`, closed after the context."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)
