"""The ticks of a run, and what observes them in their order at a boundary: the state is saved, evaluations are made.

Metrics are published before (`fnrecipe.shell.publish`), so what is saved is never ahead of what is recorded. An evaluation that
dies loses nothing: it is made up for when the run goes on.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeAlias

import attrs

from fnrecipe.config import RegimeSection
from fnrecipe.data.changes import Stamp, changed
from fnrecipe.errors import FnrecipeError, few
from fnrecipe.observe import Tick, Ticks
from fnrecipe.runtime.position import Position
from fnrecipe.runtime.signals import Stopped
from fnrecipe.step import Metrics, State

Folded: TypeAlias = Iterator[tuple[State, Metrics, Position]]


def scheduled(
    folded: Folded, start: Tick, regime: RegimeSection, due: Callable[[int], bool], stopped: Callable[[int], int | None]
) -> Ticks:
    """A tick for the start, one for each step up to `regime.num_steps` or a signal, and one for the end.

    `due` tells whether an evaluation is to be made after so many steps. `stopped` gives the signal to stop at, by the one that
    was heard on the way to a batch (0: none). Minutes count from the start of the run, and from each save.

    Raises:
        FnrecipeError: if an observer keeps the state of a tick.
    """
    saved, saved_at = start.number, 0.0
    tick = attrs.evolve(start, evaluate=start.number > 0 and due(start.number))
    yield tick
    stop = stopped(0)
    try:
        while stop is None and (regime.num_steps is None or tick.number < regime.num_steps):
            old = weakref.ref(tick.state)
            entry = next(folded, None)
            if entry is None:
                break
            tick.forget()
            if old() is not None:
                gc.collect()  # a cycle may hold it, such as the first step that is not traced leaves
            if old() is not None:
                why = "an observer keeps it, and the next step has written over it; copy the tensors that are needed"
                raise FnrecipeError(f"the state of step {tick.number}: {why}")
            now = entry[2].clock
            late = regime.checkpoint_every_n_minutes is not None and now - saved_at >= 60 * regime.checkpoint_every_n_minutes
            tick = _stepped(tick.number + 1, *entry, regime, late, due, stopped)
            del entry
            saved, saved_at = (tick.number, now) if tick.save else (saved, saved_at)
            yield tick
            stop = tick.stop or stopped(0)  # a signal may have ended an evaluation
    except Stopped as signal:  # several ranks agreed on it while one of them waited for data
        stop = signal.number
    evaluate = stop is None and tick.number > 0
    end = Tick(tick.number, tick.cursor, stop=stop, publish=True, save=tick.number > saved, evaluate=evaluate, last=True)
    yield attrs.evolve(end, states=[tick.state])


def _stepped(
    number: int,
    state: State,
    metrics: Metrics,
    position: Position,
    regime: RegimeSection,
    late: bool,
    due: Callable[[int], bool],
    stopped: Callable[[int], int | None],
) -> Tick:
    """The tick after a step. At a signal the state is saved, and evaluations wait until the run goes on.

    `late`: whether the last save is so long ago that the state is saved, whatever the step.
    """
    stop = stopped(position.heard)
    save = stop is not None or late or _due(regime.checkpoint_every_n_steps, number)
    publish = save or _due(regime.publish_metrics_every_n_steps, number)
    evaluate = stop is None and due(number)
    return Tick(
        number, position.cursor, metrics, position.waited, stop, publish, save, evaluate, busy=position.busy, states=[state]
    )


class Saves(Protocol):
    """What `saved` saves by: `save` may return before the state is on disk, `check` raises what failed since."""

    def save(self, tick: Tick, /) -> None: ...
    def check(self) -> None: ...
    def wait(self) -> None: ...


def saved(ticks: Ticks, *, saver: Saves) -> Ticks:
    """Saves the state when that is due. What cannot be saved ends the run at the next tick; at the end all is on disk."""
    for tick in ticks:
        saver.check()
        if tick.save:
            saver.save(tick)
        yield tick
    saver.wait()


def watched(ticks: Ticks, *, before: Mapping[tuple[str, str], Stamp], tell: Callable[[str], None]) -> Ticks:
    """Tells of files of the data that have changed since their stamps were taken, each once, whenever the state is saved."""
    told: set[str] = set()
    for tick in ticks:
        if tick.save and (new := [name for name in changed(before) if name not in told]):
            told |= set(new)
            what = "what is read now is not what the checkpoints say, and going on is refused"
            tell(f"files of the data have changed since this run began: {few(new)}; if their content has, {what}")
        yield tick


def evaluated(ticks: Ticks, *, evaluate: Callable[[Tick], None]) -> Ticks:
    """Makes the evaluations when they are due."""
    for tick in ticks:
        if tick.evaluate:
            evaluate(tick)
        yield tick


def announced(ticks: Ticks, *, first: Callable[[], None]) -> Ticks:
    """Calls `first` after the first step of this process."""
    waiting = True
    for tick in ticks:
        if waiting and tick.metrics is not None:
            first()
            waiting = False
        yield tick


def _due(interval: int | None, number: int) -> bool:
    return interval is not None and number % interval == 0
