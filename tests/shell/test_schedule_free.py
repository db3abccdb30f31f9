"""Runs of schedule-free AdamW: what is measured, exported and loaded is the mean x of its steps, not what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fnrecipe
from fnrecipe import checkpoint
from fnrecipe.config import resolve
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell.train import train
from tests.helpers import end, pairs, rows, start
from tests.shell.trained.test_load import validation_loss

FREE = {
    "regime__num_steps": 4,
    "regime__checkpoint_every_n_steps": 1,
    "regime__keep_last_n_checkpoints": "null",
    "regime__validate_every_n_steps": 4,
    "optimizer": "{name: schedule_free, config: {lr: 0.01, betas: [0.8, 0.95]}}",
    "lr_scheduler": "{name: constant, config: {num_warmup_steps: 0}}",
}
"""At a constant rate all steps count alike."""


def saved(out: Path, step: int) -> dict[str, Tensor]:
    return safetensors.torch.load_file(checkpoint.of_step(out / "checkpoints", step).directory / "state_0000.safetensors")


def mean_of_steps(out: Path, path: str) -> Tensor:
    """That of the points z that the checkpoints have."""
    points = [saved(out, step) for step in range(1, 5)]
    (name,) = [name for name in points[0] if name.startswith("optimizer.") and name.endswith(f".z.{path}")]
    return torch.stack([point[name].double() for point in points]).mean(0)


@pytest.mark.parametrize("more", [{}, {"optimizer__groups": "[{params: ['@norms'], lr_scale: 0.5}]"}], ids=["alone", "groups"])
def test_what_is_shown_is_the_mean_of_all_steps(texts: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    quick = {"dataset__prefetch": 0, "trainer__jit": "off", "regime__export_hugging_face": "true"}
    config, _ = resolve(lm.config, (), pairs(texts, **FREE, **quick, **more))
    assert train(attrs.evolve(lm, origin="lm"), config, tmp_path) == 0
    found = fnrecipe.load(tmp_path)
    for path, leaf in {"embedding": found.params["embedding"], "norm": found.params["norm"]}.items():
        torch.testing.assert_close(leaf.double(), mean_of_steps(tmp_path, path), rtol=0, atol=1e-6)
        assert not torch.equal(leaf, saved(tmp_path, 4)[f"params.{path}"])
    assert validation_loss(found) == pytest.approx(rows(tmp_path / "metrics/valid.jsonl")[-1]["valid/loss"], rel=1e-6)
    exported = safetensors.torch.load_file(tmp_path / "hugging_face/model.safetensors")
    assert torch.equal(exported["model.norm.weight"], found.params["norm"])


@pytest.mark.slow
def test_sharded_over_two_processes_it_is_the_same(texts: Path, tmp_path: Path) -> None:
    for name, options in {"one": [], "two": ["--nproc", "2"]}.items():
        values = pairs(texts, **FREE, gang__sharding="fsdp")
        done = end(start("train", "lm", "--out", str(tmp_path / name), *options, "--config", *values))
        assert done.status == 0, done.errors
    assert (tmp_path / "one/metrics/valid.jsonl").read_bytes() == (tmp_path / "two/metrics/valid.jsonl").read_bytes()
    assert torch.equal(fnrecipe.load(tmp_path / "two").params["norm"], fnrecipe.load(tmp_path / "one").params["norm"])


def test_without_a_mean_in_the_parameters_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer.config.betas: expected a first number above 0: .*, found \[0.0, 0.9\]"):
        resolve(lm.config, (), ["optimizer.name=schedule_free", "optimizer.config.betas=[0, 0.9]"])
