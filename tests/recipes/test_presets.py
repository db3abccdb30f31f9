"""Presets that come with the recipes: whole configs but for the data, which fit their models."""

from __future__ import annotations

from pathlib import Path

import pytest

from fnrecipe.config import resolve
from fnrecipe.errors import did_you_mean
from fnrecipe.models.model import find_family
from fnrecipe.recipes.lm.config import config as defaults
from fnrecipe.shell.find_recipe import presets
from tests.cli.helpers import assert_usage_error, fnrecipe_here

PRESETS = presets()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_20_tokens_a_parameter(name: str) -> None:
    config, sources = resolve(defaults, [PRESETS[name]], ["dataset.sources=data", "gang.sharding=fsdp"])
    count = find_family(config.model.family).parameters
    assert count is not None
    tokens = config.dataset.batch_size * config.dataset.max_seq_len * (config.regime.num_steps or 0)
    assert tokens / sum(count(config.model.config)) == pytest.approx(20, rel=0.05)
    assert sources["regime.num_steps"].startswith(str(PRESETS[name]))
    assert config.lr_scheduler.config.warmup(config.regime.num_steps) == pytest.approx(0.02 * config.regime.num_steps)


def test_a_preset_is_given_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    by_name, by_path = (
        fnrecipe_here(monkeypatch, capsys, "dump-config", "lm", "--config-file", file)
        for file in ("preset:llama_125m", str(PRESETS["llama_125m"]))
    )
    assert by_name == by_path
    assert by_name.status == 0
    assert "num_steps: 5100" in by_name.out


def test_another_name_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended = fnrecipe_here(monkeypatch, capsys, "dump-config", "lm", "--config-file", "preset:llama_125")
    assert_usage_error(ended, "--config-file preset:llama_125: expected a preset", did_you_mean("llama_125", PRESETS))
