"""A recipe's own module is a command: it trains, prints its config and says what is missing, wherever the recipe lies."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fnrecipe.cli.main import run_recipe
from fnrecipe.recipes.lm.train import recipe
from tests.cli.helpers import ROOT, Ended, assert_usage_error, fnrecipe, fnrecipe_here, python
from tests.helpers import last_step, pairs

Run = Callable[..., Ended]
TREE = ["--config-file", "a.yaml", "--config", "regime.num_steps=20", "common.seed=9"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """How the module of the recipe ends with some arguments, in this process and a directory that holds `a.yaml`."""
    (tmp_path / "a.yaml").write_text("common: {seed: 5}\nregime: {num_sample_tokens: 3}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fnrecipe.cli.main.left_behind", lambda: False)  # threads of other tests

    def module(*args: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            run_recipe(recipe)
        return Ended(int(caught.value.code or 0), *capsys.readouterr())

    return module


@pytest.mark.parametrize("args", [[], ["--sources"], TREE, [*TREE, "--sources"], ["--sources", *TREE]])
def test_the_dump_is_that_of_the_program(
    module: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    expected = fnrecipe_here(monkeypatch, capsys, "dump-config", "lm", *args)
    assert expected.status == 0
    for place in ([], ["dir"]):
        assert module(*place, "--dump-config", *args) == module(*args, "--dump-config", *place) == expected
    assert [path.name for path in Path.cwd().iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_option(module: Run, flag: str) -> None:
    ended = module(flag)
    assert (ended.status, ended.err) == (0, "")
    options = ["--config-file", "--config", "--resume-with-changes", "--nproc", "--dump-config", "--sources"]
    assert all(name in ended.out for name in ["DIR", *options])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "DIR: expected a directory to train in, found none (--dump-config needs none, --help tells more)"),
        (TREE, "DIR: expected a directory to train in, found none (--dump-config needs none, --help tells more)"),
        (["dir", "--sources"], "--sources: expected --dump-config beside it, found nothing to print"),
        (["--dump-config", "--config-file", "b.yaml"], "b.yaml: cannot read the config file: No such file or directory"),
        (["dir", "--config"], "--config: expected section.key=value, found nothing"),
        (["dir", "--config", "regime.num_steps=0"], "regime.num_steps: expected an integer of at least 1 or null, found 0"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_and_writes_nothing(module: Run, args: list[str], line: str) -> None:
    ended = module(*args)
    assert_usage_error(ended, f"error: {line}")
    assert len(ended.err.splitlines()) == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["a.yaml"]


def copy(folder: Path) -> None:
    """`cp -r recipes/lm FOLDER`."""
    shutil.copytree(ROOT / "recipes" / "lm", folder, ignore=shutil.ignore_patterns("__pycache__"))


QUICK = {
    "regime__num_steps": 2,
    "lr_scheduler__config__num_warmup_steps": 0,
    "trainer__jit": "off",
    "regime__num_sample_tokens": 0,
}


@pytest.mark.slow
def test_a_copy_trains_as_a_module_and_goes_on_with_changes(tmp_path: Path, texts: Path) -> None:
    copy(tmp_path / "team" / "my_lm")
    train = ["-m", "team.my_lm.train", "out", "--config", *pairs(texts, **QUICK)]
    ended = python(*train, cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert last_step(tmp_path / "out") == 2
    longer = [*train, "regime.num_steps=3", "common.seed=3"]
    assert_usage_error(python(*longer, cwd=tmp_path), "out: holds a run with another config", "common.seed: 2 there, 3 now")
    assert python(*longer, "--resume-with-changes", cwd=tmp_path).status == 0
    assert last_step(tmp_path / "out") == 3


@pytest.mark.slow
def test_a_recipe_in_a_single_file_runs_as_a_script_on_two_processes(tmp_path: Path, texts: Path) -> None:
    lines = ["from fnrecipe.cli.main import run_recipe", "from fnrecipe.recipes.lm.train import recipe"]
    (tmp_path / "my recipe.py").write_text("\n".join([*lines, "if __name__ == '__main__':", "    run_recipe(recipe)\n"]))
    ended = python("my recipe.py", "out", "--nproc", "2", "--config", *pairs(texts, **QUICK), cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert "2 ranks" in (tmp_path / "out/logs/rank_0.log").read_text()
    assert last_step(tmp_path / "out") == 2


@pytest.mark.slow
@pytest.mark.parametrize("module", ["recipes.lm.train", "fnrecipe.recipes.lm.train"])
def test_the_module_runs_in_another_directory(tmp_path: Path, module: str) -> None:
    ended = python("-m", module, "--dump-config", "--config", "common.seed=9", cwd=tmp_path)
    assert ended == fnrecipe("dump-config", "lm", "--config", "common.seed=9", cwd=tmp_path)
    assert (ended.status, ended.err) == (0, "")
