"""What `trainer.jit` stands for where."""

from __future__ import annotations

import pytest
import torch

from fnrecipe import optim
from fnrecipe.build import without_fused_update
from fnrecipe.compiler.modes import BACKENDS, JitMode, jit_mode


@pytest.mark.parametrize(("device", "expected"), [("cpu", "trace"), ("cuda", "inductor"), ("cuda:3", "inductor")])
def test_auto_is_chosen_by_the_device(device: str, expected: JitMode) -> None:
    assert jit_mode("auto", torch.device(device)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", ["off", "trace", "inductor"])
def test_a_level_that_is_named_is_that_level_everywhere(named: JitMode, device: str) -> None:
    assert jit_mode(named, torch.device(device)) == named


def test_every_level_but_off_has_something_that_runs_its_graph() -> None:
    assert BACKENDS.keys() == {"trace", "inductor"}


def test_only_inductor_makes_the_update_by_itself() -> None:
    update = optim.adamw(lambda step: step * 0.1)
    assert without_fused_update(update, "trace").fused_update is not None
    assert without_fused_update(update, "off").fused_update is not None
    assert without_fused_update(update, "inductor").fused_update is None
