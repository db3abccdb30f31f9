"""Runs that train an adapter, or chosen parameters: the others stay bit for bit, and the run goes on as if never stopped."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import fnrecipe
from fnrecipe import presets, random, tree
from fnrecipe.build import to_host, trained
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import EXIT_AGAIN, ConfigError, UsageError
from fnrecipe.models.adapter import ADAPTER
from fnrecipe.models.answers import REFERENCE
from fnrecipe.optim.partition import chosen
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.train import recipe as lm
from fnrecipe.recipes.preference.data import train_stream
from fnrecipe.recipes.preference.train import recipe as preference
from fnrecipe.shell.trained.export import import_model
from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here
from tests.helpers import assert_close, assert_same_bits, bits, end, last_step, pairs, remains, rows, signal_at, start
from tests.recipes.test_preference import preferences, write

LORA = ["model.adapter.name=lora", "model.adapter.rank=4", "optimizer.config.lr=0.01"]
SHORT = {"regime__num_steps": 6, "dataset__prefetch": 0}
LM = attrs.evolve(lm, origin="fnrecipe.recipes.lm.train:recipe")
"""As the command line finds it."""


def configured(texts: Path, *more: str, recipe: Any = lm, **changes: Any) -> Any:
    return resolve(recipe.config, (), [*pairs(texts, **{**SHORT, **changes}), *more])[0]


def saved(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / f"checkpoints/step_{step:08d}/state_0000.safetensors")


def logits(config: Any, params: Any, tokens: Tensor) -> Tensor:
    apply = presets.apply(config.model, config.trainer, "row")
    return fnrecipe.nn.all_logits(apply(params, tokens, tokens * 0, torch.arange(tokens.shape[1])[None]))


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter, of a base in bfloat16."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    assert fnrecipe.train(LM, configured(texts, *LORA, "model.dtype=bfloat16", "trainer.jit=off"), out) == 0
    return out


def test_the_base_stays_bit_for_bit_and_only_the_adapter_has_moments(run: Path, texts: Path) -> None:
    last, (_, config, params) = saved(run, 6), fnrecipe.load(run)
    start = lm.init(config, random.fold_in(random.key(config.common.seed), "init"), replicated)
    before, after = tree.paths(start), tree.paths(params)
    for path in before:
        trained = path.startswith(f"{ADAPTER}.")
        assert (bits(before[path]) == bits(after[path])) is not trained, path
        assert last[f"params.{path}"].dtype == (torch.float32 if trained else torch.bfloat16)
    moments = {name for name in last if name.startswith("optimizer.") and "layers" in name}
    assert len(moments) == 2 * sum(path.startswith(f"{ADAPTER}.") for path in before)
    assert all(f".{ADAPTER}.layers." in name for name in moments)
    losses = [row["train/loss"] for row in rows(run / "metrics/train.jsonl")]
    assert losses[-1] < losses[0] - 0.02
    told = "model.path: expected weights for model.adapter.name=lora to be beside, found null: they are random, and stay so\n"
    assert (run / "logs/rank_0.log").read_text().count(told) == 1


def test_a_run_that_lost_its_last_checkpoint_goes_on_to_the_same_bytes(run: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000006")
    assert fnrecipe.train(LM, configured(texts, *LORA, "model.dtype=bfloat16", "trainer.jit=off"), tmp_path / "cut") == 0
    assert remains(tmp_path / "cut") == remains(run)


def test_it_is_exported_whole_and_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(*args: str | Path) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, *args)

    whole = here("export", run, "--out", tmp_path / "whole", "--dtype", "float32")
    assert (whole.status, whole.err) == (0, "")
    alone = here("export", run, "--out", tmp_path / "alone", "--format", "peft")
    assert (alone.status, alone.out) == (0, f"{tmp_path}/alone: 14 adapted weights, 4,096 parameters, 16.4 kB\n")
    _, config, params = fnrecipe.load(run)
    tokens = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))
    ours, base = logits(config, params, tokens), logits(config, {**params, ADAPTER: {}}, tokens)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(tokens).logits
    rounding = float((theirs - ours).abs().max())
    assert rounding < 0.02, "weights are rounded to bfloat16 once more"
    assert float((ours - base).abs().max()) > 10 * rounding
    settings = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 32, None)
    assert_usage_error(here("export", run, "--out", tmp_path / "alone", "--format", "peft"), "expected a directory that is not")


def test_it_generates_and_is_evaluated_as_its_merged_weights(
    run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fnrecipe.export(run, tmp_path / "whole")
    said = [
        fnrecipe_here(monkeypatch, capsys, "generate", path, "--prompt", "the", "--max-tokens", "8", "--temperature", "0").out
        for path in (run, tmp_path / "whole")
    ]
    assert said[0] == said[1] != ""
    found = []
    for number, path in enumerate((run, tmp_path / "whole")):
        out = tmp_path / f"{number}.json"
        given = ["evaluate", path, "--data", texts, "--out", out, "--config", "dataset.max_seq_len=32", "gang.device=cpu"]
        assert fnrecipe_here(monkeypatch, capsys, *given).status == 0
        found.append(json.loads(out.read_text())["total"]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_run_with_an_adapter_is_no_model_to_begin_with(run: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^model\.path: expected .*: fnrecipe export {run} --out DIR adds the adapter"):
        fnrecipe.train(lm, configured(texts, f"model.path={run}", dataset__max_seq_len=32), tmp_path)


# Chosen parameters.


def test_patterns_choose_what_is_trained(texts: Path, tmp_path: Path) -> None:
    config = configured(texts, "trainer.trains=[layers.1.*, norm]")
    assert fnrecipe.train(lm, config, tmp_path) == 0
    last, start = saved(tmp_path, 6), lm.init(config, random.fold_in(random.key(config.common.seed), "init"), replicated)
    moved = {path for path, leaf in tree.paths(start).items() if bits(leaf) != bits(last[f"params.{path}"])}
    assert moved == {path for path in tree.paths(start) if path.startswith("layers.1.") or path == "norm"}
    moments = {name.partition("mean.")[2] for name in last if "mean." in name}
    assert moments == moved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trainer.trains=[norm, layers.*.querry]"], "lm trains, found 'layers.*.querry'; did you mean layers.*.query?"),
        ([*LORA, "trainer.trains=['@norms']"], "lm trains, found '@norms'; valid names: adapter.layers.*.down.a, "),
        ([*LORA, "trainer.trains=[norm]"], "lm trains, found 'norm'; valid names: adapter.layers.*.down.a, "),
    ],
)
def test_a_pattern_that_fits_nothing_is_told_before_the_first_step(
    texts: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        fnrecipe.train(lm, configured(texts, *given), tmp_path)
    assert str(caught.value).startswith(f"trainer.trains: expected patterns of parameters that the recipe {message}")
    assert not list(tmp_path.glob("checkpoints/*"))


def test_tags_choose_what_is_trained(texts: Path) -> None:
    config = configured(texts, "trainer.trains=['@norms', '@embedding']")
    params = lm.init(config, random.key(0), replicated)
    norms = {path for path, leaf in tree.paths(params).items() if leaf.ndim == 1}
    assert chosen(params, trained(lm, config)) == {"embedding", *norms}


def test_of_an_adapter_some_may_be_trained(texts: Path) -> None:
    config = configured(texts, *LORA, "trainer.trains=[adapter.*.query.b]")
    params = lm.init(config, random.key(0), replicated)
    assert chosen(params, trained(lm, config)) == {f"{ADAPTER}.layers.{number}.query.b" for number in (0, 1)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.adapter.rank=4", "model.adapter.name: expected lora or dora beside other keys of the adapter, found null"),
        ("model.adapter={name: lora, path: x}", "model.adapter.path: expected null without model.path, .*, found x"),
        ("model.adapter={name: lora, targets: []}", r"model.adapter.targets: expected a pattern .*, found \[\]"),
        (
            "model.adapter={name: lorra}",
            "model.adapter.name: expected lora or dora or null, found 'lorra'.*; did you mean lora",
        ),
        ("trainer.trains=['@norm']", "trainer.trains: expected a known tag, found '@norm' .*; did you mean @norms"),
        ("model.adapter={name: lora, targets: ['@matrix']}", "model.adapter.targets: expected a known tag, .* mean @matrices"),
        ("model.adapter.dropout=1", "model.adapter.dropout: expected a number from 0 up to, .*, found 1"),
        ("trainer.trains=[]", r"trainer.trains: expected a pattern .*, or null for all, found \[\]"),
    ],
)
def test_a_config_that_cannot_be_is_told(texts: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(texts, given)


# Preference.


def preferring(root: Path, *more: str) -> Any:
    source = write(root / "pairs.jsonl", preferences(40))
    sizes = "{vocab_size: 264, max_seq_len: 128, model_dim: 32, num_layers: 1, num_attn_heads: 2, num_key_value_heads: 2}"
    changes = {"model__config": sizes, "dataset__max_seq_len": 128, "trainer__jit": "off"}
    return configured(source, *LORA, *more, recipe=preference, **changes)


def test_beside_an_adapter_the_base_is_the_reference_without_a_copy(tmp_path: Path) -> None:
    config = preferring(tmp_path)
    key = random.key(0)
    params = preference.init(config, key, replicated)
    assert REFERENCE not in params
    copied = {**params, REFERENCE: {name: value for name, value in params.items() if name != ADAPTER}}
    batch = to_host(next(iter(train_stream(config, LaneAssignment())(None)))[0], torch.device("cpu"))
    moved = tree.map(lambda leaf: leaf + 0.05 * random.normal(key, *leaf.shape), params[ADAPTER])
    for_loss = [preference.loss(config)({**each, ADAPTER: moved}, batch, None) for each in (params, copied)]
    assert_same_bits(*for_loss)
    total, sums = for_loss[0]
    assert abs(float(total / sums["targets"]) - 0.6931) > 1e-3, "not that of models that are the same"
    assert_close(preference.model(config, params), copied[REFERENCE], 1e-6)

    assert fnrecipe.train(preference, config, tmp_path / "run") == 0
    metrics = rows(tmp_path / "run/metrics/train.jsonl")
    assert metrics[0]["train/loss"] == pytest.approx(0.693147, rel=1e-5)
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    assert not [name for name in saved(tmp_path / "run", 6) if REFERENCE in name]


def test_another_reference_than_the_base_is_kept_beside_it(tmp_path: Path) -> None:
    other = preferring(tmp_path, "model.adapter={name: null, rank: 16}", "common.seed=9")
    import_model(preference, other, tmp_path / "other")
    config = preferring(tmp_path, f"reference.path={tmp_path}/other", "reference.dtype=bfloat16")
    key = random.key(0)
    params = preference.pretrained(config, key, replicated)
    expected = tree.map(torch.Tensor.bfloat16, preference.model(other, fnrecipe.load(tmp_path / "other", preference).params))
    assert_same_bits(params[REFERENCE], expected)
    assert tree.paths(params).keys() == tree.paths(preference.init(config, key, replicated)).keys()


def test_the_dtype_of_a_reference_that_is_the_base_is_that_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.dtype: expected float32 beside model\.adapter: .* in model\.dtype"):
        preferring(tmp_path, "reference.dtype=bfloat16")


@pytest.mark.slow
def test_four_ranks_that_are_stopped_and_go_on_as_two_and_one_leave_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    whole = [*pairs(texts, regime__num_steps=40), *LORA, "model.adapter.name=dora", "model.dtype=bfloat16"]
    whole += ["gang.num_microbatches=4"]
    assert fnrecipe.train(lm, resolve(lm.config, pairs=whole)[0], straight) == 0
    cut = ["train", "lm", "--out", str(stopped), "--config", *whole, "gang.sharding=fsdp"]
    for ranks, jit, step in (("4", "off", 5), ("2", "auto", 15)):  # to trace it on four takes long
        began = start(*cut, f"trainer.jit={jit}", "--nproc", ranks, "--resume-with-changes")
        assert signal_at(began, stopped, step, signal.SIGTERM).status == EXIT_AGAIN
        assert step <= last_step(stopped) < 40
    assert end(start(*cut)).status == 0
    ours, theirs = remains(stopped), remains(straight)
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"config.yaml"}
    assert ours.keys() == theirs.keys()
