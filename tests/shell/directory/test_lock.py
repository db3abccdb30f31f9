"""The output directory: one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.errors import FnrecipeError, UsageError
from fnrecipe.shell.directory import lock
from tests.nobody import error_of_nobody, public

HOLD = """
import sys, time
from pathlib import Path
from fnrecipe.shell.directory import layout, lock, same_run
with lock.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_is_held_by_one_process_until_its_death(tmp_path: Path) -> None:
    out = tmp_path / "deep/run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another run \(process {holder.pid}\)"), lock.claimed(out):
            pass
        holder.kill()
        holder.wait()
    with lock.claimed(out):
        assert (out / ".lock").read_text().splitlines()[0] == str(os.getpid())
    with lock.claimed(out):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_directory_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a directory"), lock.claimed(tmp_path / name):
        pass


# The lock is a file of this directory, and nothing else.

LOCKS: dict[str, Callable[[Path], Any]] = {
    "a link": lambda path: path.symlink_to(path.parent / "victim"),
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_is_no_file_is_refused_and_let_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("mine")
    LOCKS[kind](tmp_path / ".lock")
    message = f"{tmp_path}/.lock: cannot open the lock of the output directory: expected a file, found {kind}"
    with pytest.raises(UsageError) as caught, lock.claimed(tmp_path):
        pass
    assert str(caught.value) == message
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_link_to_nothing_makes_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="found a link"), lock.claimed(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"not a number", b"9" * 5000])
def test_a_lock_may_hold_anything(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / ".lock"
    file.write_bytes(content)
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(UsageError, match=r"another run \(process (unknown|9{20})\) is writing here"),
            lock.claimed(tmp_path),
        ):
            pass
    with lock.claimed(tmp_path):
        assert file.read_text().splitlines()[0] == str(os.getpid())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError) as caught, lock.claimed(tmp_path):
        pass
    advice = "choose an output directory on a file system that locks files"
    assert str(caught.value) == f"{tmp_path}: cannot lock the output directory: {os.strerror(number)}; {advice}"


def claim(out: Path) -> None:
    with lock.claimed(out):
        pass


def test_a_lock_of_another_user_is_told() -> None:
    told = "cannot open the lock of the output directory: Permission denied"
    with public() as out:
        for name in ("logs", "metrics"):
            (out / name).mkdir()
        (out / ".lock").touch(mode=0o400)
        assert error_of_nobody(partial(claim, out)) == f"UsageError: {out}/.lock: {told}"


def test_a_directory_of_another_user_is_told() -> None:
    told = "cannot write to the output directory: Permission denied"
    with public() as root:
        out = root / "out"
        out.mkdir(mode=0o555)
        assert error_of_nobody(partial(claim, out)) == f"UsageError: {out}: {told}"
        out.chmod(0o000)
        assert error_of_nobody(partial(claim, out / "below")) == f"UsageError: {out}/below: {told}"


def replaced(out: Path) -> None:
    out.rename(out.with_name("moved"))
    shutil.copytree(out.with_name("moved"), out)


def linked(out: Path) -> None:
    out.rename(out.with_name("moved"))
    (out.parent / "other").mkdir()
    out.symlink_to("other")


GONE: dict[str, Callable[[Path], Any]] = {
    "removed": shutil.rmtree,
    "removed and made again": lambda out: (shutil.rmtree(out), out.mkdir()),
    "renamed": lambda out: out.rename(out.with_name("moved")),
    "replaced by a copy": replaced,
    "replaced by a link": linked,
    "replaced by a file": lambda out: (shutil.rmtree(out), out.touch()),
}


@pytest.mark.parametrize("act", GONE.values(), ids=GONE.keys())
def test_a_claim_ends_with_its_directory(tmp_path: Path, act: Callable[[Path], Any]) -> None:
    out = tmp_path / "out"
    with lock.claimed(out) as claim:
        lock.check_claim(out, claim)
        act(out)
        with pytest.raises(FnrecipeError, match="out: the output directory was removed, renamed or replaced while the run"):
            lock.check_claim(out, claim)


def test_a_link_to_the_directory_is_as_good_as_its_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with lock.claimed(tmp_path / "out") as claim:
        lock.check_claim(tmp_path / "out", claim)
        lock.check_claim(tmp_path / "real", claim)
