"""Files written past the page cache, or not: the same bytes, and the same errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fnrecipe.checkpoint import write_file as module
from fnrecipe.checkpoint.write_file import Bytes, write_file

BUFFER = 1 << 14
"""Four blocks, so that small files have more than one piece."""


def parts(*sizes: int) -> list[Bytes]:
    return [np.random.default_rng(number).integers(0, 256, size, np.uint8) for number, size in enumerate(sizes)]


def plain(given: list[Bytes]) -> bytes:
    return b"".join(part.tobytes() for part in given)


def refused(real: Callable[..., Any]) -> Callable[..., Any]:
    """A file system that has no direct writes."""

    def call(descriptor: int, command: int, value: int = 0) -> Any:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, value)

    return call


def unaligned(real: Callable[..., int]) -> Callable[..., int]:
    """A disk that takes direct writes to the first two blocks alone."""

    def call(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 8192 and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data, offset)

    return call


def short(real: Callable[..., int]) -> Callable[..., int]:
    """Writes that take some of the bytes, which are no blocks."""
    return lambda descriptor, data, offset: real(descriptor, data[:5000], offset)


WAYS: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "direct": [],
    "refused": [(fcntl, "fcntl", refused)],
    "refused by the disk": [(os, "pwrite", unaligned)],
    "short": [(os, "pwrite", short)],
    "short and refused": [(fcntl, "fcntl", refused), (os, "pwrite", short)],
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUFFER", BUFFER)
    monkeypatch.setattr(module, "_CACHED", 5000)
    for owner, name, wrapped in WAYS[request.param]:
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1,),
        (4095,),
        (4096,),
        (4097,),
        (BUFFER,),
        (BUFFER + 1,),
        (8, 0, BUFFER - 9),
        (8, 3 * BUFFER, 1, 1, 5 * BUFFER + 7),
    ],
    ids=str,
)
def test_a_file_has_the_bytes_and_their_sum(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    given = parts(*sizes)
    digest = write_file(tmp_path / "file", given)
    assert (tmp_path / "file").read_bytes() == plain(given)
    assert digest == hashlib.sha256(plain(given)).hexdigest()


@pytest.mark.usefixtures("way")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        """What is left of a disk of ten blocks."""
        left = 40960 - offset
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:left], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(tmp_path / "file", parts(100_000))
    assert (tmp_path / "file").stat().st_size == 40960
    assert not [path for path in Path("/proc/self/fd").iterdir() if path.resolve() == tmp_path / "file"]


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
def test_errors_of_a_disk_are_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Invalid argument"):
        write_file(tmp_path / "file", parts(1))


def test_the_mode_is_that_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", parts(1))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_where_the_file_system_lets_them_writes_leave_nothing_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.pwrite

    def watched(descriptor: int, data: memoryview, offset: int) -> int:
        seen.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("a file system without direct writes")
    write_file(tmp_path / "file", parts(module._BUFFER, 5))
    assert seen == [True] * 2
