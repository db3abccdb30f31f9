"""The last words of a rank: why it ends, left in the store for the others to report."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed.distributed_c10d import Store

from fnrecipe.errors import LostError
from fnrecipe.runtime.gang import Gang, on_one_line
from fnrecipe.runtime.stacks import ask_for_stacks


@contextmanager
def last_words(gang: Gang) -> Iterator[None]:
    """Leaves the error that ends this rank as its last word; if that is the loss of another rank, finds out which one and why.

    Raises:
        LostError: naming the rank that failed or does not answer.
    """
    try:
        yield
    except BaseException as error:
        if gang.store is None:
            raise
        lost = lost_contact(error)
        with suppress(RuntimeError):
            gang.store.set(_word(gang.rank), "" if lost else (str(error) or type(error).__name__))
        if lost:
            ask_for_stacks(gang)
            raise LostError(_blame(gang, gang.store, error)) from error
        raise


def lost_contact(error: BaseException) -> bool:
    """Whether an error is the loss of another rank."""
    return isinstance(error, RuntimeError) and bool(re.search(r"gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error)))


def _blame(gang: Gang, store: Store, error: BaseException, seconds: float = 3.0) -> str:
    """The ranks to blame: those whose last word is an error of their own, else those that left none within `seconds`.

    If all ranks have lost each other, as by NCCL with two of them on one GPU, the `error` itself is to blame.
    """
    # A rank that lost contact leaves an empty word: it is alive and knows no more than this one. So a rank without a word hangs
    # or was killed before it could leave one.
    others, deadline = [rank for rank in range(gang.size) if rank != gang.rank], time.monotonic() + seconds
    words: dict[int, str] = {}
    with suppress(RuntimeError):
        while len(words) < len(others) and time.monotonic() < deadline:
            found = [rank for rank in others if rank not in words and store.check([_word(rank)])]
            words |= {rank: store.get(_word(rank)).decode() for rank in found}
            time.sleep(0.05)
    causes = [f"rank {rank} failed: {word}" for rank, word in words.items() if word]
    silent = [f"rank {rank} does not answer: it hangs or was killed" for rank in others if rank not in words]
    return "; ".join(causes or silent) or f"the ranks lost contact: {on_one_line(error)}"


def _word(rank: int) -> str:
    return f"last word of rank {rank}"
