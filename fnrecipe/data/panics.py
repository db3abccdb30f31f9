"""Panics of libraries that are written in Rust, which `except Exception` does not catch and which write to standard error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_ours(error: BaseException) -> bool:
    """Whether an error is not the library's, which raises bare Exceptions, and panics, whose class cannot be imported."""
    return not isinstance(error, Exception) and type(error).__name__ != "PanicException"


@contextmanager
def mute() -> Iterator[None]:
    """Redirects standard error to nowhere: the library prints a panic there before it can be caught."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
