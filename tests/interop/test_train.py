"""Training begins with the weights that `model.path` names, goes on without them, and a model that is brought here is a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import fnrecipe
from fnrecipe import checkpoint, tree
from fnrecipe.build import init_train_state
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.shell.find_recipe import find
from fnrecipe.shell.train import train
from fnrecipe.shell.trained.export import import_model
from fnrecipe.step import State
from tests.helpers import assert_same_bits, end, pairs, start
from tests.interop.reading import read, section
from tests.recipes.regression import recipe as regression

SETTINGS = {
    "regime__num_steps": 4,
    "regime__checkpoint_every_n_steps": 2,
    "lr_scheduler__config__num_warmup_steps": 1,
    "trainer__jit": "off",
}


@pytest.fixture(scope="module")
def directory(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tied model with its tokenizer."""
    return Path(shutil.copytree(saved / "tied", tmp_path_factory.mktemp("train") / "hf"))


@pytest.fixture(scope="module")
def trained(directory: Path, texts: Path) -> Path:
    """A run that began with it; nothing may change it."""
    out = directory.with_name("trained")
    assert train(find("lm").load(), config_of(texts, f"model.path={directory}"), out) == 0
    return out


def config_of(texts: Path, *more: str, files: list[Path] | None = None, **changes: Any) -> Any:
    values = [pair for pair in pairs(texts, **SETTINGS, **changes) if not pair.startswith("model.config=")]
    return resolve(find("lm").config, files or [], [*values, *more])[0]


def checkpoints(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "checkpoints").rglob("*.*"))}


def first_state(texts: Path, path: Path) -> State:
    config = config_of(texts, f"model.path={path}")
    return init_train_state(find("lm").load(), config, Mesh(), torch.device("cpu"), pretrained=True)


def test_a_run_begins_with_the_weights_and_goes_on_without_them(
    directory: Path, trained: Path, texts: Path, tmp_path: Path
) -> None:
    assert_same_bits(tree.leaves(first_state(texts, directory).params), tree.leaves(read(directory)))
    assert f"weights: {directory}\n" in (trained / "logs/rank_0.log").read_text()
    again, weights = Path(shutil.copytree(trained, tmp_path / "again")), directory / "model.safetensors"
    shutil.rmtree(again / "checkpoints/step_00000004")
    weights.rename(tmp_path / "elsewhere")
    try:
        assert train(find("lm").load(), config_of(texts, f"model.path={directory}"), again) == 0
    finally:
        (tmp_path / "elsewhere").rename(weights)
    assert checkpoints(again) == checkpoints(trained)
    assert (again / "logs/rank_0.log").read_text().count("weights: ") == 1
    found = fnrecipe.load(trained).config.model
    assert (found.path, found.family, found.config) == (str(directory), "llama", section(directory).config)


def test_a_run_begins_with_the_weights_of_another_run(directory: Path, trained: Path, texts: Path) -> None:
    begun = first_state(texts, trained)
    assert_same_bits(tree.leaves(begun.params), tree.leaves(fnrecipe.load(trained).params))
    assert int(begun.step) == 0
    assert config_of(texts, f"model.path={trained}").tokenizer.path == str(directory / "tokenizer.json")


def test_an_import_is_a_run_at_step_0_that_trains(directory: Path, trained: Path, texts: Path, tmp_path: Path) -> None:
    lm, run = find("lm").load(), tmp_path / "run"
    config = config_of(texts, f"model.path={directory}")
    assert import_model(lm, config, run).name == "step_00000000"
    assert_same_bits(fnrecipe.load(run).params, read(directory))
    with pytest.raises(UsageError, match="expected a directory without a run, found one"):
        import_model(lm, config, run)
    assert train(lm, config_of(texts, files=[run / "config.yaml"]), run) == 0
    steps = [path.name for path in checkpoint.committed(run / "checkpoints")]
    assert steps == ["step_00000000", "step_00000002", "step_00000004"]
    shutil.rmtree(run / "checkpoints/step_00000000")
    assert checkpoints(run) == checkpoints(trained)


@pytest.mark.slow
def test_two_processes_that_cut_the_weights_end_as_one(directory: Path, texts: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "regime__export_hugging_face": "true", "model__path": directory}
    values = [pair for pair in pairs(texts, **settings) if not pair.startswith("model.config=")]
    for name, more in {"one": [], "two": ["gang.sharding=fsdp"]}.items():
        ranks = ["--nproc", "2"] if name == "two" else []
        ended = end(start("train", "lm", "--out", str(tmp_path / name), *ranks, "--config", *values, *more))
        assert (ended.status, ended.errors) == (0, "")
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name / "hugging_face").iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(list((tmp_path / "two/checkpoints/step_00000004").glob("state_*.safetensors"))) == 2


def test_a_run_may_end_with_an_export(trained: Path, texts: Path, tmp_path: Path) -> None:
    lm, run = find("lm").load(), Path(shutil.copytree(trained, tmp_path / "run"))
    told = ["regime.export_hugging_face=true", f"model.path={trained}"]
    for _ in range(2):  # one that is there gives way
        assert train(lm, config_of(texts, "regime.export_hugging_face=true", files=[run / "config.yaml"]), run) == 0
        assert_same_bits(read(run / "hugging_face"), fnrecipe.load(run).params)
    assert not list(run.glob(".hugging_face*"))
    mine = attrs.evolve(lm, name="mine", config=regression.config)
    with pytest.raises(UsageError, match="mine: expected a recipe with the sections model and tokenizer"):
        train(mine, attrs.evolve(regression.config, regime=config_of(texts, *told).regime), tmp_path / "out")


def test_a_recipe_that_reads_no_weights_says_so(directory: Path, texts: Path, tmp_path: Path) -> None:
    mine = attrs.evolve(find("lm").load(), name="mine", pretrained=None)
    with pytest.raises(
        UsageError, match=r"^model\.path: expected null: the recipe mine has no `pretrained`, which reads weights; "
    ):
        train(mine, config_of(texts, f"model.path={directory}"), tmp_path / "out")


def test_a_run_that_is_exported_at_a_step_has_its_parameters(trained: Path, tmp_path: Path) -> None:
    fnrecipe.export(trained, tmp_path / "at2", step=2)
    fnrecipe.export(trained, tmp_path / "last")
    assert_same_bits(read(tmp_path / "last"), fnrecipe.load(trained).params)
    assert_same_bits(read(tmp_path / "at2"), fnrecipe.load(trained, step=2).params)
    assert not torch.equal(read(tmp_path / "at2")["embedding"], read(tmp_path / "last")["embedding"])
