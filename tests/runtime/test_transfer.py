"""Metrics that are read one publication late: the same files, and nothing is read in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fnrecipe.config import resolve
from fnrecipe.data import pipe
from fnrecipe.data.stream import Cursor, Source, Stream
from fnrecipe.errors import DataError, NonFiniteError
from fnrecipe.nn import document_attention
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.clock import DeviceEvent, record_event
from fnrecipe.runtime.transfer import fetch, publication_delay
from fnrecipe.shell import publish
from fnrecipe.shell import train as run
from tests.helpers import pairs, remains, rows

CPU = torch.device("cpu")
SMALL = {"regime__num_steps": 6, "dataset__prefetch": 0, "trainer__jit": "off", "regime__num_sample_tokens": 0}
ALONE = {"regime__checkpoint_every_n_steps": "null", "regime__validate_every_n_steps": "null"}
READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many publications late metrics are read."""
    return lambda publications: monkeypatch.setattr(publish, "publication_delay", lambda device: publications)


def train(texts: Path, out: Path, before_batch: Callable[[int], None] = lambda number: None, **changes: Any) -> None:
    """A run that tells the number of each batch, from 1 in each process, before it is given."""

    def stage(source: Source[Any], cursor: Cursor = None) -> Stream[Any]:
        for number, entry in enumerate(source(cursor), 1):
            before_batch(number)
            yield entry

    staged = attrs.evolve(recipe, stream=lambda config, place: pipe(recipe.stream(config, place), stage), sample=None)
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SMALL, **changes}))
    assert run.train(staged, config, out) == 0


def left(out: Path) -> dict[str, bytes]:
    (out / "sample.txt").touch()
    return remains(out)


def test_rows_are_what_reading_each_number_gives() -> None:
    def row(number: int) -> dict[str, torch.Tensor]:
        values = {"step": number, "loss": number / 3, "rate": torch.tensor(number / 7, dtype=torch.float64)}
        return {name: torch.as_tensor(value) for name, value in values.items()}

    given = [row(number) for number in range(1, 4)]
    found = fetch(given, CPU).rows()
    assert found == [{name: value.item() for name, value in row.items()} for row in given]
    assert {name: type(value) for name, value in found[0].items()} == {"step": int, "loss": float, "rate": float}
    assert fetch([], CPU).rows() == []


def test_what_is_fetched_does_not_change_with_the_tensors_it_comes_from() -> None:
    value = torch.tensor(1.0)
    fetched = fetch([{"loss": value}], CPU)
    value.fill_(2)
    assert fetched.rows() == [{"loss": 1.0}]


@attrs.frozen
class Event:
    """Like torch's: times are in milliseconds, of events that were waited for."""

    milliseconds: float
    waited: list[Any]

    def synchronize(self) -> None:
        self.waited.append(self)

    def elapsed_time(self, later: Event) -> float:
        assert later in self.waited
        return later.milliseconds - self.milliseconds


def test_time_between_moments_of_a_device_is_its_own() -> None:
    waited: list[Any] = []
    first, last = (DeviceEvent(seconds, Event(milliseconds, waited)) for seconds, milliseconds in ((0.0, 500), (0.1, 2500)))  # type: ignore[arg-type]
    assert last.since(first) == 2.0
    assert waited == [last.event]
    assert 0 <= record_event(CPU).since(record_event(CPU)) + 1 < 1.0001


@pytest.mark.parametrize(("device", "publications"), [("cpu", 0), ("cuda", 1)])
def test_only_what_runs_behind_the_host_is_late(device: str, publications: int) -> None:
    assert publication_delay(torch.device(device)) == publications


@pytest.mark.parametrize("publications", [0, 1])
def test_lines_are_written_so_many_publications_late(
    texts: Path, tmp_path: Path, late: Callable[[int], None], publications: int
) -> None:
    late(publications)
    seen: list[int] = []

    def look(number: int) -> None:
        seen.append(len(rows(tmp_path / "metrics/train.jsonl")) if (tmp_path / "metrics/train.jsonl").exists() else 0)

    train(texts, tmp_path, look, **ALONE, regime__publish_metrics_every_n_steps=1)
    assert seen == [max(step - publications, 0) for step in range(6)]
    assert [row["step"] for row in rows(tmp_path / "metrics/train.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(tmp_path / "logs/perf.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("publications", "expected"), [(0, {2, 4, 6}), (1, {4, 6})])
def test_nothing_is_read_between_publications(
    texts: Path,
    tmp_path: Path,
    late: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    publications: int,
    expected: set[int],
) -> None:
    late(publications)
    step, found = 0, set[int]()

    def reading(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if (
                sys._getframe(1).f_globals is not document_attention.__dict__
            ):  # where documents begin, which a GPU's kernels read
                found.add(step)
            return read(*args, **kwargs)

        return call

    def count(number: int) -> None:
        nonlocal step
        step = number
        for name in READS if number == 1 else ():
            monkeypatch.setattr(torch.Tensor, name, reading(getattr(torch.Tensor, name)))

    train(texts, tmp_path, count, **ALONE, trainer__jit="trace", regime__publish_metrics_every_n_steps=2)
    assert found - {1} == expected  # tracing, in the first step, looks at constants


def test_what_is_late_leaves_the_same_files_whenever_it_was_killed(
    texts: Path, tmp_path: Path, late: Callable[[int], None]
) -> None:
    train(texts, tmp_path / "expected")
    late(1)
    train(texts, tmp_path / "late")
    assert left(tmp_path / "late") == left(tmp_path / "expected")

    def kill_before(last: int, number: int) -> None:
        if number == last:
            raise DataError("killed")

    for last in range(2, 7):
        out = tmp_path / f"killed before {last}"
        with pytest.raises(DataError, match="killed"):
            train(texts, out, partial(kill_before, last))
        train(texts, out)
        assert left(out) == left(tmp_path / "expected")


@pytest.mark.parametrize(("interval", "last"), [("null", 6), (5, 5)])
def test_a_run_without_hope_ends_a_publication_later_or_before_a_save_and_with_the_same_files(
    texts: Path, tmp_path: Path, late: Callable[[int], None], interval: Any, last: int
) -> None:
    changes = {"optimizer__config__lr": 1e25, "trainer__max_skipped_steps": 3, "regime__num_steps": 30, **ALONE}
    changes |= {"regime__checkpoint_every_n_steps": interval, "regime__publish_metrics_every_n_steps": 2}
    made: list[int] = []
    for publications in (0, 1):
        late(publications)
        with pytest.raises(NonFiniteError, match="step 4: the loss or the gradient was not finite in 3 steps in a row"):
            train(texts, tmp_path / str(publications), lambda number: made.append(number), **changes)
    assert made == [*range(1, 5), *range(1, last + 1)]
    first, second = ((tmp_path / name / "metrics/train.jsonl").read_bytes() for name in "01")
    assert first == second
    assert not list(tmp_path.glob("*/checkpoints/*"))
