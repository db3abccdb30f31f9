"""Processes `python -m MODULE ARGS`, forked from one that has imported what they need: what takes seconds is done once.

A zygote is a process that has imported torch and fnrecipe, has started no thread, and has done nothing else. It forks for every
command; the fork runs the module as `python -m` does, with the streams, directory, environment and session that its client asks
for, and is the client's own child, for which the client waits as for any other. A command that starts ranks (`--nproc`) has a
zygote of its own, forked before it does anything, from which its ranks are forked in turn.

What a fork does not have anew is what Python and the libraries read when they start: a command whose environment differs in
that is run in a new process. All forks of a zygote share its seed of hashes and its addresses.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""What tests add to the environment of their commands."""

READ_AT_START = ("PYTHON", "LANG", "LC_", "LD_", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "MKL_", "TORCH", "PYTORCH_")
_BEFORE = {**os.environ, **ENVIRONMENT}
_LARGEST = 2**17  # bytes of a message
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_NAME = b"zygote"


@cache
def zygote() -> type[subprocess.Popen[Any]]:
    """`subprocess.Popen`, but that commands of Python modules are forked from this process's zygote, which is started first."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command, pipe = [sys.executable, "-m", "tests.zygote", str(theirs.fileno())], subprocess.PIPE
    with theirs:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env=_BEFORE, pass_fds=[theirs.fileno()])

    def leave() -> None:
        ours.close()
        process.communicate()

    atexit.register(leave)
    return _popen(ours, _BEFORE)


def _popen(link: socket.socket, before: Mapping[str, str]) -> type[subprocess.Popen[Any]]:
    """The `Popen` of a zygote that had the environment `before` when it started, and listens at `link`."""

    class Popen(subprocess.Popen[Any]):
        def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
            pass_fds, cwd, env, _, _, shell, *pipes, restore_signals, gid, gids, uid, umask, session, group = rest
            environment = {**(os.environ if env is None else env)}
            plain = (executable, preexec_fn, close_fds, pass_fds, shell, restore_signals, gid, gids, uid, umask, group)
            is_plain = plain == (None, None, True, (), False, True, None, None, None, -1, -1)
            if not (is_plain and [*args[:2]] == [sys.executable, "-m"] and at_start(environment) == at_start(before)):
                super()._execute_child(args, executable, preexec_fn, close_fds, *rest)  # type: ignore[misc]
                return
            streams = [end if end != -1 else stream for stream, end in enumerate((pipes[0], pipes[3], pipes[5]))]
            question = [[os.fsdecode(arg) for arg in args], os.fsdecode(cwd or os.getcwd()), environment, session, os.getpid()]
            with _adopting():
                socket.send_fds(link, [json.dumps(question).encode()], streams)
                process, adopted = link.recv(_LARGEST), link.recv(_LARGEST)
            assert adopted, "the zygote has ended"
            self.pid = int(process)
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    return Popen


def children(process: int) -> list[int]:
    """The children of a process, in the order in which they came to it, but for its zygote."""
    ids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in ids if Path(f"/proc/{child}/comm").read_bytes().strip() != _NAME]


def at_start(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that Python and the libraries read when they start."""
    late = "TORCHINDUCTOR_CACHE_DIR"
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START) and name != late}


@contextmanager
def _adopting() -> Iterator[None]:
    """While entered, this process becomes the parent of its descendants whose parents end."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _serve(link: socket.socket) -> str:
    """Forks for each question; returns in the forks, as processes that are about to run a module, with its name.

    The fork of a fork whose parent ends is adopted by the client.

    Raises:
        RuntimeError: if there is a thread beside this one, which a fork would not have.
    """
    while True:
        question, streams, _, _ = socket.recv_fds(link, _LARGEST, 3)
        if not question:
            os._exit(0)
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("a zygote has started a thread")
        between = os.fork()
        if not between:
            process = os.fork()
            if not process:
                return _become(link, streams, *json.loads(question))
            link.send(str(process).encode())
            os._exit(0)
        os.waitpid(between, 0)
        link.send(b"adopted")
        for stream in streams:
            os.close(stream)


def _become(
    link: socket.socket,
    streams: Sequence[int],
    args: list[str],
    cwd: str,
    environment: dict[str, str],
    session: bool,
    parent: int,
) -> str:
    """Makes this process what a new one is that has imported all modules; returns the name of the one to run."""
    import numpy as np
    import torch

    while os.getppid() != parent:
        os.sched_yield()
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    link.close()
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"python")
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.orig_argv, sys.argv, sys.path[0] = args, args[2:], cwd
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _standard_stream(place, getattr(sys, name)))
        setattr(sys, f"__{name}__", getattr(sys, name))
    torch.seed()
    np.random.seed()
    if any(arg.startswith("--nproc") for arg in args):
        return _with_zygote(args[2])
    return args[2]


def _standard_stream(place: int, old: TextIO) -> TextIO:
    """Python's file of a descriptor, made anew as its first one was: what it may do depends on what the descriptor is."""
    is_raw = isinstance(old.buffer, io.RawIOBase)
    buffer = open(place, "wb" if place else "rb", buffering=0 if is_raw else -1, closefd=False)  # noqa: SIM115
    by_lines = old.line_buffering or (not is_raw and buffer.isatty())
    return io.TextIOWrapper(buffer, old.encoding, old.errors, line_buffering=by_lines, write_through=old.write_through)


def _with_zygote(module: str) -> str:
    """Forks a zygote from this process, for the ranks that it is going to start; returns, in both, the module to run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        subprocess.Popen = _popen(ours, {**os.environ})  # type: ignore[misc]
        return module
    ours.close()
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in range(3):
        os.dup2(nothing, place)
    os.close(nothing)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME)
    return _serve(theirs)


def _import() -> None:
    """Imports what a run imports in its first steps, by the way."""
    import torch._dynamo
    import torch._inductor.compiler_bisector
    import torch._subclasses.schema_check_mode  # noqa: F401

    import fnrecipe.cli.main
    import fnrecipe.models.llama.model
    import fnrecipe.recipes.lm.train
    import fnrecipe.shell.train  # noqa: F401


if __name__ == "__main__":
    _import()
    gc.freeze()  # else the collection at the end of each fork would look at, and so copy, all that is imported
    runpy.run_module(_serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
