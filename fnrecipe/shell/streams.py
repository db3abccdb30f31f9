"""The streams of a run: the batches of all ranks in step, on the device, until a signal comes."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import Any

import attrs
import torch

from fnrecipe.build import batches, empty_batch, to_device, validation_batches
from fnrecipe.data import Cursor, LaneAssignment, Source, Stream, endless, map_items, pipe
from fnrecipe.data.stream import T
from fnrecipe.errors import CheckpointError, one_line
from fnrecipe.recipe import Recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.lockstep import in_lockstep
from fnrecipe.runtime.signals import Signals, until_signal
from fnrecipe.shell.throughput import timed
from fnrecipe.tree import Tree


@attrs.frozen
class Rank:
    """Where the batches of a rank go, and what may end them."""

    gang: Gang
    assignment: LaneAssignment
    device: torch.device
    signals: Signals


def train_source(recipe: Recipe[Any], config: Any, rank: Rank) -> Source[Tree]:
    """The training batches; the cursor of each is ((its cursor, seconds waited for it), the signal that any rank heard)."""
    source = batches(recipe, config, rank.assignment, rank.device)
    heeding, agreed = partial(until_signal, signals=rank.signals), _agreed(recipe, config, rank, rank.signals)
    return pipe(source, endless, heeding, _picked_up, timed, agreed, _on_device(rank))


def validation_source(recipe: Recipe[Any], config: Any, rank: Rank) -> Source[Tree]:
    """The validation batches; several ranks do not end them at a signal, which they would have to agree on."""
    source = validation_batches(recipe, config, rank.assignment, rank.device)
    heeding = [partial(until_signal, signals=rank.signals)] if rank.gang.alone else []
    return pipe(source, endless, *heeding, _agreed(recipe, config, rank), _on_device(rank))


def _agreed(recipe: Recipe[Any], config: Any, rank: Rank, signals: Signals | None = None) -> Any:
    padding = empty_batch(recipe, config, rank.assignment, rank.device)
    return partial(in_lockstep, gang=rank.gang, padding=padding, word=lambda: (signals and signals.received) or 0)


def _on_device(rank: Rank) -> Any:
    return partial(map_items, function=partial(to_device, device=rank.device))


def _picked_up(source: Source[T], cursor: Cursor = None) -> Stream[T]:
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
