"""What `trainer.jit` stands for where."""

from __future__ import annotations

import pytest
import torch

from fnrecipe import optim
from fnrecipe.build import fitting
from fnrecipe.compiler.modes import BACKENDS, Level, level


@pytest.mark.parametrize(("device", "expected"), [("cpu", "trace"), ("cuda", "inductor"), ("cuda:3", "inductor")])
def test_auto_is_chosen_by_the_device(device: str, expected: Level) -> None:
    assert level("auto", torch.device(device)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", ["off", "trace", "inductor"])
def test_a_level_that_is_named_is_that_level_everywhere(named: Level, device: str) -> None:
    assert level(named, torch.device(device)) == named


def test_every_level_but_off_has_something_that_runs_its_graph() -> None:
    assert BACKENDS.keys() == {"trace", "inductor"}


def test_only_inductor_makes_the_update_by_itself() -> None:
    update = optim.adamw(lambda step: step * 0.1)
    assert fitting(update, "trace").apply is not None
    assert fitting(update, "off").apply is not None
    assert fitting(update, "inductor").apply is None
