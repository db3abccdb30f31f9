"""A run is given back as its recipe, its config and its parameters, however many processes trained it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import fnrecipe
from fnrecipe import random, tree
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import CheckpointError, ConfigError, UsageError
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.data import valid_stream
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell.find_recipe import find
from fnrecipe.shell.train import train
from fnrecipe.shell.trained.load import LoadedRun, load
from fnrecipe.transforms import evaluation
from tests.cli.helpers import python
from tests.helpers import assert_same_bits, end, pairs, rows, start

QUICK = {
    "regime__num_steps": 4,
    "regime__checkpoint_every_n_steps": 2,
    "lr_scheduler__config__num_warmup_steps": 1,
    "trainer__jit": "off",
}


def trained(recipe: Recipe[Any], texts: Path, out: Path, **changes: object) -> Path:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**QUICK, **changes}))
    assert train(recipe, config, out) == 0
    return out


@pytest.fixture(scope="module")
def first(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `lm` that nothing may change."""
    return trained(find("lm").load(), texts, tmp_path_factory.mktemp("load") / "first")


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first, tmp_path / "run"))


def validation_loss(found: LoadedRun) -> float:
    """The mean loss of the parameters on the batches that a run is validated on."""
    recipe, config, params = found
    evaluate = evaluation(recipe.loss(config), config.gang.num_microbatches)
    batches = islice(valid_stream(config, LaneAssignment())(None), config.regime.num_validation_batches)
    sums = [evaluate(params, tree.from_numpy(batch)) for batch, _ in batches]
    total = {name: sum(float(row[name]) for row in sums) for name in ("loss", "targets")}
    return total["loss"] / total["targets"]


def check(out: Path, found: LoadedRun) -> None:
    """Whether the parameters are those that were validated and sampled from last."""
    recipe, config, params = found
    assert validation_loss(found) == pytest.approx(rows(out / "metrics/valid.jsonl")[-1]["valid/loss"], rel=1e-6)
    key = random.fold_in(random.key(config.common.seed), "sample")
    assert recipe.sample is not None
    assert recipe.sample(config, params, key) + "\n" == (out / "sample.txt").read_text()
    assert {leaf.device.type for leaf in tree.leaves(params)} == {"cpu"}


def test_a_run_is_given_back(first: Path) -> None:
    found = fnrecipe.load(str(first))
    check(first, found)
    assert found.recipe == attrs.evolve(lm, origin="lm")
    assert found.config.regime.num_steps == 4


def test_the_parameters_have_the_dtype_of_the_run(texts: Path, tmp_path: Path) -> None:
    out = trained(find("lm").load(), texts, tmp_path / "out", model__dtype="bfloat16", regime__num_steps=2)
    found = load(out)
    assert {leaf.dtype for leaf in tree.leaves(found.params)} == {torch.bfloat16}
    check(out, found)


def test_a_recipe_in_a_file_is_found_from_anywhere(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    source = "import attrs\nfrom fnrecipe.recipes.lm.train import recipe as lm\nrecipe = attrs.evolve(lm, name='mine')\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a/my_recipe_of_a.py").write_text(source)
    monkeypatch.chdir(tmp_path / "a")
    trained(find("./my_recipe_of_a.py").load(), texts, tmp_path / "out")
    monkeypatch.chdir("/")
    check(tmp_path / "out", load(tmp_path / "out"))
    assert load(tmp_path / "out").recipe.name == "mine"
    (tmp_path / "a/my_recipe_of_a.py").write_text(source.replace("mine", "other"))
    del sys.modules["my_recipe_of_a"]  # as in another process
    with pytest.raises(UsageError, match=r"out: expected its recipe 'mine' in /.*_a\.py, found 'other'; give it, as in load\("):
        load(tmp_path / "out")
    (tmp_path / "a/my_recipe_of_a.py").unlink()
    with pytest.raises(UsageError, match=r"cannot find its recipe 'mine' again: /.*_of_a\.py: no such recipe file; give it"):
        load(tmp_path / "out")
    assert_same_bits(load(tmp_path / "out", "lm").params, load(run).params)


def test_a_recipe_that_was_made_in_place_has_to_be_given(texts: Path, tmp_path: Path) -> None:
    mine = attrs.evolve(lm, name="mine")
    out = trained(mine, texts, tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        load(out)
    expected = f"{out}: its recipe 'mine' was no file or module that could be found again; give it, as in load(run, recipe=…)"
    assert str(caught.value) == expected
    assert load(out, mine).recipe is mine
    check(out, load(out, mine))


def damage(run: Path) -> None:
    path = run / "checkpoints/step_00000004/state_0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load(run)
    damage(run)
    with caplog.at_level(logging.WARNING, "fnrecipe"):
        older = load(run)
    (line,) = caplog.messages
    assert "step_00000004: damaged checkpoint passed over: " in line
    assert not torch.equal(older.params["embedding"], whole.params["embedding"])
    expected = [row["valid/loss"] for row in rows(run / "metrics/valid.jsonl")]
    assert validation_loss(older) != pytest.approx(expected[-1], rel=1e-6)


def edit(old: str, new: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        path = run / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def record(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "run.json").write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "nothing": (shutil.rmtree, UsageError, "RUN: expected the output directory of a run, found no directory"),
    "empty": (
        lambda run: [shutil.rmtree(run), run.mkdir()],
        UsageError,
        "RUN: expected the output directory of a run, found no run.json in it",
    ),
    "a file": (
        lambda run: [shutil.rmtree(run), run.write_text("")],
        UsageError,
        "RUN: expected the output directory of a run, found no directory",
    ),
    "no config": (
        lambda run: (run / "config.yaml").unlink(),
        UsageError,
        "RUN: expected the output directory of a run, found no config.yaml in it",
    ),
    "a torn record": (
        record('{"recipe": '),
        UsageError,
        "RUN/run.json: expected what a run writes there, found JSONDecode",
    ),
    "a record that is a list": (record("[1]"), UsageError, "RUN/run.json: expected what a run writes there, found TypeError: "),
    "a deep record": (record("[" * 10**5), UsageError, "RUN/run.json: expected what a run writes there, found RecursionError"),
    "a record without a recipe": (record("{}"), UsageError, "RUN/run.json: expected what a run writes there, found KeyError: "),
    "another recipe": (
        record(json.dumps({"recipe": "l", "origin": "l"})),
        UsageError,
        "RUN: cannot find its recipe 'l' again: l: no such recipe; ",
    ),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        CheckpointError,
        "RUN: expected a checkpoint, found none",
    ),
    "only damage": (
        lambda run: [damage(run), shutil.rmtree(run / "checkpoints/step_00000002")],
        CheckpointError,
        "RUN/checkpoints: every checkpoint is damaged; move the directory away to start from scratch",
    ),
    "a key too much": (
        edit("regime:", "regime:\n  num_stepz: 3"),
        ConfigError,
        "regime.num_stepz: expected a known key, found 'num_stepz' (RUN/config.yaml:",
    ),
    "another model": (
        edit("ffn_inner_dim: 64", "ffn_inner_dim: 32"),
        CheckpointError,
        "the checkpoint does not fit this config\nparams.layers.0.down: expected float32 [32, 32], found ",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_run_is_told_in_a_line(run: Path, name: str) -> None:
    spoil, kind, message = BROKEN[name]
    spoil(run)
    with pytest.raises(kind) as caught:
        load(run)
    assert str(caught.value).replace(str(run), "RUN").startswith(message)
    if name != "another model":
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_of_two_processes_that_cut_its_state_is_loaded_by_one(uninterrupted: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = pairs(texts, gang__sharding="fsdp")
    ended = end(start("train", "lm", "--out", str(out), "--nproc", "2", "--config", *settings))
    assert (ended.status, ended.errors) == (0, "")
    assert len(list((out / "checkpoints/step_00000030").glob("state_*.safetensors"))) == 2
    check(out, load(out))
    check(uninterrupted, load(uninterrupted))
    assert_same_bits(load(out).params, load(uninterrupted).params)


@pytest.mark.slow
def test_a_recipe_that_was_run_as_a_script_is_found(texts: Path, tmp_path: Path) -> None:
    lines = ["import attrs", "from fnrecipe.recipes.lm.train import recipe as lm", "recipe = attrs.evolve(lm, name='mine')"]
    lines += ["if __name__ == '__main__':", "    from fnrecipe.cli.main import run_recipe", "    run_recipe(recipe)"]
    (tmp_path / "my_script.py").write_text("\n".join(lines))
    ended = python("my_script.py", "out", "--config", *pairs(texts, **QUICK), cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert load(tmp_path / "out").recipe.name == "mine"
    check(tmp_path / "out", load(tmp_path / "out"))
