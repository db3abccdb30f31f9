"""Commands whose standard output is closed or full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT

COMMAND = [sys.executable, "-m", "fnrecipe.cli"]


def test_a_command_that_nobody_reads_ends_quietly_by_sigpipe() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    ended = subprocess.run([*COMMAND, "dump-config", "lm"], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")


def test_a_command_whose_output_does_not_fit_fails_in_a_line() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*COMMAND, "dump-config", "lm"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"error: cannot write: No space left on device\n")


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_a_wrong_config_keeps_its_status_whatever_the_console(tmp_path: Path, streams: str) -> None:
    command = [*COMMAND, "dump-config", "lm", "--config", "a=1"]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {streams}', "sh", *command], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, b"", b"")
