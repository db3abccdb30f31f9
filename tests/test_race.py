"""The race of optimizers: how it searches a rate, what it counts, and that it goes on behind the runs that are done."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import cases, race
from fnrecipe.config import resolve
from fnrecipe.recipes.lm.train import recipe


@pytest.mark.parametrize("best", [-5, 0, 1, 4])
def test_rates_are_doubled_and_halved_until_the_best_is_between_worse_ones(best: int) -> None:
    tried: dict[int, float] = {}
    while (number := race.next_doublings(tried)) is not None:
        assert number not in tried
        tried[number] = math.nan if number > best + 1 else (number - best) ** 2.0
    assert {best - 1, best, best + 1} <= tried.keys()
    assert len(tried) <= abs(best) + 3


def test_steps_are_counted_to_a_mean_of_losses() -> None:
    losses = [float(20 - number) for number in range(20)]
    assert race.smoothed(losses)[:3] == [20, 19.5, 19]
    assert race.smoothed(losses)[-1] == sum(range(1, 11)) / 10
    assert race.steps_to(losses, 10.5) == 15  # the mean of 15 to 6
    assert race.steps_to(losses, 1.0) is None


def test_losses_are_compared_at_equal_seconds() -> None:
    fast = race.Run("", "adamw", 0, 1, tuple(float(20 - number) for number in range(20)), 0.0, 0.5)
    slow = race.attrs.evolve(fast, cpu=2.0)
    assert race.after_seconds(fast, 1.4) == race.after_seconds(slow, 5.9) == 19.5  # two steps
    assert race.after_seconds(fast, 99.0) == race.smoothed(fast.losses)[-1]
    assert race.after_seconds(slow, 0.1) == 20


def test_the_model_of_a_bpe_reads_the_text_that_it_is_trained_on(tmp_path: Path) -> None:
    config = race.config_of(race.Job("7M", "soap", 0, 1), tmp_path)
    assert config.model.config == cases.CASES["7M"].config
    assert config.tokenizer.path == str(tmp_path / "tokenizer.json")
    assert [source.path for source in config.dataset.sources] == [str(tmp_path / "text.jsonl")]


@pytest.mark.parametrize("name", race.ENTRIES)
def test_each_optimizer_has_a_config_at_its_rate(name: str) -> None:
    config = race.config_of(race.Job("0.8M", name, 1, 7))
    assert config.optimizer.name == name
    assert config.optimizer.config.lr == 2 * race.ENTRIES[name][0]  # type: ignore[attr-defined]
    assert (config.common.seed, config.regime.num_steps) == (7, race.STEPS)


def test_it_goes_on_behind_the_runs_that_are_done(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ("model.config.model_dim=16", "model.config.num_layers=1", "dataset.max_seq_len=16", f"dataset.sources={texts}")
    tiny = {"tiny": race.Model(pairs, ("adamw", "schedule_free"))}
    config = resolve(recipe.config, pairs=["trainer.jit=off"])[0]
    for name, value in {"MODELS": tiny, "STEPS": 2, "VALID": 1, "SMOOTHED": 1}.items():
        monkeypatch.setattr(race, name, value)
    monkeypatch.setattr(race, "recipe", race.attrs.evolve(recipe, config=config))
    keep, picture = tmp_path / "runs.jsonl", tmp_path / "race.svg"
    results = race.run(1, 10.0, keep, picture, ["tiny"])
    runs = keep.read_text()
    best = [each for each in results if each.metric == "validation loss"]
    assert {(each.system, len(each.values)) for each in best} == {("adamw", 2), ("schedule_free", 2)}
    assert len(runs.splitlines()) >= 8
    drawn = picture.with_name("race-tiny.svg").read_text()
    assert [drawn.count(word) for word in (">schedule_free", ">step<", ">CPU seconds<")] == [2, 1, 1]
    assert race.run(1, 10.0, keep, None, ["tiny"]) == results
    assert keep.read_text() == runs
