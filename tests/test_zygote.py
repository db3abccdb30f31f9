"""A fork of a zygote is what a new process is, as far as a program can see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.zygote import ENVIRONMENT, children, zygote

PROBE = """
import gc, json, os, signal, sys, tempfile, threading, torch
if __name__ == "__main__":
    streams = sys.stdin, sys.stdout, sys.stderr
    print(json.dumps({
        "argv": (sys.argv, sys.orig_argv, sys.path[0], __file__, __spec__.name, sys.modules["__main__"].__file__),
        "environment": dict(os.environ),
        "flags": str(sys.flags),
        "signals": {number: str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()},
        "mask": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "streams": [(s.fileno(), s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()) for s in streams],
        "buffers": [str(type(s.buffer)) for s in streams],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "place": (os.getcwd(), os.getppid(), tempfile.gettempdir(), os.umask(0)),
        "session": (os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid(), os.getpgrp() == os.getpgid(os.getppid())),
        "threads": (torch.get_num_threads(), threading.active_count(), len(os.listdir("/proc/self/task"))),
        "stdin": sys.stdin.read(),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "cuda": torch.cuda.is_initialized(),
    }))
    print("last", file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    """Starts the program `probe` of so many lines, as a fork or anew."""

    def run(text: str, *args: str, popen: type[subprocess.Popen[Any]], **options: Any) -> subprocess.Popen[str]:
        (tmp_path / "probe.py").write_text(text)
        environment, pipe = {**os.environ, **ENVIRONMENT, **options.pop("env", {})}, subprocess.PIPE
        command = [sys.executable, "-m", "probe", *args]
        return popen(command, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options)

    return run


@pytest.mark.parametrize("session", [False, True])
def test_it_sees_what_a_new_process_sees(program: Any, tmp_path: Path, session: bool) -> None:
    options = {"env": {"TMPDIR": str(tmp_path), "OURS": "é 1"}, "start_new_session": session}
    seen = []
    for popen in (zygote(), subprocess.Popen):
        process = program(PROBE, "--a", "é b", "", popen=popen, **options)
        output, errors = process.communicate("a line\n", timeout=120)
        assert (process.returncode, errors) == (0, "last\n")
        seen.append(json.loads(output))
    assert seen[0] == seen[1]
    assert seen[0]["place"][1] == os.getpid()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("import atexit; atexit.register(print, 'at exit')", 0),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import signal; signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
        ("import os; os.abort()", -signal.SIGABRT),
        ("raise KeyError('k')", 1),
    ],
)
def test_it_ends_as_a_new_process_ends(program: Any, text: str, status: int) -> None:
    ended = []
    for popen in (zygote(), subprocess.Popen):
        process = program(text, popen=popen)
        output, errors = process.communicate(timeout=120)
        assert process.wait() == process.poll() == process.returncode == status
        ended.append((output, errors.splitlines()[-1:]))
    assert ended[0] == ended[1]


def test_it_hears_signals_and_can_be_waited_for(program: Any) -> None:
    process = program("print('ready', flush=True); import time; time.sleep(3600)", popen=zygote())
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM
    process.communicate()


WHICH = """
import random, numpy, torch
print("tests.zygote" in open("/proc/self/cmdline").read(), random.random(), numpy.random.rand(), torch.rand(1).item())
"""


def test_what_is_read_at_the_start_is_read_by_a_new_process(program: Any) -> None:
    forks = [program(WHICH, popen=zygote(), env=env).communicate()[0].split() for env in ({}, {"OTHER": "1"}, {})]
    is_fork, *numbers = zip(*forks, strict=True)
    assert is_fork == ("True",) * 3
    assert [len({*each}) for each in numbers] == [3, 3, 3], "each has random numbers of its own"
    for env in ({"PYTHONUTF8": "0"}, {"OMP_NUM_THREADS": "2"}, {"LC_ALL": "C"}):
        assert program(WHICH, popen=zygote(), env=env).communicate()[0].startswith("False")


STARTS = """
import subprocess, sys
if "--nproc" in sys.argv:
    ranks = [subprocess.Popen([sys.executable, "-m", "probe", str(rank)]) for rank in range(2)]
    print(*(rank.pid for rank in ranks), flush=True)
    sys.stdin.read()
    sys.exit(sum(rank.wait() for rank in ranks))
else:
    import os
    os.write(1, f"{os.getppid()} {'tests.zygote' in open('/proc/self/cmdline').read()}\\n".encode())
    sys.exit(int(sys.argv[1]) + 2)
"""


def test_ranks_are_forked_from_their_launcher(program: Any) -> None:
    process = program(STARTS, "--nproc", popen=zygote())
    lines = sorted((process.stdout.readline() for _ in range(3)), key=str.split)
    assert lines.count(f"{process.pid} True\n") == 2
    (ranks,) = [line for line in lines if "True" not in line]
    assert children(process.pid) == [int(rank) for rank in ranks.split()]
    process.communicate(timeout=60)
    assert process.returncode == 5
