"""A process that has imported fnrecipe and forks one run after the other: what takes seconds is done once.

It starts no thread itself, so that a fork of it is as good as a new process. One JSON value a line comes in: a run to start,
`{"args": …, "environment": …, "output": …}`, which is answered by its process id, or the id of one to wait for, which is
answered by its status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]


@attrs.frozen
class Zygote:
    """The other end of its pipes."""

    process: subprocess.Popen[str]

    def start(self, args: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
        """The id of a new process `fnrecipe ARGS`, whose output goes to the file `output`."""
        return self._ask({"args": list(args), "environment": dict(environment), "output": str(output)})

    def wait(self, process: int) -> int:
        """The exit status of a process; that of one that was killed is minus the signal."""
        return self._ask(process)

    def _ask(self, question: object) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def zygote() -> Iterator[Zygote]:
    command = [sys.executable, "-m", "tests.faults.zygote"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        yield Zygote(process)


def _serve() -> None:
    import torch._dynamo  # noqa: F401  (a run imports it at its first step)

    import fnrecipe.cli.main
    import fnrecipe.recipes.lm.train
    import fnrecipe.shell.train  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            _, status = os.waitpid(question, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _become(question["args"], question["environment"], question["output"])
        print(child, flush=True)


def _become(args: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    from fnrecipe.cli.main import main

    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    os.environ.update(environment)
    sys.argv = ["fnrecipe", *args]
    main()


if __name__ == "__main__":
    _serve()
