"""The shell around the fold: `train` runs a recipe in a directory, or goes on with it there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Generic

import attrs

from fnrecipe.build import make_step
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.config import unstructure
from fnrecipe.data.stream import reading
from fnrecipe.errors import FnrecipeError
from fnrecipe.fold import fold
from fnrecipe.observe import Tick, observed
from fnrecipe.recipe import C, Recipe, Recorder, Row, Write
from fnrecipe.runtime import garbage, host
from fnrecipe.runtime.process_groups import wait_at_most
from fnrecipe.runtime.signals import ALARM, EXIT_STATUS, Stopped
from fnrecipe.shell.directory import lock
from fnrecipe.shell.directory.facts import write_facts
from fnrecipe.shell.directory.redact import redacted_values
from fnrecipe.shell.end import ended, stop_signal, too_short
from fnrecipe.shell.evaluate import Evaluator
from fnrecipe.shell.evaluators import any_due, evaluate_all, evaluators_of
from fnrecipe.shell.guards.machine import compared, recomputed
from fnrecipe.shell.guards.rollbacks import passing_over
from fnrecipe.shell.guards.spikes import RollbackError, agreed, go_back
from fnrecipe.shell.guards.stragglers import StepWork
from fnrecipe.shell.guards.unread import warning, watch
from fnrecipe.shell.observers import announced, evaluated, saved, scheduled, watched
from fnrecipe.shell.prepare import prepared
from fnrecipe.shell.products import chosen_once
from fnrecipe.shell.publish import publish, published
from fnrecipe.shell.recording.recorders import recorders_of, recording
from fnrecipe.shell.recording.throughput import Work, work_of
from fnrecipe.shell.saving.save import saving
from fnrecipe.shell.saving.space import warn_of_space
from fnrecipe.shell.screen.display import duration
from fnrecipe.shell.screen.progress import with_progress
from fnrecipe.shell.session import Session
from fnrecipe.shell.start import first_tick, wait_for_leader
from fnrecipe.shell.streams import training_source
from fnrecipe.step import Step


def train(
    recipe: Recipe[C],
    config: C,
    out: Path,
    *,
    with_changes: bool = False,
    from_step: int | None = None,
    started: float | None = None,
) -> int:
    """Trains `recipe` under `config` in the directory `out`, from its newest checkpoint if it has one, or that of `from_step`.

    Returns the exit status: 0, or 130 / 75 / 129 / 75 after SIGINT / SIGTERM / SIGHUP / SIGUSR1 and a last checkpoint, if there
    was something to save, and 75 after `regime.max_minutes`. The time that the run is said to take, and that which it may take,
    counts from `started`, on the monotonic clock, or from now.

    Raises:
        FnrecipeError: with a message for the user, for all that can go wrong by the config, the data or the machine.
    """
    try:
        with ExitStack() as stack:
            reads, now = set[str](), time.monotonic()
            session = prepared(stack, watch(recipe, reads), config, out, with_changes, now if started is None else started)
            try:
                start = partial(first_tick, with_changes=with_changes, from_step=from_step)
                return _run(stack, session, start, partial(warning, recipe, config, reads))
            except OSError as error:  # a full disk, say; what is saved is untouched
                lock.check_claim(*session.directory)
                raise FnrecipeError(f"{error.filename or out}: {error.strerror or error}") from error
            except (MemoryError, RuntimeError) as error:
                if message := host.out_of_memory(error):
                    raise FnrecipeError(message) from error
                raise
    except Stopped as stopped:
        if stopped.number == ALARM:
            raise FnrecipeError(too_short(config)) from None
        return EXIT_STATUS[stopped.number]


@attrs.frozen
class _Parts(Generic[C]):
    """What a run makes once, however often it goes back."""

    step: Step
    evaluators: Sequence[Evaluator[C]]
    work: Work
    recorders: Sequence[Recorder]


def _run(stack: ExitStack, session: Session[C], begin: Callable[[Session[C]], Tick], unread: Callable[[], str]) -> int:
    """The fold, observed; the exit status. `unread` gives a line on keys that the recipe has not read; it may be empty."""
    parts, steps = _parts(session), session.config.regime.num_steps
    stack.callback(garbage.unfreeze_objects)
    start = begin(session)
    warn_of_space(session, start.number, start.state)
    begun, traced = start.number, jit_mode(session.config.trainer.jit, session.device) != "off"
    if traced and (steps is None or begun < steps):
        session.display.line("tracing the step")
    buffers = attrs.evolve(start.state) if traced else None  # a traced step writes every state into those of the first
    after_first_step: Callable[[], None] = partial(_after_first_step, session, unread)
    while True:
        try:
            last = _go_on(session, parts, start, after_first_step)
            return ended(session, last, last.number - begun)
        except RollbackError as error:
            spike = error.spike
        # Behind the handler: the error holds the states that it ended.
        start, after_first_step = go_back(session, spike, buffers), lambda: None


def _parts(session: Session[C]) -> _Parts[C]:
    recipe, config, device, display = session.recipe, session.config, session.device, session.display
    progress = partial(with_progress, tell=display.line, waiting=display.waiting)
    choose = chosen_once(session)
    step = make_step(recipe, config, session.mesh, device, progress, choose)
    evaluators = evaluators_of(session, progress, choose)
    recorders = [*recorders_of(config.common.metric_recorders, redacted_values(unstructure(config))), *recipe.recorders(config)]
    return _Parts(step, evaluators, work_of(recipe, config, device, session.gang.size), recorders)


def _go_on(session: Session[C], parts: _Parts[C], start: Tick, after_first_step: Callable[[], None]) -> Tick:
    """The last tick of the fold behind a state, observed.

    Raises:
        RollbackError: if the run goes back.
    """
    recipe, config, gang, first, passed = session.recipe, session.config, session.gang, start.number, agreed(session)
    regime, due = config.regime, partial(any_due, parts.evaluators)
    with recording(parts.recorders if gang.leads else [], session.out, first) as recorded:
        write = partial(_write, session, recorded)
        wait_for_leader(session, first)
        if gang.leads:
            write_facts(recipe, config, session.device, session.out)
        work = StepWork()
        source = training_source(session, first, work.take)  # which may look for files, and may be stopped at once
        session.signals.at_once = False  # from here on, a step is finished and saved first
        step = work.counted(recomputed(parts.step, regime.recompute_every_n_steps, first, gang))
        batches = passing_over(source, start.cursor, step=first, passed=passed)
        with reading(batches) as stream, saving(session, first, start.cursor) as saver:
            return observed(
                scheduled(fold(step, start.state, stream), start, regime, due, partial(stop_signal, session)),
                partial(announced, first=after_first_step),
                partial(published, write=partial(publish, session, parts.work, write, passed), device=session.device),
                partial(compared, every=regime.hash_every_n_steps, gang=gang, write=write),
                partial(watched, before=session.stamps, tell=session.display.line),
                partial(saved, saver=saver),
                partial(evaluated, evaluate=partial(evaluate_all, parts.evaluators, write)),
                *recipe.observers(config, write),
            )


def _write(session: Session[C], write: Write, kind: str, rows: Sequence[Row]) -> None:
    """Records rows, in the directory that was claimed."""
    lock.check_claim(*session.directory)
    write(kind, rows)


def _after_first_step(session: Session[C], unread: Callable[[], str]) -> None:
    if line := unread():
        session.display.line(line)
    gang = session.config.gang
    wait_at_most(session.mesh, min(gang.timeout, gang.step_timeout))
    session.display.line(f"first step after {duration(time.monotonic() - session.started)}")
    garbage.freeze_objects()
