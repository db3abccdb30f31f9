"""Panics of libraries that are written in Rust, which `except Exception` does not catch and which write to standard error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fnrecipe.errors import DataError, one_line

T = TypeVar("T")


def is_ours(error: BaseException) -> bool:
    """Whether an error is not the library's, which raises bare Exceptions, and panics, whose class cannot be imported."""
    return not isinstance(error, Exception) and type(error).__name__ != "PanicException"


def encoded(encode: Callable[[list[str]], list[T]], texts: list[str], path: str) -> list[T]:
    """What the library of the tokenizer at `path` makes of `texts`; if that fails, of one by one, to name the text.

    Raises:
        DataError: if one of them cannot be encoded.
    """
    try:
        return encode(texts)
    except BaseException as error:
        if is_ours(error):
            raise
        if len(texts) > 1:
            return [found for text in texts for found in encoded(encode, [text], path)]
        raise DataError(one_line(f"tokenizer.path: {path} cannot encode the text {texts[0][:80]!r}: {error}")) from None


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
