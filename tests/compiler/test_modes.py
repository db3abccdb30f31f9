"""What `trainer.jit` stands for where."""

from __future__ import annotations

import pytest
import torch

from fnrecipe import optim
from fnrecipe.build import for_mode
from fnrecipe.compiler.modes import BACKENDS, JitMode, jit_mode
from fnrecipe.optim import fused_adamw


@pytest.mark.parametrize(("device", "expected"), [("cpu", "trace"), ("cuda", "inductor"), ("cuda:3", "inductor")])
def test_auto_is_chosen_by_the_device(device: str, expected: JitMode) -> None:
    assert jit_mode("auto", torch.device(device)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", ["off", "trace", "inductor"])
def test_a_level_that_is_named_is_that_level_everywhere(named: JitMode, device: str) -> None:
    assert jit_mode(named, torch.device(device)) == named


def test_every_level_but_off_has_something_that_runs_its_graph() -> None:
    assert BACKENDS.keys() == {"trace", "inductor"}


@pytest.mark.parametrize(("device", "triton", "fused"), [("cpu", True, False), ("cuda", True, True), ("cuda", False, False)])
def test_inductor_makes_the_update_by_itself_where_triton_does_not(
    device: str, triton: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_adamw, "find_spec", lambda name: triton or None)
    update, there = optim.adamw(lambda step: step * 0.1), torch.device(device)
    assert for_mode(update, "trace", there).fused_update is not None
    assert for_mode(update, "off", there).fused_update is not None
    assert (for_mode(update, "inductor", there).fused_update is not None) == fused
