"""The rank for which the others wait is named, by the time that each is at work."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from fnrecipe.runtime.clock import work_seconds
from fnrecipe.shell.guards.stragglers import Slowest, slowest, tell_straggler
from tests.helpers import end, rows, start
from tests.recipes import regression

SLOW = """
import time

import attrs
import torch.distributed as dist

from tests.recipes.regression import recipe as regression


def loss(config):
    of_batch = regression.loss(config)

    def slow_on_the_second_rank(params, batch, key=None):
        ends = time.thread_time() + 0.02 * dist.get_rank()
        while time.thread_time() < ends:
            pass
        return of_batch(params, batch, key)

    return slow_on_the_second_rank


recipe = attrs.evolve(regression, loss=loss)
"""


@pytest.mark.slow
def test_the_slowest_of_two_ranks_is_recorded_and_told_once(tmp_path: Path) -> None:
    assert regression.recipe.config.gang.num_microbatches == 8  # 4 on each rank, and so four times 0.02 s
    (tmp_path / "slow.py").write_text(SLOW)
    config = "trainer.jit=off", "regime.publish_metrics_every_n_steps=1", "common.torch.num_threads=1", "regime.num_steps=9"
    ended = end(start("train", str(tmp_path / "slow.py"), "--nproc", "2", "--out", str(tmp_path / "out"), "--config", *config))
    assert ended.status == 0, ended.errors
    found = rows(tmp_path / "out/logs/perf.jsonl")
    assert "perf/slowest_rank" not in found[0]  # the first step counts for nothing
    slow = [row for row in found[2:] if row["perf/slowest_rank"] == 1 and row["perf/slowest_seconds"] > 0.07]
    assert len(slow) > len(found[2:]) / 2
    assert all(row["perf/median_seconds"] < row["perf/slowest_seconds"] for row in slow)
    assert ended.output.count("rank 1 is at work for ") == 1


def test_seconds_are_means_over_the_steps_that_were_counted() -> None:
    assert slowest([]) is None
    assert slowest([(), ()]) is None  # of a gang of one
    assert slowest([(1.0, 4.0, 2.0), (), (3.0, 4.0, 0.0)]) == Slowest(1, 4.0, 2.0)
    assert slowest([(1.0, 3.0)]) == Slowest(1, 3.0, 1.0)  # of two, the median is the lower one


@pytest.mark.parametrize(
    ("found", "step", "told"),
    [
        (Slowest(3, 0.16, 0.1), 0.2, True),
        (Slowest(3, 0.15, 0.1), 0.2, False),  # not more than half as much again
        (Slowest(3, 0.003, 0.001), 0.2, False),  # nothing beside the step
    ],
)
def test_a_rank_is_told_if_it_is_much_slower(found: Slowest, step: float, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fnrecipe"):
        tell_straggler(found, step)
    assert ("rank 3 is at work for 0.16 s of a step, the median of ranks for 0.1 s" in caplog.text) == told


def test_a_thread_that_sleeps_is_not_at_work() -> None:
    began = work_seconds()
    time.sleep(0.2)
    assert work_seconds() - began < 0.1
    ends = time.thread_time() + 0.05
    while time.thread_time() < ends:
        pass
    assert work_seconds() - began >= 0.05
