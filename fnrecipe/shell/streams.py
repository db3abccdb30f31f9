"""The streams of a run: the batches of all ranks in step, on the device, until a signal comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import chain, islice

import attrs
from torch import Tensor

from fnrecipe import tree
from fnrecipe.build import batches, empty_batch, evaluation_batches, local_microbatches, to_device
from fnrecipe.data import Cursor, Source, Stage, Stream, endless, map_items, pipe
from fnrecipe.data.stream import T
from fnrecipe.errors import CheckpointError, ConfigError, one_line
from fnrecipe.recipe import C, Evaluation
from fnrecipe.runtime.lockstep import in_lockstep
from fnrecipe.runtime.signals import until_signal
from fnrecipe.shell.recording.throughput import timed
from fnrecipe.shell.session import Session
from fnrecipe.tree import Tree


def training_source(session: Session[C], made: int, busy: Callable[[], float] = float) -> Source[Tree]:
    """The training batches, each with its `Position`, behind so many steps that are `made`.

    `busy`: seconds that this rank was at work since it was asked last, which all ranks tell each other.

    Raises:
        ConfigError: if the config's schedule of batch sizes does not cut batches into equal parts.
    """
    config = session.config
    if found := [*config.regime.batch_size_conflicts(config.dataset.batch_size, config.gang.num_microbatches)]:
        raise ConfigError([attrs.evolve(problem, path=f"regime.{problem.path}") for problem in found])
    part = partial(config.regime.part, batch_size=config.dataset.batch_size)
    cut = partial(part_of_microbatches, num_microbatches=local_microbatches(config, session.mesh))
    source = batches(session.recipe, config, session.assignment, session.device)
    heeding = partial(until_signal, signals=session.signals)
    agreed = _on_ranks(session, partial(_heard, session), partial(_elapsed, session), busy)
    read = pipe(source, endless, heeding, resumed, timed, *agreed)
    return pipe(read, partial(in_parts, made=made, part=part, cut=cut))


def in_parts(
    source: Source[T],
    cursor: Cursor = None,
    *,
    made: int,
    part: Callable[[int], tuple[int, int]],
    cut: Callable[[T, int, int], T],
) -> Stream[T]:
    """The batch of each step behind those that are `made`: `cut(batch, *part(step))` of one that is read, in turn.

    The place in a batch that is read follows from the step, so cursors are those of batches: that behind one comes with its
    last part, that before it with the others.
    """
    before, step = cursor, made
    for batch, position in source(cursor):
        used_up = False
        while not used_up:
            step += 1
            number, parts = part(step)
            used_up = number + 1 == parts
            yield (
                batch if parts == 1 else cut(batch, number, parts),
                position if used_up else attrs.evolve(position, cursor=before),
            )
            position = attrs.evolve(position, waited=0.0, busy=())
        before = position.cursor


def part_of_microbatches(batch: Tree, number: int, parts: int, num_microbatches: int) -> Tree:
    """Part `number` of the rows of each microbatch: which rows these are does not depend on the number of ranks."""

    def rows(tensor: Tensor) -> Tensor:
        size = len(tensor) // (num_microbatches * parts)
        return tensor.reshape(num_microbatches, parts, size, *tensor.shape[1:])[:, number].flatten(0, 1)

    return tree.map(rows, batch)


def evaluation_source(session: Session[C], name: str, evaluation: Evaluation[C]) -> Source[Tree]:
    """The batches of an evaluation; several ranks do not end them at a signal, which they would have to agree on."""
    source = evaluation_batches(session.recipe, name, evaluation, session.config, session.assignment, session.device)
    heeding = [partial(until_signal, signals=session.signals)] if session.gang.alone else []
    return pipe(source, endless, *heeding, timed, *_on_ranks(session, int, float, float))


def _on_ranks(
    session: Session[C], word: Callable[[], int], clock: Callable[[], float], busy: Callable[[], float]
) -> list[Stage]:
    """In step with the other ranks, and on the device."""
    padding = empty_batch(session.recipe, session.config, session.assignment, session.device)
    agreed = partial(in_lockstep, gang=session.gang, padding=padding, word=word, clock=clock, busy=busy)
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
