"""Observers see each tick while its state is valid; whoever keeps a state is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from signal import SIGTERM
from typing import Any

import attrs
import pytest
import torch

from fnrecipe.config import RegimeSection
from fnrecipe.errors import FnrecipeError
from fnrecipe.fold import fold
from fnrecipe.observe import Tick, Ticks, observed
from fnrecipe.runtime.position import Position
from fnrecipe.runtime.signals import Stopped
from fnrecipe.shell.observers import announced, evaluated, saved, scheduled
from fnrecipe.shell.publish import Publication, published
from fnrecipe.shell.recording.throughput import Work
from fnrecipe.step import Metrics, State
from fnrecipe.transforms import jit


def state(number: int = 0) -> State:
    return State(
        {"x": torch.tensor(float(number))}, (), torch.tensor(number), torch.tensor(0), torch.zeros(2, dtype=torch.int64)
    )


def step(state: State, batch: Any) -> tuple[State, Metrics]:
    after = State({"x": state.params["x"] + 1}, (), state.step + 1, state.skipped, state.key)
    return after, {"loss": after.params["x"].clone()}


def stream(heard: Sequence[int] = (), end: int | None = None, stop: int | None = None) -> Iterator[tuple[Any, Position]]:
    for number in count(1):
        if number == stop:
            raise Stopped(SIGTERM)
        if end is not None and number > end:
            return
        yield torch.zeros(1), Position(number, 0.5, SIGTERM if number in heard else 0)


def timed(clock: Sequence[float]) -> Iterator[tuple[Any, Position]]:
    for number, seconds in enumerate(clock, 1):
        yield torch.zeros(1), Position(number, clock=seconds)


def ticks(regime: RegimeSection, start: int = 0, donate: bool = False, **passing: Any) -> Ticks:
    function = jit(step, donate=1) if donate else step
    first = Tick(start, None, states=[state(start)])
    folded = fold(function, first.state, stream(**passing))
    return scheduled(folded, first, regime, partial(due, regime), lambda heard: heard or None)


def due(regime: RegimeSection, number: int) -> bool:
    return regime.validate_every_n_steps is not None and number % regime.validate_every_n_steps == 0


def seen(ticks: Ticks, found: list[tuple[Any, ...]]) -> Ticks:
    for tick in ticks:
        due = "".join(letter for letter in "pse" if getattr(tick, {"p": "publish", "s": "save", "e": "evaluate"}[letter]))
        found.append((tick.number, due, tick.state.params["x"].item(), tick.last))
        yield tick


REGIME = RegimeSection(num_steps=5, checkpoint_every_n_steps=4, validate_every_n_steps=2, publish_metrics_every_n_steps=3)


@pytest.mark.parametrize("donate", [False, True])
def test_ticks_say_what_is_due_and_hold_the_newest_state(donate: bool) -> None:
    found: list[tuple[Any, ...]] = []
    last = observed(ticks(REGIME, donate=donate), partial(seen, found=found))
    assert found == [
        (0, "", 0.0, False),
        (1, "", 1.0, False),
        (2, "e", 2.0, False),
        (3, "p", 3.0, False),
        (4, "pse", 4.0, False),
        (5, "", 5.0, False),
        (5, "pse", 5.0, True),
    ]
    assert (last.number, last.cursor, last.stop) == (5, 5, None)


@pytest.mark.parametrize(
    ("start", "passing", "number", "due", "stop"),
    [
        (0, {"heard": [2]}, 2, "p", SIGTERM),  # saved at the step itself
        (0, {"stop": 3}, 2, "ps", SIGTERM),  # agreed on while data was waited for
        (0, {"stop": 1}, 0, "p", SIGTERM),
        (0, {"end": 3}, 3, "pse", None),
        (0, {"end": 0}, 0, "p", None),
        (5, {}, 5, "pe", None),  # nothing is left to do, but the last evaluation may be missing
        (4, {}, 5, "pse", None),
    ],
)
def test_the_last_tick_has_what_is_left_to_do(start: int, passing: Any, number: int, due: str, stop: int | None) -> None:
    found: list[tuple[Any, ...]] = []
    last = observed(ticks(REGIME, start, **passing), partial(seen, found=found))
    assert (last.number, last.stop, last.last) == (number, stop, True)
    assert found[-1][1] == due


def test_a_run_that_goes_on_makes_up_for_the_evaluation_of_its_first_step() -> None:
    found: list[tuple[Any, ...]] = []
    observed(ticks(REGIME, 4), partial(seen, found=found))
    assert found[0] == (4, "e", 4.0, False)


def test_minutes_count_from_the_start_and_from_each_save() -> None:
    """Saved behind steps 2 (130 s), 4 by its number (140 s), and 6, 120 s behind that."""
    regime = RegimeSection(num_steps=8, checkpoint_every_n_steps=4, checkpoint_every_n_minutes=2, validate_every_n_steps=None)
    first = Tick(0, None, states=[state()])
    folded = fold(step, first.state, timed([119, 130, 131, 140, 259.9, 260, 300, 301]))
    found: list[tuple[Any, ...]] = []
    observed(scheduled(folded, first, regime, partial(due, regime), lambda heard: None), partial(seen, found=found))
    assert [number for number, due, _, _ in found if "s" in due] == [2, 4, 6, 8]


@pytest.mark.parametrize("donate", [False, True])
def test_an_observer_that_keeps_a_state_is_told(donate: bool) -> None:
    kept = []

    def keeping(ticks: Ticks) -> Ticks:
        for tick in ticks:
            kept.append(tick.state)
            yield tick

    with pytest.raises(FnrecipeError, match="the state of step 0: an observer keeps it"):
        observed(ticks(REGIME, donate=donate), keeping)


def test_the_state_of_an_old_tick_cannot_be_asked_for() -> None:
    kept: list[Tick] = []

    def keeping(ticks: Ticks) -> Ticks:
        for tick in ticks:
            kept.append(tick)
            yield tick

    observed(ticks(REGIME), keeping)
    with pytest.raises(RuntimeError, match="the state of step 3 is gone"):
        _ = kept[3].state
    assert [tick.waited for tick in kept[1:-1]] == [0.5] * 5


def test_observers_run_in_their_order_and_behind_a_yield_once_all_are_done() -> None:
    found: list[str] = []

    def named(ticks: Ticks, name: str) -> Ticks:
        for tick in ticks:
            found.append(f"{name}{tick.number}")
            yield tick
            found.append(f"{name}{tick.number} done")

    observed(ticks(RegimeSection(num_steps=1), end=1), partial(named, name="a"), partial(named, name="b"))
    assert found == ["a0", "b0", "b0 done", "a0 done", "a1", "b1", "b1 done", "a1 done", "a1", "b1", "b1 done", "a1 done"]


@attrs.frozen
class Saver:
    """Notes what it is asked for; what it saves is there at once."""

    done: list[tuple[str, int]]

    def save(self, tick: Tick) -> None:
        self.done.append(("save", tick.number))

    def check(self) -> None:
        pass

    def wait(self) -> None:
        self.done.append(("wait", 0))


def test_the_stages_of_a_run_do_what_is_due() -> None:
    done: list[tuple[str, int]] = []
    observed(
        ticks(REGIME),
        partial(announced, first=lambda: done.append(("first", 1))),
        partial(saved, saver=Saver(done)),
        partial(evaluated, evaluate=lambda tick: done.append(("evaluate", tick.number))),
    )
    assert done == [("first", 1), ("evaluate", 2), ("save", 4), ("evaluate", 4), ("save", 5), ("evaluate", 5), ("wait", 0)]


def test_the_time_of_an_evaluation_between_two_publications_is_not_that_of_steps() -> None:
    found: list[Publication] = []

    def slow(tick: Tick) -> None:
        time.sleep(0.2)

    stages = partial(published, write=found.append, device=torch.device("cpu")), partial(evaluated, evaluate=slow)
    began = time.monotonic()
    observed(ticks(attrs.evolve(REGIME, validate_every_n_steps=1, checkpoint_every_n_steps=None)), *stages)
    assert time.monotonic() - began > 1.0

    assert [len(publication.pauses) for publication in found] == [2, 2]
    work = Work(positions=1, flops=None, peak=None)
    for publication in found:
        rows = [{"targets": 1.0, **row} for row in publication.metrics.rows()]
        rows = [{"step": float(number), **row} for number, row in enumerate(rows, publication.clock.step + 1)]
        args = work, rows, publication.waits, publication.metrics.ready
        paused = sum(end.since(began) for began, end in publication.pauses)
        without, all_told = (1 / publication.clock.speed(*args, p).steps_per_second for p in (publication.pauses, ()))
        steps = sum(row["step"] > publication.clock.step for row in rows)
        assert paused >= 0.4
        assert all_told * steps == pytest.approx(without * steps + paused)
