"""The training stream of a run: its batches on the device, and in step with those of other ranks."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from itertools import chain, islice
from typing import Any

from fnrecipe.build import batches, to_device
from fnrecipe.data import Cursor, Source, Stream, map_items, pipe
from fnrecipe.errors import CheckpointError, one_line
from fnrecipe.recipe import C
from fnrecipe.runtime.lockstep import in_lockstep
from fnrecipe.runtime.position import Position
from fnrecipe.runtime.signals import until_signal
from fnrecipe.shell.session import Session
from fnrecipe.shell.throughput import timed


def training_stream(session: Session[C], cursor: Cursor) -> Generator[tuple[Any, Position]]:
    """Batches from `cursor` on, each with its `Position`."""
    source = batches(session.recipe, session.config, session.assignment, session.device)
    word = partial(_heard, session)
    stages = (_resumed, timed, partial(in_lockstep, gang=session.gang, word=word))
    heeding = partial(until_signal, source, signals=session.signals)
    on_device = partial(map_items, function=partial(to_device, device=session.device))
    stream: Generator[tuple[Any, Position]] = pipe(heeding, *stages, on_device)(cursor)  # type: ignore[assignment]
    return stream


def _heard(session: Session[C]) -> int:
    return session.signals.received or 0


def _resumed(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
    """The same stream.

    Raises:
        CheckpointError: if it fails on the cursor of a checkpoint before it gives anything: another stream's, or none at all.
    """
    try:
        stream = source(cursor)
        first = list(islice(stream, 1))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        if cursor is None:
            raise
        found = one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(
            f"expected a cursor in the checkpoint at which this stream goes on, found one at which it fails: {found}"
        ) from error
    yield from chain(first, stream)
