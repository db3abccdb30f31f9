"""The line about a step, and the lines of the log."""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from pathlib import Path

import attrs
import pytest

from fnrecipe.errors import UsageError
from fnrecipe.models.flops import TokenFlops
from fnrecipe.shell.recording.throughput import Speed, Work, speed
from fnrecipe.shell.screen.display import Display, step_facts

METRICS = {"step": 20, "train/loss": 1.2345, "train/lr": 2e-3, "train/skipped": 0}
TIMED = speed(Work(8000, TokenFlops(60, 40), 1e6), [7500, 7900], [0.1, 0.1], 2.0)


@pytest.mark.parametrize(
    ("timed", "line"),
    [
        (TIMED, "loss 1.234  lr 2.0e-03  7,700 tokens/s  48.0% MFU  eta 1m20s"),
        (attrs.evolve(TIMED, mfu=None), "loss 1.234  lr 2.0e-03  7,700 tokens/s  eta 1m20s"),
    ],
)
def test_the_share_of_the_peak_is_shown_where_it_is_known(timed: Speed, line: str) -> None:
    assert step_facts(METRICS, timed, 100) == line


def read(log: Path) -> list[tuple[datetime, str]]:
    """The lines of a log, each with its time."""
    lines = [line.split("  ", 1) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(datetime.fromisoformat(time), text) for time, text in lines]


def test_every_line_of_a_log_has_its_time_and_the_first_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fnrecipe", "train", "a b"])
    before = datetime.now().astimezone().replace(microsecond=0)
    with Display(tmp_path / "log", 100) as display:
        display.line("one\ntwo \udce9")
        display.step(METRICS, TIMED)
        logging.getLogger("fnrecipe.data").warning("bad")
    lines = read(tmp_path / "log")
    shown = ["one", "two \\udce9", "step 20/100  loss 1.234  lr 2.0e-03  7,700 tokens/s  48.0% MFU  eta 1m20s", "bad"]
    assert [text for _, text in lines] == ["command: fnrecipe train 'a b'", *shown]
    assert all(time.tzinfo is not None and before <= time <= datetime.now().astimezone() for time, _ in lines)
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize("error", [UsageError("wrong\n  twice"), ZeroDivisionError("ours")])
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), Display(tmp_path / "log", None):
        raise error
    texts = [text for _, text in read(tmp_path / "log")]
    if isinstance(error, UsageError):
        assert texts[1:] == ["error: wrong", "  twice"]
    else:
        assert (texts[1], texts[-1]) == ("Traceback (most recent call last):", "ZeroDivisionError: ours")


def test_a_log_that_cannot_be_written_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with Display(tmp_path / "log", None) as display:
        display.line("one")
        display.line("two")
    told = f"{tmp_path / 'log'}: cannot write: No space left on device; the run goes on, and this log has gaps"
    assert capsys.readouterr().out.splitlines() == [told, "one", "two"]
