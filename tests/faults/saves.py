"""Kills a process that saves beside its steps at moments that are uniformly random, and looks at what is left each time.

The state is large enough for a save to take tens of milliseconds, and always one is under way. Each tensor of it holds nothing
but the number of its step, and steps write in place, so that what is torn, mixed or taken too late is seen.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from fnrecipe import checkpoint, tree
from fnrecipe.runtime.background import Background

KEEP = 2
_FORK = multiprocessing.get_context("forkserver")


def kills(root: Path, seed: int, seconds: float) -> Iterator[int]:
    """Kills without end, each up to so many `seconds` behind the first save; gives the step of what is left.

    Raises:
        AssertionError: if a checkpoint is lost that was there, or is not that of its step.
    """
    draw, newest = random.Random(seed), 0
    root.mkdir()
    while True:
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_save_for_ever, args=(root, newest, theirs))
        process.start()
        theirs.close()
        told = ours.recv()
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        told = max([told, *_received(ours)])
        newest = _checked(root, max(told, newest))
        yield newest


def _received(pipe: Connection) -> Iterator[int]:
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        pipe.close()


def _checked(root: Path, told: int) -> int:
    """The step of the newest checkpoint, which is whole, what it should be, and not before the step that was `told` last."""
    warnings: list[str] = []
    found = checkpoint.newest(root, warnings.append)
    assert found is not None
    assert not warnings, warnings
    assert found.step >= told, f"step {told} is lost, {found.step} is the newest"
    assert len(checkpoint.committed(root)) >= min(KEEP, found.step)
    restored = checkpoint.restore(found, _state(0))
    wrong = [path for path, leaf in tree.paths(restored).items() if not bool((leaf == found.step).all())]
    assert not wrong, f"step {found.step}: {wrong}"
    return found.step


def _state(value: int) -> dict[str, Tensor]:
    return {str(number): torch.full((1 << 20,), value, dtype=torch.int32) for number in range(4)}


def _save_for_ever(root: Path, newest: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    checkpoint.tidy(root, newest)
    background, state = Background("saves"), _state(newest)
    host: dict[str, Tensor] = {}
    for step in count(newest + 1):
        for leaf in state.values():  # beside the save before
            leaf.fill_(step)
        background.wait()
        pipe.send(step - 1)  # that one is there
        copy = checkpoint.copied(checkpoint.snapshot(state), host)
        host = dict(copy.tensors)

        def work(step: int = step, copy: checkpoint.Snapshot = copy) -> None:
            checkpoint.write(root, step, copy, None, {})
            checkpoint.prune(root, checkpoint.Policy(last=KEEP))

        background.start(work)
