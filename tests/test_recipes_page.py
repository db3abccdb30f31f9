"""What `docs/recipes.md` says of its recipe is true: the file that its blocks make is found, trains and is loaded again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fnrecipe
from fnrecipe import random, tree
from fnrecipe.build import to_host
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import FnrecipeError
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipe import Recipe
from fnrecipe.shell import train as run
from fnrecipe.shell.find_recipe import find
from tests.data.laws import check_resumes
from tests.helpers import assert_same_bits, end, rows, start

PAGE = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
FAST = "common.torch.num_threads=1", "common.metric_recorders.tensorboard.enabled=false", "trainer.jit=trace"
TINY = (*FAST, "regime.checkpoint_every_n_steps=20")


def train(recipe: Recipe[Any], out: Path, *pairs: str) -> Path:
    config, _ = resolve(recipe.config, pairs=[*TINY, *pairs])
    assert run.train(recipe, config, out) == 0
    return out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe[Any]:
    """That of `my_recipe.py`: the blocks without `assert`."""
    path = tmp_path_factory.mktemp("page") / "recipe_of_the_page.py"
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path.write_text("\n\n".join(block for block in blocks if "assert" not in block))
    return find(str(path)).load()


@pytest.fixture(scope="module")
def whole(recipe: Recipe[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe, tmp_path_factory.mktemp("run") / "whole")


def test_it_learns(whole: Path) -> None:
    steps = rows(whole / "metrics/train.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert {row["train/targets"] for row in steps} == {64}
    losses = [row["train/loss"] for row in steps]
    assert losses[0] == pytest.approx(np.log(128), rel=0.02)
    assert np.mean(losses[-5:]) < 4


def test_what_is_frozen_keeps_its_bits_and_the_rest_does_not(recipe: Recipe[Any], whole: Path) -> None:
    _, config, params = fnrecipe.load(whole)  # by the file's name, which the run has recorded
    key = random.fold_in(random.key(config.common.seed), "init")
    before = tree.paths(recipe.init(config, key, replicated))
    same = [path for path, leaf in tree.paths(params).items() if torch.equal(leaf, before[path])]
    assert same == ["embedding"]


def test_the_embedding_is_trained_if_the_config_says_so(recipe: Recipe[Any], whole: Path, tmp_path: Path) -> None:
    trained = train(recipe, tmp_path / "out", "net.train_embedding=true", "regime.num_steps=2")
    assert not torch.equal(fnrecipe.load(trained).params["embedding"], fnrecipe.load(whole).params["embedding"])


def test_the_observers_rows_are_those_of_the_state(whole: Path) -> None:
    found = rows(whole / "metrics/norms.jsonl")
    assert [row["step"] for row in found] == [10, 20, 30, 40, 50, 60]
    norm = fnrecipe.load(whole).params["head"].double().norm().item()
    assert found[-1]["norms/head"] == pytest.approx(norm, rel=1e-5)


def test_the_evaluations_are_those_of_plain_torch(recipe: Recipe[Any], whole: Path) -> None:
    """The model of the page in a few lines of its own: no key, no dropout, means taken by torch."""
    _, config, params = fnrecipe.load(whole)
    reading = recipe.evaluations(config)["valid"].stream(config, LaneAssignment())(None)
    texts = [next(reading)[0].text for _ in range(config.regime.num_validation_batches)]
    text = torch.from_numpy(np.concatenate(texts))
    x = params["embedding"][text[:, :-1]].flatten(1)
    for layer in params["layers"].values():
        x = torch.relu(x @ layer["weight"].T + layer["bias"])
    logits, target = x @ params["head"].T, text[:, -1]

    valid, wrong = (rows(whole / f"metrics/{name}.jsonl") for name in ("valid", "mistakes"))
    assert [row["step"] for row in valid] == [row["step"] for row in wrong] == [30, 60]
    loss = F.cross_entropy(logits, target).item()
    assert valid[-1]["valid/loss"] == pytest.approx(loss, rel=1e-5)
    assert valid[-1]["valid/bits_per_byte"] == pytest.approx(loss / np.log(2), rel=1e-5)
    assert wrong[-1]["mistakes/loss"] == (logits.argmax(-1) != target).float().mean().item()


def test_the_recorder_goes_on_where_the_run_does(recipe: Recipe[Any], whole: Path, tmp_path: Path) -> None:
    """A run of 60 steps whose checkpoints after step 20 are lost: its later rows are made again, and stand there once."""
    out = tmp_path / "out"
    train(recipe, out)
    before = (out / "loss.csv").read_text()
    for saved in (out / "checkpoints").iterdir():
        if saved.name > "step_00000020":
            saved.rename(tmp_path / saved.name)
    train(recipe, out)

    assert (out / "loss.csv").read_text() == before == (whole / "loss.csv").read_text()
    assert [int(line.split(",")[0]) for line in before.splitlines()] == list(range(1, 61))
    assert rows(out / "metrics/norms.jsonl") == rows(whole / "metrics/norms.jsonl")


def test_fsdp_changes_no_bit(recipe: Recipe[Any], whole: Path, tmp_path: Path) -> None:
    cut = train(recipe, tmp_path / "out", "gang.sharding=fsdp")  # one process; two below
    assert_same_bits(fnrecipe.load(cut).params, fnrecipe.load(whole).params)


@pytest.mark.slow
def test_two_processes_that_share_the_state_end_as_one(recipe: Recipe[Any], whole: Path, tmp_path: Path) -> None:
    """Whole matrices, the observer's norm, the recorder and all evaluations included."""
    out, pairs = tmp_path / "out", ["--config", *TINY, "gang.sharding=fsdp"]
    ended = end(start("train", str(recipe.origin), "--out", str(out), "--nproc", "2", *pairs))
    assert ended.status == 0, ended.errors
    assert_same_bits(fnrecipe.load(out).params, fnrecipe.load(whole).params)
    names = "loss.csv", *(f"metrics/{name}.jsonl" for name in ("train", "norms", "valid", "mistakes"))
    assert not [name for name in names if (out / name).read_bytes() != (whole / name).read_bytes()]


@pytest.mark.parametrize("rank", [0, 1])
def test_its_stream_resumes_at_every_item(recipe: Recipe[Any], rank: int) -> None:
    check_resumes(recipe.stream(recipe.config, LaneAssignment(rank, 2)), limit=8)


def test_rows_of_the_example_add_nothing(recipe: Recipe[Any]) -> None:
    config = recipe.config
    batch = to_host(recipe.example(config, 4), torch.device("cpu"))
    params = recipe.init(config, random.key(0), replicated)
    gradient, sums = torch.func.grad(recipe.loss(config), has_aux=True)(params, batch, None)
    assert {name: value.item() for name, value in sums.items()} == {"loss": 0, "targets": 0, "bytes": 0}
    assert not any(leaf.any() for leaf in tree.leaves(gradient))


Change = Callable[[Recipe[Any]], Recipe[Any]]


def init_without_place(recipe: Recipe[Any]) -> Recipe[Any]:
    return attrs.evolve(recipe, init=lambda *given: {**recipe.init(*given), "head": torch.zeros(128, 32)})


def loss_by(change: Callable[..., Any]) -> Change:
    """The recipe with a loss that gives what `change` makes of (its total, its sums, parameters)."""

    def changed(recipe: Recipe[Any]) -> Recipe[Any]:
        def loss(config: Any) -> Any:
            return lambda params, batch, key: change(*recipe.loss(config)(params, batch, key), params)

        return attrs.evolve(recipe, loss=loss)

    return changed


def stream_by(change: Callable[[Any, Any], Any]) -> Change:
    """The recipe with a stream of what `change` makes of (batch, cursor)."""

    def items(source: Any, cursor: Any) -> Iterator[Any]:
        return (change(*entry) for entry in source(cursor))

    def changed(recipe: Recipe[Any]) -> Recipe[Any]:
        return attrs.evolve(recipe, stream=lambda config, assignment: partial(items, recipe.stream(config, assignment)))

    return changed


def state_kept(recipe: Recipe[Any]) -> Recipe[Any]:
    states = []

    def keep(ticks: Any) -> Iterator[Any]:
        for tick in ticks:
            states.append(tick.state)
            yield tick

    return attrs.evolve(recipe, observers=lambda config, write: [keep])


MISTAKES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "config": (lambda recipe: recipe, ("net.dropout=2", "net.widht=3")),
    "init": (init_without_place, ()),
    "sums": (loss_by(lambda total, sums, params: (total, {"loss": total})), ()),
    "rows": (stream_by(lambda batch, cursor: (attrs.evolve(batch, real=batch.real[:3]), cursor)), ()),
    "item": (stream_by(lambda batch, cursor: batch), ()),
    "parts": (loss_by(lambda total, sums, params: (total + params["head"].sum(), sums)), ("gang.sharding=fsdp",)),
    "kept": (state_kept, ()),
    "draws": (loss_by(lambda total, sums, params: (F.dropout(total), sums)), ()),
    "draws, eager": (loss_by(lambda total, sums, params: (F.dropout(total), sums)), ("trainer.jit=off",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_errors_are_as_the_page_shows_them(recipe: Recipe[Any], tmp_path: Path, name: str) -> None:
    change, pairs = MISTAKES[name]
    with pytest.raises(FnrecipeError) as caught:
        train(change(recipe), tmp_path / "out", *pairs)
    shown = re.findall(r"^error: (.*)$", PAGE, re.MULTILINE)
    lines = [line.replace(f"{__file__}:", "my_recipe.py:") for line in str(caught.value).splitlines()]
    assert not [line for line in lines if without_number(line) not in map(without_number, shown)]


def test_all_errors_that_the_page_shows_are_tried() -> None:
    assert len(re.findall(r"^error: ", PAGE, re.MULTILINE)) == len(MISTAKES)  # two of the config; the draws in two modes


def without_number(line: str) -> str:
    return re.sub(r"\.py:\d+:", ".py:", line)


def test_the_key_that_is_not_read_is_told(recipe: Recipe[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^config: expected .*$", PAGE, re.MULTILINE)
    train(recipe, tmp_path / "out", "trainer.max_grad_norm=2", "regime.num_steps=1")
    assert line in "".join(capsys.readouterr())
