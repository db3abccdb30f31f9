"""The streams of a run: the batches of all ranks in step, on the device, until a signal comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from typing import Any

from fnrecipe.build import batches, empty_batch, evaluation_batches, to_device
from fnrecipe.data import Cursor, Source, Stream, endless, map_items, pipe
from fnrecipe.data.stream import T
from fnrecipe.errors import CheckpointError, one_line
from fnrecipe.recipe import C, Evaluation
from fnrecipe.runtime.lockstep import in_lockstep
from fnrecipe.runtime.signals import until_signal
from fnrecipe.shell.session import Session
from fnrecipe.shell.throughput import timed
from fnrecipe.tree import Tree


def training_source(session: Session[C]) -> Source[Tree]:
    """The training batches, each with its `Position`."""
    source = batches(session.recipe, session.config, session.assignment, session.device)
    heeding = partial(until_signal, signals=session.signals)
    agreed = _on_ranks(session, partial(_heard, session), partial(_elapsed, session))
    return pipe(source, endless, heeding, resumed, timed, *agreed)


def evaluation_source(session: Session[C], name: str, evaluation: Evaluation[C]) -> Source[Tree]:
    """The batches of an evaluation; several ranks do not end them at a signal, which they would have to agree on."""
    source = evaluation_batches(session.recipe, name, evaluation, session.config, session.assignment, session.device)
    heeding = [partial(until_signal, signals=session.signals)] if session.gang.alone else []
    return pipe(source, endless, *heeding, timed, *_on_ranks(session, int, float))


def _on_ranks(session: Session[C], word: Callable[[], int], clock: Callable[[], float]) -> list[Callable[..., Stream[Any]]]:
    """In step with the other ranks, and on the device."""
    padding = empty_batch(session.recipe, session.config, session.assignment, session.device)
    agreed = partial(in_lockstep, gang=session.gang, padding=padding, word=word, clock=clock)
    return [agreed, partial(map_items, function=partial(to_device, device=session.device))]


def _heard(session: Session[C]) -> int:
    return session.signals.received or 0


def _elapsed(session: Session[C]) -> float:
    return time.monotonic() - session.started


def resumed(source: Source[T], cursor: Cursor = None) -> Stream[T]:
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
