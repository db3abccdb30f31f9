"""What a checkpoint keeps of a run's recipe, tokenizer and data; and what is said where they are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import attrs
import pytest

from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell import train
from fnrecipe.shell.directory import same_run
from fnrecipe.shell.directory.identity import identity
from tests.data.kinds import byte_level, save
from tests.helpers import pairs

SMALL = {
    "lr_scheduler__config__num_warmup_steps": 1,
    "regime__num_steps": 2,
    "regime__num_sample_tokens": 0,
    "trainer__jit": "off",
}


def settings(texts: Path, folder: Path, **changes: object) -> list[str]:
    tokenizer = {"tokenizer__family": "hf", "tokenizer__path": folder / "tokenizer.json", "model__config__vocab_size": 320}
    return pairs(texts, **{**tokenizer, **SMALL, **changes})


def swap(path: Path, *names: str) -> None:
    """Gives two tokens each other's ids, as another training of the tokenizer might."""
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    path.write_text(json.dumps(content))


def test_the_facts_are_recipe_tokenizer_and_files(texts: Path, tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    config, _ = resolve(recipe.config, (), settings(texts, tmp_path))
    facts = identity(recipe, config, recipe.corpora(config))
    assert list(facts) == ["recipe", "tokenizer", f"{texts.name}: a.jsonl", f"{texts.name}: b.jsonl"]
    assert facts["recipe"] == "lm"
    assert facts["tokenizer"].startswith("300 tokens, BOS and EOS <eos> (0), ")
    swap(tmp_path / "tokenizer.json", "a", "b")
    changed = identity(attrs.evolve(recipe, name="mine"), config, recipe.corpora(config))
    assert {name for name in facts if facts[name] != changed[name]} == {"recipe", "tokenizer"}
    assert identity(attrs.evolve(recipe, tokenizer=None), config, []) == {"recipe": "lm"}


FACTS = {"recipe": "lm", "tokenizer": "300 tokens, x", "a: 1": "x"}


@pytest.mark.parametrize(
    ("old", "what", "lines"),
    [
        ({"recipe": "mine"}, "with another recipe", ["  recipe: 'mine' there, 'lm' now"]),
        ({"tokenizer": "y"}, "with another tokenizer", ["  tokenizer: 'y' there, '300 tokens, x' now"]),
        (
            {"recipe": "mine", "a: 1": "y"},
            "with another recipe and on other data",
            ["  recipe: 'mine' there, 'lm' now", "  changed: a: 1"],
        ),
        ({"a: 2": "y"}, "on other data", ["  missing: a: 2"]),
    ],
)
def test_other_facts_are_refused_with_both_values(tmp_path: Path, old: dict[str, str], what: str, lines: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        same_run.check_identity(tmp_path, {**FACTS, **old}, FACTS)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: holds a run {what}; go on with ")
    assert rest == lines


def test_a_fact_that_a_checkpoint_does_not_know_is_another_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\n  tokenizer: null there, '300 tokens, x' now$"):
        same_run.check_identity(tmp_path, {name: FACTS[name] for name in ("recipe", "a: 1")}, FACTS)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_tokenizer_and_recipe_only(texts: Path, tmp_path: Path) -> None:
    save(tmp_path, byte_level())
    config, _ = resolve(recipe.config, (), settings(texts, tmp_path))
    longer, _ = resolve(recipe.config, (), settings(texts, tmp_path, regime__num_steps=3))
    assert train.train(recipe, config, tmp_path / "out") == 0
    assert "  tokenizer: 300 tokens, BOS and EOS <eos> (0), " in (tmp_path / "out/logs/rank_0.log").read_text()
    with pytest.raises(UsageError, match=r"holds a run with another recipe; .*\n  recipe: 'lm' there, 'mine' now$"):
        train.train(attrs.evolve(recipe, name="mine"), longer, tmp_path / "out")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "before.json")
    swap(tmp_path / "tokenizer.json", "a", "b")
    with pytest.raises(
        UsageError, match=r"with another tokenizer; .*\n  tokenizer: '300 tokens, .*' there, '300 tokens, .*' now$"
    ):
        train.train(recipe, longer, tmp_path / "out")
    assert train.train(recipe, longer, tmp_path / "out", with_changes=True) == 0
    shutil.copy(tmp_path / "before.json", tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="with another tokenizer"):
        train.train(recipe, longer, tmp_path / "out")
