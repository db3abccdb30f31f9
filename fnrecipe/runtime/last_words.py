"""What a rank leaves for the others when it ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fnrecipe.errors import LostError
from fnrecipe.runtime.gang import Gang, on_one_line


@contextmanager
def last_words(gang: Gang) -> Iterator[None]:
    """Leaves word of what ends this rank; if that is the loss of another one, it is told by that one's word or by its silence.

    Raises:
        LostError: for a rank that is gone or does not answer.
    """
    try:
        yield
    except BaseException as error:
        if gang.alone:
            raise
        lost = isinstance(error, RuntimeError) and re.search(r"gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error))
        with suppress(RuntimeError):
            gang.store.set(_word(gang.rank), "" if lost else (str(error) or type(error).__name__))
        if lost:
            raise LostError(_blame(gang, error)) from error
        raise


def _blame(gang: Gang, error: BaseException, seconds: float = 3.0) -> str:
    """Which ranks are the cause of the end: those that left word of another cause, or else those that left none in time.

    If all ranks have lost each other, as by NCCL with two of them on one GPU, the cause is the `error` itself.
    """
    others, deadline = [rank for rank in range(gang.size) if rank != gang.rank], time.monotonic() + seconds
    words: dict[int, str] = {}
    with suppress(RuntimeError):
        while len(words) < len(others) and time.monotonic() < deadline:
            found = [rank for rank in others if rank not in words and gang.store.check([_word(rank)])]
            words |= {rank: gang.store.get(_word(rank)).decode() for rank in found}
            time.sleep(0.05)
    causes = [f"rank {rank} failed: {word}" for rank, word in words.items() if word]
    silent = [f"rank {rank} does not answer: it hangs or was killed" for rank in others if rank not in words]
    return "; ".join(causes or silent) or f"the ranks lost contact: {on_one_line(error)}"


def _word(rank: int) -> str:
    return f"last word of rank {rank}"
