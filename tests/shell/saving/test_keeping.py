"""Which checkpoints a run keeps, what of them, and what it says where they find no space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

import fnrecipe
from fnrecipe.checkpoint import keep
from fnrecipe.config import RegimeSection, resolve
from fnrecipe.errors import CheckpointError, ConfigError, UsageError
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell.directory import layout
from fnrecipe.shell.saving import space
from fnrecipe.shell.saving.keeping import policy_of, scores_of
from fnrecipe.shell.train import train as run
from tests.helpers import assert_same_bits, end, pairs, remains, rows, start
from tests.shell.trained.test_load import validation_loss

BEST = {
    "regime__checkpoint_every_n_steps": 1,
    "regime__validate_every_n_steps": 2,
    "regime__keep_last_n_checkpoints": 1,
    "regime__keep_best_n_checkpoints": 1,
    "regime__keep_model_only": "true",
}


def train(texts: Path, out: Path, **changes: Any) -> int:
    usual = {"regime__num_steps": 6, "lr_scheduler__config__num_warmup_steps": 1, "dataset__prefetch": 0, "trainer__jit": "off"}
    config, _ = resolve(recipe.config, (), pairs(texts, **{**usual, **changes}))
    return run(attrs.evolve(recipe, origin="lm"), config, out)


def names(out: Path) -> set[str]:
    return {path.name for path in (out / layout.CHECKPOINTS).iterdir()}


@pytest.mark.parametrize(("optimizer", "lower"), [("adamw", True), ("schedule_free", False)])
def test_the_best_of_what_was_validated_is_kept_with_the_model_that_was(
    texts: Path, tmp_path: Path, optimizer: str, lower: bool
) -> None:
    free = {"optimizer": "{name: schedule_free, config: {lr: 0.01}}", "lr_scheduler": "{name: constant, config: {}}"}
    changes = free if optimizer == "schedule_free" else {}
    assert train(texts, tmp_path, **BEST, **changes, regime__lower_score_is_better=str(lower).lower()) == 0
    losses = {row["step"]: row["valid/loss"] for row in rows(tmp_path / "metrics/valid.jsonl")}
    before_the_end = {step: loss for step, loss in losses.items() if step < 6}  # the last one is kept as such
    best = (min if lower else max)(before_the_end, key=lambda step: before_the_end[step])
    assert names(tmp_path) == {f"model_{best:08d}", "step_00000006"}
    found = fnrecipe.load(tmp_path, step=best)
    assert validation_loss(found) == pytest.approx(losses[best], rel=1e-6)
    tensors = safetensors.torch.load_file(tmp_path / f"checkpoints/model_{best:08d}/state_0000.safetensors")
    parts = {name.split(".")[0] for name in tensors}
    assert parts == ({"params"} if optimizer == "adamw" else {"params", "optimizer"})


def test_every_nth_is_kept_for_ever(texts: Path, tmp_path: Path) -> None:
    changes = {"regime__keep_last_n_checkpoints": 2, "regime__keep_checkpoint_every_n_steps": 2}
    assert train(texts, tmp_path, regime__checkpoint_every_n_steps=1, **changes, regime__num_steps=7) == 0
    assert names(tmp_path) == {f"step_{step:08d}" for step in (2, 4, 6, 7)}


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        ("vaild/loss", r"found no evaluation 'vaild'; did you mean valid\?"),
        ("valid/los", r"a number that metrics/valid.jsonl has, found valid/los; did you mean valid/loss\?"),
    ],
)
def test_a_score_that_there_is_not_is_told(texts: Path, tmp_path: Path, metric: str, line: str) -> None:
    with pytest.raises(UsageError, match=f"^regime.score_metric: expected .*{line}"):
        train(texts, tmp_path, **BEST, regime__score_metric=metric)


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("{keep_last_n_checkpoints: null, keep_best_n_checkpoints: 2}", "regime.keep_best_n_checkpoints: expected null where"),
        ("{keep_model_only: true}", "regime.keep_model_only: expected false where neither"),
        ("{score_metric: loss}", "regime.score_metric: expected EVALUATION/NAME, such as valid/loss, found 'loss'"),
        ("{max_minutes: 0}", "regime.max_minutes: expected a number above 0"),
    ],
)
def test_a_policy_that_says_nothing_is_refused(pair: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe.config, (), [f"regime={pair}"])
    assert str(caught.value).startswith(line)


def test_a_row_that_is_being_written_and_a_loss_of_nothing_are_no_scores(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = [{"step": 2, "valid/loss": 3.0}, {"step": 4, "valid/loss": None}, {"step": 6, "valid/loss": 2.0}]
    (tmp_path / "metrics/valid.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert scores_of(tmp_path, RegimeSection(keep_best_n_checkpoints=1)) == {2: 3.0}


def test_what_is_kept_may_be_changed_when_a_run_goes_on(texts: Path, tmp_path: Path) -> None:
    assert train(texts, tmp_path, regime__num_steps=2, regime__checkpoint_every_n_steps=1) == 0
    changes = {"regime__checkpoint_every_n_steps": 2, "regime__keep_last_n_checkpoints": 1}
    assert train(texts, tmp_path, regime__num_steps=3, **changes) == 0
    assert names(tmp_path) == {"step_00000003"}


def test_a_save_that_finds_no_space_is_told_in_bytes_and_the_same_command_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(texts, tmp_path / "undisturbed") == 0
    capsys.readouterr()
    written = sum(path.stat().st_size for path in tmp_path.glob("undisturbed/checkpoints/step_00000006/*.safetensors"))
    free = iter([10**9, 10**9, 1000])  # at the start, at step 4, at the end
    with monkeypatch.context() as patch:
        patch.setattr(space, "free_bytes", lambda path: next(free))
        with pytest.raises(CheckpointError) as caught:
            train(texts, tmp_path / "full")
    place = tmp_path / "full/checkpoints/step_00000006"
    needed = int(str(caught.value).partition("expected ")[2].split()[0].replace(",", ""))
    assert str(caught.value).startswith(
        f"{place}: cannot save it, and nothing was written: expected {needed:,} bytes of free space, found 1,000. "
        f"Make room for {needed - 1000:,} bytes, and the same command goes on from the checkpoint before; regime.keep_last_n_"
    )
    assert 0.9 * written < needed < written  # a header, and nothing that two ranks would both write
    assert names(tmp_path / "full") == {"step_00000004"}
    assert "take up to" not in capsys.readouterr().out
    assert train(texts, tmp_path / "full") == 0
    assert remains(tmp_path / "full") == remains(tmp_path / "undisturbed")


def test_a_policy_whose_checkpoints_will_not_fit_is_told_at_the_start(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: 500_000)
    assert train(texts, tmp_path, **BEST, regime__num_steps=2) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "take up to" in line]
    assert line.startswith("the checkpoints of this config take up to ")
    assert "(2 of 3" in line
    assert " and 1 models alone of 1" in line
    assert "there is space for 500,000; regime.keep_last_n_checkpoints, " in line


counts = st.integers(1, 12)


@given(counts, counts, st.integers(1, 4), st.none() | counts, st.integers(0, 4), st.booleans())
def test_there_are_never_more_checkpoints_at_once_than_the_estimate(
    num_steps: int, every: int, last: int, nth: int | None, best: int, model_only: bool
) -> None:
    small = model_only and bool(nth or best)
    regime = RegimeSection(
        num_steps=num_steps,
        checkpoint_every_n_steps=every,
        keep_last_n_checkpoints=last,
        keep_checkpoint_every_n_steps=nth,
        keep_best_n_checkpoints=best or None,
        keep_model_only=small,
    )
    whole, models = space.most_at_once(regime, policy_of(regime))
    there: list[keep.Entry] = []
    for step in range(1, num_steps + 1):
        if step % every == 0 or step == num_steps:
            there.append(keep.Entry(step, score=float(step * 7 % 5)))
            assert sum(not entry.model_only for entry in there) <= whole
            found = keep.plan(there, policy_of(regime))
            left = [entry for entry in there if entry.step not in found.removed]
            there = [keep.Entry(entry.step, entry.score, entry.step in found.model_only) for entry in left]
            assert sum(entry.model_only for entry in there) <= models


def test_of_a_policy_that_keeps_all_every_save_counts() -> None:
    assert space.most_at_once(RegimeSection(num_steps=10, checkpoint_every_n_steps=4), keep.Policy()) == (3, 0)


def test_a_place_that_is_not_there_yet_is_as_free_as_its_parent(tmp_path: Path) -> None:
    assert space.free_bytes(tmp_path / "a/b/c") == pytest.approx(space.free_bytes(tmp_path), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_models_of_several_ranks_are_those_of_one(texts: Path, tmp_path: Path, sharding: str) -> None:
    keep_models = {"regime__keep_last_n_checkpoints": 1, "regime__keep_checkpoint_every_n_steps": 2}
    intervals = {"regime__num_steps": 5, "regime__checkpoint_every_n_steps": 2, "lr_scheduler__config__num_warmup_steps": 1}
    small = {**intervals, "regime__keep_model_only": "true", **keep_models}
    assert train(texts, tmp_path / "one", **small) == 0
    command = ("train", "lm", "--out", str(tmp_path / "two"), "--nproc", "2", "--config")
    ended = end(start(*command, *pairs(texts, **small, gang__sharding=sharding, trainer__jit="off")))
    assert (ended.status, ended.errors) == (0, "")
    assert names(tmp_path / "two") == names(tmp_path / "one") == {"model_00000002", "model_00000004", "step_00000005"}
    for step in (2, 4):
        one, two = (fnrecipe.load(tmp_path / run, step=step).params for run in ("one", "two"))
        assert_same_bits(two, one)
