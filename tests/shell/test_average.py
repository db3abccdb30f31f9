"""A run that keeps an average of its parameters: it is saved, measured, loaded, and goes on as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch

import fnrecipe
from fnrecipe import tree
from fnrecipe.config import resolve
from fnrecipe.errors import EXIT_AGAIN, CheckpointError, ConfigError
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.shell.train import train
from fnrecipe.shell.trained import speaker
from fnrecipe.shell.trained.speaker import generator_of
from tests.cli.helpers import Ended, fnrecipe_here
from tests.helpers import assert_close, assert_same_bits, bits, end, pairs, remains, rows, start
from tests.shell.trained.test_load import validation_loss

STEPS = {"regime__num_steps": 6, "regime__checkpoint_every_n_steps": 1, "regime__keep_last_n_checkpoints": "null"}
AVERAGE = {"trainer__average__decay": 0.5, "trainer__average__start": 2}
Run = Callable[..., Ended]


def configured(texts: Path, **changes: Any) -> Any:
    quick = {"dataset__prefetch": 0, "trainer__jit": "off", "regime__export_hugging_face": "true"}
    return resolve(lm.config, (), pairs(texts, **{**STEPS, **AVERAGE, **quick, **changes}))[0]


@pytest.fixture(scope="module")
def out(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose average begins behind step 2."""
    directory = tmp_path_factory.mktemp("average") / "run"
    assert train(attrs.evolve(lm, origin="lm"), configured(texts), directory) == 0
    return directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *args: fnrecipe_here(monkeypatch, capsys, *args)


def test_the_average_of_a_run_is_that_of_the_parameters_of_its_checkpoints(out: Path) -> None:
    latest = {step: fnrecipe.load(out, step=step).params for step in range(1, 7)}
    weights = {step: 0.5 ** (6 - step) * 0.5 / (1 - 0.5**4) for step in range(3, 7)}
    terms = [tree.map(lambda leaf, w=weight: leaf.double() * w, latest[step]) for step, weight in weights.items()]
    average = fnrecipe.load(out, weights="average").params
    assert_close(tree.map(torch.Tensor.double, average), tree.map(lambda *leaves: sum(leaves), *terms), 1e-6)
    assert_same_bits(fnrecipe.load(out, step=2, weights="average").params, latest[2])


def test_validations_and_the_export_at_the_end_are_of_it(out: Path, texts: Path, tmp_path: Path) -> None:
    measured = rows(out / "metrics/valid.jsonl")[-1]["valid/loss"]
    assert validation_loss(fnrecipe.load(out, weights="average")) == pytest.approx(measured, rel=1e-6)
    assert validation_loss(fnrecipe.load(out)) != pytest.approx(measured, rel=1e-6)
    exported = safetensors.torch.load_file(out / "hugging_face/model.safetensors")
    average = fnrecipe.load(out, weights="average").params
    assert torch.equal(exported["model.norm.weight"], average["norm"])

    plain = configured(texts, trainer__average__evaluate="false")
    assert train(lm, plain, tmp_path) == 0
    found = fnrecipe.load(tmp_path, lm)
    assert validation_loss(found) == pytest.approx(rows(tmp_path / "metrics/valid.jsonl")[-1]["valid/loss"], rel=1e-6)
    assert_same_bits(found.params, fnrecipe.load(out).params)


def test_it_goes_on_to_the_same_bytes(out: Path, texts: Path, tmp_path: Path) -> None:
    config, calls = configured(texts), count(1)

    def stopping(config: Any, place: Any) -> Any:
        source = lm.stream(config, place)

        def stopped(cursor: Any = None) -> Any:
            for entry in source(cursor):
                if next(calls) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield entry

        return stopped

    assert train(attrs.evolve(lm, stream=stopping), config, tmp_path) == EXIT_AGAIN
    assert train(lm, config, tmp_path) == 0
    assert remains(tmp_path) == remains(out)


@pytest.mark.slow
def test_traced_and_sharded_over_two_processes_it_is_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    for name, options in {"one": [], "two": ["--nproc", "2"]}.items():
        values = pairs(texts, **STEPS, **AVERAGE, gang__sharding="fsdp", model__dtype="bfloat16")
        done = end(start("train", "lm", "--out", str(tmp_path / name), *options, "--config", *values))
        assert done.status == 0, done.errors
    found = [fnrecipe.load(tmp_path / name, weights="average").params for name in ("one", "two")]
    assert {leaf.dtype for leaf in tree.leaves(found)} == {torch.bfloat16}
    assert_same_bits(*found)
    assert (tmp_path / "one/metrics/valid.jsonl").read_bytes() == (tmp_path / "two/metrics/valid.jsonl").read_bytes()


def test_commands_take_it_by_a_word(run: Run, out: Path, texts: Path, tmp_path: Path) -> None:
    ended = run("export", out, "--out", tmp_path / "hf", "--weights", "average")
    assert (ended.status, ended.err) == (0, "")
    exported = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    expected = safetensors.torch.load_file(out / "hugging_face/model.safetensors")
    assert {name: bits(leaf) for name, leaf in exported.items()} == {name: bits(leaf) for name, leaf in expected.items()}

    losses = {}
    for weights in ("latest", "average"):
        made = tmp_path / f"{weights}.json"
        assert run("evaluate", out, "--data", texts / "a.jsonl", "--weights", weights, "--out", made).status == 0
        told = json.loads(made.read_text())
        assert told["weights"] == weights
        losses[weights] = told["total"]["loss"]
    run("evaluate", tmp_path / "hf", "--data", texts / "a.jsonl", "--out", tmp_path / "hf.json")
    exported_loss = json.loads((tmp_path / "hf.json").read_text())["total"]["loss"]
    assert losses["average"] == pytest.approx(exported_loss, rel=1e-6) != losses["latest"]


def test_what_generates_is_it(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = []

    def watched(found: speaker.Speaker, *args: Any, **options: Any) -> Any:
        spoken.append(found)
        return generator_of(found, *args, **options)

    monkeypatch.setattr(speaker, "generator_of", watched)
    assert run("generate", out, "--prompt", "a", "--max-tokens", "2", "--weights", "average").status == 0
    assert_same_bits(spoken[0].params, fnrecipe.load(out, weights="average").params)


def test_where_there_is_none_that_is_told(run: Run, out: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"step_\d+: expected an average of the parameters \(trainer.average\), found none"
    ):
        fnrecipe.load(uninterrupted, weights="average")
    told = f"--weights: expected the directory of a run, found one of Hugging Face: {out / 'hugging_face'}"
    for command in (["generate", "--prompt", "a"], ["evaluate", "--data", "none"]):
        ended = run(command[0], out / "hugging_face", *command[1:], "--weights", "average")
        assert (ended.status, ended.err) == (2, f"error: {told}\n")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("average.start=30", "trainer.average.start: expected less than regime.num_steps = 30, found 30"),
        ("average.decay=1", "trainer.average.decay: expected a number from 0 up to, but not including, 1 or null, found 1"),
        ("average.every=0", "trainer.average.every: expected an integer of at least 1, found 0"),
        ("average=ema", "trainer.average: expected a section with the keys decay, start, every, evaluate or null, found 'ema'"),
    ],
)
def test_what_it_cannot_be_is_told(pair: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(lm.config, (), ["regime.num_steps=30", f"trainer.{pair}"])
    assert str(caught.value).removesuffix(" (command line)") == message
