"""The program, as its users run it, and in this process where the import of torch would cost too much."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest

from fnrecipe.cli import main as cli
from tests.helpers import end, start

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Verb: TypeAlias = Callable[..., Ended]


def fnrecipe(*args: str | bytes | Path, cwd: Path, **environment: str) -> Ended:
    """How `fnrecipe ARGS` ends in a process of its own, started in the directory `cwd`."""
    ended = end(start(*map(os.fsdecode, args), cwd=cwd, env=environment))
    return Ended(ended.status, ended.output, ended.errors)


def python(*args: str | bytes | Path, cwd: Path, **environment: str) -> Ended:
    """How Python ends, which is started anew."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def fnrecipe_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path) -> Ended:
    """How `fnrecipe ARGS` ends in this process; an exception that is no exit goes through.

    Threads that other tests have left behind do not count: for their sake the program would end this process at once, and all
    tests with it.
    """
    monkeypatch.setattr(cli, "left_behind", lambda: False)
    monkeypatch.setattr(sys, "argv", ["fnrecipe", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return Ended(int(caught.value.code or 0), *capsys.readouterr())


def assert_usage_error(ended: Ended, *parts: str) -> None:
    """Exit status 2, nothing on standard output, and a message with `parts` in it instead of a traceback."""
    assert ended.status == 2, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert "error: " in ended.err.lower()
    for part in parts:
        assert part in ended.err
