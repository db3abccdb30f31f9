"""The shell around the fold: `train` runs a recipe in a directory, or goes on with it there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from signal import Signals as Signal
from typing import Any, Generic, cast

import attrs

from fnrecipe import checkpoint
from fnrecipe.build import make_evaluation, make_step
from fnrecipe.compiler import Backend
from fnrecipe.compiler.modes import jit_mode
from fnrecipe.compiler.products import Choose
from fnrecipe.config import RegimeSection, ShellConfig, unstructure
from fnrecipe.config.affects import runtime_paths
from fnrecipe.config.layers import flatten, values
from fnrecipe.data import Corpus, tell_left_out
from fnrecipe.data.changes import stamps
from fnrecipe.data.survey import NO_ROW
from fnrecipe.errors import EXIT_AGAIN, FnrecipeError, UsageError
from fnrecipe.fold import fold
from fnrecipe.observe import Tick, observed
from fnrecipe.recipe import C, Evaluation, Findings, Measurement, Recipe, Recorder, Row, Write
from fnrecipe.runtime import garbage, host
from fnrecipe.runtime.gang import Gang, apart, check_same, joined, world_size
from fnrecipe.runtime.last_words import last_words
from fnrecipe.runtime.process_groups import axis_sizes, check_world_size, make_mesh, wait_at_most
from fnrecipe.runtime.signals import ALARM, EXIT_STATUS, Signals, Stopped
from fnrecipe.runtime.stacks import stacks_on_demand
from fnrecipe.shell.directory import layout, lock, same_run
from fnrecipe.shell.directory.identity import identity
from fnrecipe.shell.directory.redact import redacted_values
from fnrecipe.shell.directory.shared import check_shared
from fnrecipe.shell.evaluate import Evaluator, evaluate, measured, shown_params, sums_of
from fnrecipe.shell.guards.machine import compared, recomputed
from fnrecipe.shell.guards.rollbacks import passing_over
from fnrecipe.shell.guards.spikes import RollbackError, agreed, go_back
from fnrecipe.shell.guards.stragglers import StepWork
from fnrecipe.shell.guards.unread import warning, watch
from fnrecipe.shell.observers import announced, evaluated, published, saved, scheduled, watched
from fnrecipe.shell.products import chosen_once
from fnrecipe.shell.publish import publish
from fnrecipe.shell.recording.recorders import recorders_of, recording
from fnrecipe.shell.recording.throughput import Work, work_of
from fnrecipe.shell.sample import sample
from fnrecipe.shell.saving.keeping import check_evaluation
from fnrecipe.shell.saving.save import saving
from fnrecipe.shell.saving.space import warn_of_space
from fnrecipe.shell.screen.display import Display, duration
from fnrecipe.shell.screen.progress import with_progress
from fnrecipe.shell.session import Session
from fnrecipe.shell.start import first_tick, wait_for_leader, write_facts
from fnrecipe.shell.streams import evaluation_source, training_source
from fnrecipe.shell.trained.export import export_at_end, exportable
from fnrecipe.step import Step
from fnrecipe.tree import Tree


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
            session = _prepared(stack, watch(recipe, reads), config, out, with_changes, now if started is None else started)
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
            raise FnrecipeError(_too_short(config)) from None
        return EXIT_STATUS[stopped.number]


def _prepared(stack: ExitStack, recipe: Recipe[C], config: C, out: Path, with_changes: bool, started: float) -> Session[C]:
    """A process that has joined its gang and claimed the directory; `stack` undoes all of it."""
    replicas, shards, _ = axis_sizes(config.gang, world_size())
    cut = {"gang.num_microbatches": config.gang.num_microbatches, "dataset.num_lanes": config.dataset.num_lanes}
    check_world_size(cut, replicas * shards)
    device = host.pick_device(config.gang.device)
    gang = stack.enter_context(joined(device, config.gang.timeout))
    stack.enter_context(stacks_on_demand(gang, out / layout.log(gang.rank)))
    stack.enter_context(last_words(gang))
    seconds = _seconds_left(config.regime, started) if gang.leads else None
    parting = partial(_parting, out, gang)
    signals = stack.enter_context(Signals(parting, seconds=seconds, at_once=gang.alone, once=not gang.alone))
    claim = stack.enter_context(lock.claimed(out)) if gang.leads else None
    if claim is not None and not with_changes:
        same_run.check_config(out, unstructure(config), set(runtime_paths(config)), unstructure(type(config)()))
    if config.regime.export_hugging_face:
        exportable(recipe, config)
    corpora: Sequence[Corpus] = recipe.corpora(config) if recipe.corpora else []
    before = stamps(corpora) if gang.leads else {}
    facts = identity(recipe, config, corpora)
    check_same(gang, {**values(flatten(unstructure(config), "")), **host.versions(), **facts})
    check_shared(out, gang)
    with lock.writing(out):
        display = Display(out / layout.log(gang.rank), config.regime.num_steps, quiet=not gang.leads)
    stack.enter_context(display)
    host.prepare(config.common.torch, jit_mode(config.trainer.jit, device))
    tell_left_out(corpora if gang.leads else [])
    mesh = make_mesh(config.gang, gang, device, recipe.rules(config))
    beside = apart(gang, config.gang.timeout)
    return Session(recipe, config, (out, claim), facts, device, gang, beside, mesh, signals, display, started, before)


@attrs.frozen
class _Parts(Generic[C]):
    """What a run makes once, however often it goes back."""

    step: Step
    evaluators: Sequence[Evaluator[C]]
    work: Work
    recorders: Sequence[Recorder]


def _run(stack: ExitStack, session: Session[C], begin: Callable[[Session[C]], Tick], unread: Callable[[], str]) -> int:
    """The fold, observed; the exit status. `unread` gives a line on keys that the recipe has not read; it may be empty."""
    recipe, config, gang, device, display = session.recipe, session.config, session.gang, session.device, session.display
    progress = partial(with_progress, tell=display.line, waiting=display.waiting)
    choose = chosen_once(session)
    step = make_step(recipe, config, session.mesh, device, progress, choose)
    evaluators = _evaluators(session, progress, choose)
    recorders = [*recorders_of(config.common.metric_recorders, redacted_values(unstructure(config))), *recipe.recorders(config)]
    parts = _Parts(step, evaluators, work_of(recipe, config, device, gang.size), recorders)
    stack.callback(garbage.unfreeze_objects)
    start = begin(session)
    warn_of_space(session, start.number, start.state)
    begun, traced = start.number, jit_mode(config.trainer.jit, device) != "off"
    if traced and (config.regime.num_steps is None or begun < config.regime.num_steps):
        display.line("tracing the step")
    buffers = attrs.evolve(start.state) if traced else None  # a traced step writes every state into those of the first
    after_first_step: Callable[[], None] = partial(_after_first_step, session, unread)
    while True:
        try:
            last = _go_on(session, parts, start, after_first_step)
            return _end(session, last, last.number - begun)
        except RollbackError as error:
            spike = error.spike
        # Behind the handler: the error holds the states that it ended.
        start, after_first_step = go_back(session, spike, buffers), lambda: None


def _go_on(session: Session[C], parts: _Parts[C], start: Tick, after_first_step: Callable[[], None]) -> Tick:
    """The last tick of the fold behind a state, observed.

    Raises:
        RollbackError: if the run goes back.
    """
    recipe, config, gang, first, passed = session.recipe, session.config, session.gang, start.number, agreed(session)
    regime, due = config.regime, partial(_any_due, parts.evaluators)
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
        with closing(cast("Generator[Any]", batches)) as stream, saving(session, first, start.cursor) as saver:
            return observed(
                scheduled(fold(step, start.state, stream), start, regime, due, partial(_stop, session)),
                partial(announced, first=after_first_step),
                partial(published, write=partial(publish, session, parts.work, write, passed), device=session.device),
                partial(compared, every=regime.hash_every_n_steps, gang=gang, write=write),
                partial(watched, before=session.stamps, tell=session.display.line),
                partial(saved, saver=saver),
                partial(evaluated, evaluate=partial(_evaluate, parts.evaluators, write)),
                *recipe.observers(config, write),
            )


def _evaluators(session: Session[C], progress: Callable[[Backend], Backend], choose: Choose) -> list[Evaluator[C]]:
    """Those of the recipe; evaluations of the same loss share their traced function. What they read is opened."""
    recipe, config, usual = session.recipe, session.config, session.config.regime.validate_every_n_steps
    make = partial(
        make_evaluation,
        recipe,
        config=config,
        mesh=session.mesh,
        device=session.device,
        with_progress=progress,
        choose=choose,
        compiled=False,
    )
    own = make(Evaluation(recipe.stream))

    def find(name: str, evaluation: Evaluation[C] | Measurement[C]) -> Callable[[Tree], Findings | None]:
        if isinstance(evaluation, Measurement):
            return partial(measured, session, evaluation.make(config, session.device))
        source = evaluation_source(session, name, evaluation)
        return partial(sums_of, session, source, make(evaluation) if evaluation.loss else own)

    named = recipe.evaluations(config).items()
    check_evaluation(config.regime, [name for name, _ in named])
    return [Evaluator(name, session, each.every_n_steps or usual, find(name, each)) for name, each in named]


def _evaluate(evaluators: Sequence[Evaluator[C]], write: Write, tick: Tick) -> None:
    for evaluator in evaluators:
        evaluate(evaluator, tick, write)


def _any_due(evaluators: Sequence[Evaluator[C]], step: int) -> bool:
    return any(evaluator.due(step) for evaluator in evaluators)


def _write(session: Session[C], write: Write, kind: str, rows: Sequence[Row]) -> None:
    """Records rows, in the directory that was claimed."""
    lock.check_claim(*session.directory)
    write(kind, rows)


def _stop(session: Session[C], heard: int) -> int | None:
    """The signal to stop at: the one that this process has received if it is alone, or that all ranks have heard of."""
    return session.signals.received if session.gang.alone else heard or None


def _after_first_step(session: Session[C], unread: Callable[[], str]) -> None:
    if line := unread():
        session.display.line(line)
    gang = session.config.gang
    wait_at_most(session.mesh, min(gang.timeout, gang.step_timeout))
    session.display.line(f"first step after {duration(time.monotonic() - session.started)}")
    garbage.freeze_objects()


def _end(session: Session[C], last: Tick, steps: int) -> int:
    """The sample, or the word that goes with a signal; the exit status.

    Raises:
        Stopped: if a signal has come before anything was made.
        FnrecipeError: if that was all the time there was: the same command would not come further.
        UsageError: if there was no data.
    """
    recipe, config, display, stop = session.recipe, session.config, session.display, last.stop or _stop(session, 0)
    if last.number == 0 and stop is not None:
        raise Stopped(Signal(stop))
    if last.number == 0:
        raise UsageError(NO_ROW)
    if last.stop is None:
        stop = sample(session, shown_params(recipe, config, last.state))
        export_at_end(session)
    if stop == ALARM and not steps:
        raise FnrecipeError(_too_short(config))
    if stop is not None:
        why = "regime.max_minutes" if stop == ALARM else Signal(stop).name
        display.line(f"{why}: saved step {last.number:,}; the same command goes on from there")
        return EXIT_AGAIN if stop == ALARM else EXIT_STATUS[Signal(stop)]
    display.line(f"done: step {last.number:,}, {steps:,} steps in {duration(time.monotonic() - session.started)}")
    return 0


def _seconds_left(regime: RegimeSection, started: float) -> float | None:
    """Seconds until `regime.max_minutes` are over.

    Raises:
        UsageError: in a thread that hears no signals, which the end of this time is.
    """
    if regime.max_minutes is None:
        return None
    if threading.current_thread() is not threading.main_thread():
        expected = "null for a run in another thread than the main one, which hears no signals"
        raise UsageError(f"regime.max_minutes: expected {expected}, found {regime.max_minutes:g}")
    return started + 60 * regime.max_minutes - time.monotonic()


def _too_short(config: ShellConfig) -> str:
    return f"regime.max_minutes: expected time for a step at least, found none made in {config.regime.max_minutes:g} minutes"


def _parting(out: Path, gang: Gang) -> str:
    """What is said when a second signal ends a run at once."""
    if not gang.leads:
        return ""
    saved = checkpoint.committed(out / layout.CHECKPOINTS)
    where = f"the newest checkpoint is {saved[-1]}, and the same command goes on from there" if saved else "nothing was saved"
    return f"\nended at once: {where}\n"
