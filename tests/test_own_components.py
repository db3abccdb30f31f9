"""A family, an optimizer and a schedule of a user's own, each in a file: trained, resumed, shown and measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.helpers import fnrecipe
from tests.helpers import pairs, rows

MODEL = '''
"""Bigrams by way of a narrow space: logits [B, T, V] from two matrices."""
from attrs import frozen
from torch.nn import functional as F

from fnrecipe import random
from fnrecipe.config.bounds import PositiveInt
from fnrecipe.models.flops import token_flops
from fnrecipe.models.model import Model


@frozen
class BigramConfig:
    vocab_size: PositiveInt = 264
    max_seq_len: PositiveInt = 32
    width: PositiveInt = 4


def init(config, key, place):
    shape = config.vocab_size, config.width
    return {name: place(name, random.normal(random.fold_in(key, name), *shape, std=0.3)) for name in ("inner", "outer")}


def apply(config, params, tokens, segments, positions, *, policy, scope):
    return F.linear(F.embedding(tokens, params["inner"]), params["outer"])


def flops(config, length):
    return token_flops([(config.vocab_size, config.width)], windows=(), width=config.width, length=length)


archs = {"wide": BigramConfig(width=16)}
model = Model(config=BigramConfig, archs=archs, init=init, apply=apply, flops=flops)
'''
UPDATE = """
from attrs import frozen

from fnrecipe import optim, tree
from fnrecipe.components.component import LRScheduler, Optimizer


@frozen
class SignConfig:
    lr: float = 0.02


def signs(config, schedule, max_norm):
    sign = optim.stateless(lambda updates, params, step: (tree.map(lambda leaf: leaf.sign(), updates), {}))
    return optim.chain(sign, optim.scale_by_learning_rate(schedule(config.lr)))


@frozen
class HalvingConfig:
    every: int = 4


def halving(config, num_steps):
    return lambda peak: lambda step: peak * 0.5 ** (step // config.every).double()


optimizer = Optimizer(SignConfig, signs)
schedule = LRScheduler(HalvingConfig, halving)
"""
TAGS = {
    "model__config": "{}",
    "model__family": "my_model.py",
    "model__arch": "wide",
    "optimizer__name": "my_update.py",
    "lr_scheduler__name": "my_update:schedule",
    "lr_scheduler__config__every": 10,
    "regime__num_steps": 20,
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "my_update.py").write_text(UPDATE)
    return tmp_path


def changes(texts: Path, **more: object) -> list[str]:
    given = pairs(texts, **{**TAGS, **more})
    return [pair for pair in given if "num_warmup_steps" not in pair]


def train(here: Path, *args: str | Path) -> None:
    ended = fnrecipe("train", "lm", "--out", *args, cwd=here)
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.slow
def test_components_in_files_train_and_go_on_from_their_saved_config(here: Path, texts: Path) -> None:
    train(here, "whole", "--config", *changes(texts))
    found = rows(here / "whole/metrics/train.jsonl")
    losses = [row["train/loss"] for row in found]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert [row["train/lr"] for row in found] == pytest.approx([0.02 * 0.5 ** (step // 10) for step in range(1, 21)])

    train(here, "parts", "--config", *changes(texts, regime__num_steps=9))
    train(here, "parts", "--config-file", "whole/config.yaml")
    for name in ("config.yaml", "metrics/train.jsonl", "sample.txt"):
        assert (here / "parts" / name).read_bytes() == (here / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_family_in_a_file_trains_on_two_ranks_and_from_worker_processes(here: Path, texts: Path) -> None:
    shutil.copytree(here, here / "deep")
    own = {"model__family": "deep/my_model.py", "gang__sharding": "zero2", "dataset__num_workers": 1}
    train(here, "one", "--config", *changes(texts, **{**own, "gang__sharding": "replicate", "dataset__num_workers": 0}))
    train(here, "two", "--nproc", "2", "--config", *changes(texts, **own))
    one, two = ([row["train/loss"] for row in rows(here / out / "metrics/train.jsonl")] for out in ("one", "two"))
    assert one == two


def test_the_graph_of_a_family_in_a_file_has_its_flops(here: Path, texts: Path) -> None:
    ended = fnrecipe("graph", "lm", "--config", *changes(texts), cwd=here)
    assert (ended.status, ended.err) == (0, "")
    flops = 8 * 32 * 6 * 264 * 16
    assert f"model: {flops / 1e6:.1f} MFLOP" in ended.out


def test_without_flops_a_graph_is_shown_without_the_models(here: Path, texts: Path) -> None:
    source = (here / "my_model.py").read_text().replace(", flops=flops)", ")")
    (here / "my_model.py").write_text(source)
    ended = fnrecipe("graph", "lm", "--config", *changes(texts), cwd=here)
    assert (ended.status, ended.err) == (0, "")
    assert "model:" not in ended.out
