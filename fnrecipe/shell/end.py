"""How a run ends: at a signal, or with a sample and an export; its exit status."""

from __future__ import annotations

import time
from signal import Signals as Signal

from fnrecipe.config import ShellConfig
from fnrecipe.data.survey import NO_ROW
from fnrecipe.errors import EXIT_AGAIN, FnrecipeError, UsageError
from fnrecipe.observe import Tick
from fnrecipe.recipe import C
from fnrecipe.runtime.signals import ALARM, EXIT_STATUS, Stopped
from fnrecipe.shell.evaluate import shown_params
from fnrecipe.shell.sample import sample
from fnrecipe.shell.screen.display import duration
from fnrecipe.shell.session import Session
from fnrecipe.shell.trained.export import export_at_end


def ended(session: Session[C], last: Tick, steps: int) -> int:
    """The sample, or the word that goes with a signal; the exit status.

    Raises:
        Stopped: if a signal has come before anything was made.
        FnrecipeError: if that was all the time there was: the same command would not come further.
        UsageError: if there was no data.
    """
    recipe, config, display, stop = session.recipe, session.config, session.display, last.stop or stop_signal(session, 0)
    if last.number == 0 and stop is not None:
        raise Stopped(Signal(stop))
    if last.number == 0:
        raise UsageError(NO_ROW)
    if last.stop is None:
        stop = sample(session, shown_params(recipe, config, last.state))
        export_at_end(session)
    if stop == ALARM and not steps:
        raise FnrecipeError(too_short(config))
    if stop is not None:
        why = "regime.max_minutes" if stop == ALARM else Signal(stop).name
        display.line(f"{why}: saved step {last.number:,}; the same command goes on from there")
        return EXIT_AGAIN if stop == ALARM else EXIT_STATUS[Signal(stop)]
    display.line(f"done: step {last.number:,}, {steps:,} steps in {duration(time.monotonic() - session.started)}")
    return 0


def stop_signal(session: Session[C], heard: int) -> int | None:
    """The signal to stop at: the one that this process has received if it is alone, or that all ranks have heard of."""
    return session.signals.received if session.gang.alone else heard or None


def too_short(config: ShellConfig) -> str:
    return f"regime.max_minutes: expected time for a step at least, found none made in {config.regime.max_minutes:g} minutes"
