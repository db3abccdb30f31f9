"""The launcher behind `--nproc`: runs its own command line as several ranks on this machine, which end together.

Torch's launcher is not used: it kills a rank that takes longer than 30 s to save, dies of SIGUSR1, leaves its ranks running
when it is killed, and lets every rank print the same error.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import attrs
import click

from fnrecipe.cli.errors import show
from fnrecipe.errors import EXIT_FAILED, FnrecipeError, UsageError
from fnrecipe.runtime.files import replace
from fnrecipe.runtime.launcher import VARIABLE, launched
from fnrecipe.runtime.signals import EXIT_STATUS, heard

_TICK, _GRACE = 0.05, 5.0


@attrs.frozen
class Word:
    """The last word of a rank, which the launcher shows.

    text      the lines of an error, or a traceback
    status    the rank's exit status
    lost      whether the rank ended because another one did
    """

    text: str
    status: int = EXIT_FAILED
    lost: bool = False
    is_trace: bool = False


def leave(word: Word, directory: Path) -> None:
    """Leaves a rank's word in the rendezvous directory."""
    replace(directory / f"word_{launched().rank}.json", json.dumps(attrs.asdict(word)).encode())


def check_only_launcher() -> None:
    """Checks that no other launcher has started this process as a rank.

    Raises:
        UsageError: if one has.
    """
    here = launched()
    if here.size > 1:
        found = f"rank {here.rank} of {here.size} by the variables of torchrun or Slurm"
        raise UsageError(f"--nproc: expected to be the only launcher, found {found}; leave out one of the two")


def launch(size: int) -> int:
    """Runs this process's own command line as `size` ranks, and shows one error if they fail; returns the exit status.

    The status is that with which one process alone would end.
    """
    with _noted() as received:
        statuses, words = _run(size, received)
    causes = [rank for rank, word in words.items() if not word.lost]
    failed = [rank for rank, status in enumerate(statuses) if _failed(status)]
    killed = [rank for rank in failed if (statuses[rank] or 0) < 0]
    if len(received) > 1 or (received and -received[0] in statuses and not causes):
        signal.raise_signal(received[-1])
    if causes or (words and not killed):
        return _show(words, (causes or list(words))[0], size)
    for rank in killed or failed:
        raise FnrecipeError(f"rank {rank} {_how(statuses[rank])}; the same command goes on from the last checkpoint")
    return max(status or 0 for status in statuses)


def _run(size: int, received: list[signal.Signals]) -> tuple[list[int | None], Mapping[int, Word]]:
    """Starts the ranks and waits for them: their statuses and last words. No rank runs after this."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with TemporaryDirectory(prefix="fnrecipe-", ignore_cleanup_errors=True) as directory:
            try:
                _set_variables(size, directory)
                for rank in range(size):
                    ranks.append(_start(rank))
                return _wait(ranks, received), _words(size, Path(directory))
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
    except OSError as error:
        raise FnrecipeError(f"--nproc: cannot start {size} processes: {error}") from error


def _set_variables(size: int, directory: str) -> None:
    """Sets the variables that all ranks share; does not override the user's number of threads and network interface."""
    os.environ[VARIABLE] = f"{os.getpid()}:{directory}"
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(size)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // size, 1)))
    if sys.platform == "linux":  # the host name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _start(rank: int) -> subprocess.Popen[bytes]:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    return subprocess.Popen([sys.executable, *sys.orig_argv[1:]])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: list[signal.Signals]) -> list[int | None]:
    """The exit statuses of all ranks when they have ended; None for those that still run `_GRACE` seconds after a failure.

    The first signal is forwarded to the ranks, the second ends the wait.
    """
    deadline, sent = math.inf, False
    while True:
        statuses = [process.poll() for process in ranks]
        if None not in statuses or time.monotonic() > deadline or len(received) > 1:
            return statuses
        if any(map(_failed, statuses)):
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(_TICK)
        if received and not sent:
            del received[1:]  # sent to this process and to its process group, a signal arrives twice
            for process in ranks:
                process.send_signal(received[0])
            sent = True


def _words(size: int, directory: Path) -> dict[int, Word]:
    paths = {rank: directory / f"word_{rank}.json" for rank in range(size)}
    return {rank: Word(**json.loads(path.read_text(encoding="utf-8"))) for rank, path in paths.items() if path.exists()}


def _show(words: Mapping[int, Word], rank: int, size: int) -> int:
    """Shows the word of `rank`, with its rank unless all ranks have the same word; returns the exit status."""
    word = words[rank]
    if word.is_trace:
        click.echo(word.text, err=True, nl=False)
    else:
        show(word.text, None if list(words.values()) == [word] * size else rank)
    return word.status


def _failed(status: int | None) -> bool:
    return status is not None and status not in (0, *EXIT_STATUS.values())


def _how(status: int | None) -> str:
    assert status is not None
    names = {each.value: each.name for each in signal.Signals}
    return f"was ended by {names.get(-status, f'signal {-status}')}" if status < 0 else f"ended with status {status}"


@contextmanager
def _noted() -> Iterator[list[signal.Signals]]:
    """Records signals while entered; a SIGHUP that is ignored, as under nohup, stays ignored."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in heard()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
