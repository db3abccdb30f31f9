"""Python's garbage collector in a process that trains: it waits for the first step, and then looks at what is new alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Within it nothing is collected, or not before `freeze_objects`.

    What modules and a trace make is kept, next to all of it: the collector went through it for a second of the seven that a
    compiled run of 7M parameters took to its first step.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


def freeze_objects() -> None:
    """Exempts all existing objects, such as a traced graph's thousands, from collections (0.2 s for each full one) to come."""
    gc.collect()
    gc.freeze()
    gc.enable()


def unfreeze_objects() -> None:
    gc.unfreeze()
