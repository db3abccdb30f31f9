"""`dump-config`: what it prints reads back, and recipes are found by name, by file and by module."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fnrecipe.config import resolve, unstructure, yaml
from fnrecipe.config.layers import flatten, values
from fnrecipe.recipes.lm.config import config
from tests.cli.helpers import ROOT, Ended, assert_usage_error, fnrecipe

VARIANT = """
import attrs
from fnrecipe.recipes.lm.train import recipe as lm

recipe = attrs.evolve(lm, config=attrs.evolve(lm.config, common=attrs.evolve(lm.config.common, seed=77)))
"""


def dump(*args: str | Path, cwd: Path) -> dict[str, object]:
    ended = fnrecipe("dump-config", *args, cwd=cwd)
    assert (ended.status, ended.err) == (0, "")
    return values(yaml.load(ended.out, "stdout"))


def copy_recipe(folder: Path) -> Path:
    """The language-model recipe as a package of its own, with other defaults; its train.py."""
    shutil.copytree(ROOT / "recipes" / "lm", folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "config.py").read_text()
    assert "num_steps=600" in source
    (folder / "config.py").write_text(source.replace("num_steps=600", "num_steps=300"))
    return folder / "train.py"


def test_the_dump_is_the_whole_config(tmp_path: Path) -> None:
    assert dump("lm", cwd=tmp_path) == values(flatten(unstructure(config), ""))


def test_the_dump_reads_back(tmp_path: Path) -> None:
    pairs = [
        r"""regime.sample_prompt=" a'b: # \n\"" """,
        "optimizer.config.lr=1e-30",
        "dataset={order: documents, sources: [{path: ü, weight_schedule: [[10, 0.5]]}]}",
    ]
    (tmp_path / "a.yaml").write_text("common: {seed: 5}\nregime: {num_steps: 700}\n")
    (tmp_path / "b.yaml").write_text("regime: {num_steps: 800}\n")
    args = ["--config-file", "a.yaml", "--config", pairs[0], "--config-file", "b.yaml", "--config", *pairs[1:]]
    first = fnrecipe("dump-config", *args, "lm", cwd=tmp_path)
    (tmp_path / "c.yaml").write_text(first.out, encoding="utf-8")
    assert fnrecipe("dump-config", "lm", "--config-file", "c.yaml", cwd=tmp_path) == first
    resolved, _ = resolve(config, [tmp_path / "c.yaml"])
    assert resolved == resolve(config, [tmp_path / "a.yaml", tmp_path / "b.yaml"], pairs)[0]
    assert (resolved.common.seed, resolved.regime.num_steps, resolved.regime.sample_prompt) == (5, 800, " a'b: # \n\"")


def test_sources_stand_behind_the_values_and_change_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("common:\n  seed: 5\n")
    args = ["lm", "--config-file", "a.yaml", "--config", "optimizer.config.betas=[0.1, 0.2]"]
    ended = fnrecipe("dump-config", *args, "--sources", cwd=tmp_path)
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert {
        "seed: 5 # a.yaml:2",
        "betas: # command line",
        "num_steps: 600 # recipe",
        "weight_decay: 0.1 # default",
    } <= set(lines)
    assert values(yaml.load(ended.out, "stdout")) == dump(*args, cwd=tmp_path)


def test_a_wrong_config_is_told_line_by_line(tmp_path: Path) -> None:
    ended = fnrecipe("dump-config", "lm", "--config", "lr=1", "regime.num_steps=2.7", cwd=tmp_path)
    assert_usage_error(ended)
    assert ended.err.splitlines() == [
        "error: regime.num_steps: expected an integer or null, found 2.7 (command line)",
        "error: lr: expected a known key, found 'lr' (command line); did you mean optimizer.config.lr?",
    ]


@pytest.mark.parametrize("file", ["none.yaml", ".", "bad.yaml"])
def test_a_wrong_config_file_is_named(tmp_path: Path, file: str) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    assert_usage_error(fnrecipe("dump-config", "lm", "--config-file", file, cwd=tmp_path), f"error: {file}:")


@pytest.mark.parametrize("path", ["deep/my_lm/train.py", "{tmp}/deep/my_lm/train.py", "my_lm.train:recipe"])
def test_a_copy_of_a_recipe_has_its_own_defaults(tmp_path: Path, path: str) -> None:
    copy_recipe(tmp_path / "deep" / "my_lm")
    cwd = tmp_path / "deep" if ":" in path else tmp_path
    found = dump(path.format(tmp=tmp_path), "--config", "common.seed=9", cwd=cwd)
    assert (found["regime.num_steps"], found["common.seed"]) == (300, 9)


def test_a_copy_in_a_package_of_the_user_is_imported_by_its_whole_name(tmp_path: Path) -> None:
    path = copy_recipe(tmp_path / "team" / "my_lm")
    (tmp_path / "team" / "__init__.py").write_text("name = 'team'\n")
    path.write_text(path.read_text().replace("from .config", "from .. import name  # noqa\nfrom .config", 1))
    assert dump("team/my_lm/train.py", cwd=tmp_path)["regime.num_steps"] == 300


def test_a_copy_may_have_the_name_of_a_recipe_that_comes_with_fnrecipe(tmp_path: Path) -> None:
    copy_recipe(tmp_path / "lm")
    assert dump("lm/train.py", cwd=tmp_path)["regime.num_steps"] == 300
    assert dump("lm", cwd=tmp_path)["regime.num_steps"] == 600


def test_a_single_file_can_vary_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "variant.py").write_text(VARIANT)
    (tmp_path / "not an identifier.py").write_text(VARIANT)
    for name in ("variant.py", "variant:recipe", "./not an identifier.py"):
        assert dump(name, cwd=tmp_path)["common.seed"] == 77


def lookup(name: str, cwd: Path) -> Ended:
    (cwd / "empty.py").write_text("")
    (cwd / "other.py").write_text("recipe = 3\n")
    (cwd / "needs.py").write_text("import fnrecipe.no_such_part\n")
    return fnrecipe("dump-config", name, cwd=cwd)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lmm", "error: lmm: no such recipe; did you mean lm? (or path/to/recipe.py, or module:attribute)"),
        ("", "no such recipe; valid names: lm"),
        ("__pycache__", "no such recipe"),
        ("none.py", "error: none.py: no such recipe file"),
        ("some/where", "error: some/where: no such recipe file"),
        ("./", "no such recipe file"),
        ("empty.py", "error: empty.py: expected a fnrecipe Recipe called 'recipe' in it, found none"),
        ("other.py", "error: other.py: expected a fnrecipe Recipe called 'recipe' in it, found int"),
        ("empty:recipe", "error: empty:recipe: expected a fnrecipe Recipe called 'recipe' in it, found none"),
        ("empty:", "error: empty:"),
        ("os:getcwd", "error: os:getcwd: expected a fnrecipe Recipe called 'getcwd' in it, found builtin_function"),
        ("no_such_module:recipe", "error: no_such_module: no module called no_such_module here or installed"),
        ("empty.sub:recipe", "no module called empty.sub here or installed"),
        (":recipe", "error: :recipe"),
        (".empty:recipe", "error: .empty:recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    assert_usage_error(lookup(name, tmp_path), message)


def test_an_import_that_fails_inside_a_recipe_keeps_its_traceback(tmp_path: Path) -> None:
    ended = lookup("needs:recipe", tmp_path)
    assert ended.status == 1
    assert "needs.py" in ended.err
    assert "no_such_part" in ended.err


def test_a_config_file_may_lie_in_a_home_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("common: {seed: 5}")
    ended = fnrecipe("dump-config", "lm", "--config-file=~/mine.yaml", cwd=tmp_path, HOME=str(tmp_path))
    assert (ended.status, ended.err) == (0, "")
    assert "seed: 5" in ended.out
