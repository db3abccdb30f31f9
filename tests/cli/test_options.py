"""`--config` takes the pairs that follow it and nothing else, wherever it stands; asking for help costs little."""

from __future__ import annotations

import shlex
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import click
import pytest

from fnrecipe.cli.dump_config import dump_config
from fnrecipe.cli.graph import graph
from fnrecipe.cli.profile import profile
from fnrecipe.cli.tokenizer import train as tokenizer_train
from fnrecipe.cli.train import train
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.recipes.lm.config import config
from tests.cli.helpers import assert_usage_error, fnrecipe, python

PARTS = [["lm"], ["--out", "dir"], ["--config", "a=1", "b.c=2"], ["--config-file", "f.yaml"], ["--resume-with-changes"]]


def parse(*args: str, command: click.Command = train) -> dict[str, Any]:
    return command.make_context(command.name, list(args)).params


@pytest.mark.parametrize("parts", list(permutations(PARTS)), ids=lambda parts: " ".join(chain(*parts)))
def test_options_stand_in_any_order(parts: tuple[list[str], ...]) -> None:
    assert parse(*chain(*parts)) == {
        "recipe": "lm",
        "out": Path("dir"),
        "files": (Path("f.yaml"),),
        "pairs": ("a=1", "b.c=2"),
        "nproc": None,
        "with_changes": True,
        "from_step": None,
    }


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        ("lm --out dir a.b=1", "\nValues of the config follow --config: --config a.b=1"),
        ("--config c.d=2 --out dir lm a.b=1", "\nValues of the config follow --config: --config a.b=1"),
        ("lm --out dir --a.b_2.c=1", "\nValues of the config follow --config: --config a.b_2.c=1"),
        ("lm --out dir --a.b 1", "\nValues of the config follow --config: --config a.b=VALUE"),
        ("lm --config a.b=1 --ou dir", ""),
        ("lm --out dir more.py", ""),
    ],
)
def test_a_value_that_does_not_follow_config_is_told_where_it_goes(args: str, advice: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(*shlex.split(args))
    assert "".join(caught.value.message.partition("\n")[1:]) == advice


@pytest.mark.parametrize(
    ("args", "pairs"),
    [
        ("lm", ()),
        ("lm --config a=1", ("a=1",)),
        ("--config a=1 lm", ("a=1",)),
        ("--config a=1 b=2 lm --config c=3", ("a=1", "b=2", "c=3")),
        ("lm --config a=1 --config a=2 b=3 --config a=4", ("a=1", "a=2", "b=3", "a=4")),
        ("lm --config a=1 --sources --config b=2", ("a=1", "b=2")),
        ("lm --config=a=1", ("a=1",)),
        ("--config a=1 -- lm", ("a=1",)),
        ("lm --config a= b=", ("a=", "b=")),
        ("lm --config a=b=c d==", ("a=b=c", "d==")),
        ("lm --config a=--sources b=lm", ("a=--sources", "b=lm")),
        ("lm --config a_1.b_2=[1,2] c={d:1}", ("a_1.b_2=[1,2]", "c={d:1}")),
    ],
)
def test_pairs_keep_their_order(args: str, pairs: tuple[str, ...]) -> None:
    params = parse(*args.split(), command=dump_config)
    assert (params["recipe"], params["pairs"]) == ("lm", pairs)


@pytest.mark.parametrize("pair", ["a=b c", "a= b", "a=b\nc", "a=[{path: x y}]", "a='b = c'"])
def test_a_pair_is_one_argument_whatever_its_value_holds(pair: str) -> None:
    assert parse("--config", pair, "b=2", "lm", command=dump_config)["pairs"] == (pair, "b=2")


def test_several_files_keep_their_order() -> None:
    files = parse("lm", "--config-file", "b", "--config", "a=1", "--config-file", "a", command=dump_config)["files"]
    assert files == (Path("b"), Path("a"))


@pytest.mark.parametrize(
    ("args", "out", "recipe"),
    [
        (["--config", "a=1", "--out", "b=2", "lm"], "b=2", "lm"),
        (["--config", "a=1", "--out=b=2", "lm"], "b=2", "lm"),
        (["--out", "dir", "--config", "a=1", "my/lm.py"], "dir", "my/lm.py"),
        (["--out", "dir", "--config", "a=1", "my.module:recipe"], "dir", "my.module:recipe"),
        (["--out", "dir", "--config", "a=1", "./b=2.py"], "dir", "./b=2.py"),
        (["--out", "dir", "--config", "a=1", "--", "b=2/lm.py"], "dir", "b=2/lm.py"),
        (["--out", "dir", "--config", "a=1", "--", "--config"], "dir", "--config"),
        (["b=2/lm.py", "--out", "dir", "--config", "a=1"], "dir", "b=2/lm.py"),
    ],
)
def test_pairs_swallow_no_other_argument(args: list[str], out: str, recipe: str) -> None:
    params = parse(*args)
    assert (params["out"], params["recipe"], params["pairs"]) == (Path(out), recipe, ("a=1",))


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["lm", "--config"], "nothing"),
        (["--config", "lm"], "lm"),
        (["lm", "--config", "--sources"], "--sources"),
        (["lm", "--config", "--config", "a=1"], "--config"),
        (["lm", "--config", "a=1", "--config"], "nothing"),
        (["lm", "--config", "a-b=1"], "a-b=1"),
        (["lm", "--config", ""], ""),
    ],
)
def test_config_without_a_pair_is_refused(args: list[str], found: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*args, command=dump_config)
    assert str(caught.value) == f"--config: expected section.key=value, found {found}"


def test_pairs_after_another_option_are_no_pairs() -> None:
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        parse("lm", "--config", "a=1", "--sources", "b=2", command=dump_config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dump-config", "lm", "--config"], "error: --config: expected section.key=value, found nothing"),
        (["dump-config", "lm", "--config", "a"], "error: --config: expected section.key=value, found a"),
        (["dump-config", "lm", "--config", b"regime.sample_prompt=\xff"], "error: "),
        (["dump-config", "lm", "--confg", "a=1"], "No such option '--confg'"),
        (["dump-config"], "Missing argument 'RECIPE'"),
        (["train", "lm"], "Missing option '--out'"),
        (["train", "lm", "--out"], "Option '--out' requires an argument"),
        (["train", "--out", "dir"], "Missing argument 'RECIPE'"),
        (["train", "lm", "--out", ""], "Invalid value for '--out': expected a path, found nothing"),
        (["train", "lm", "--out", "dir", "more"], "unexpected extra argument (more)"),
        (["tran", "lm"], "No such command 'tran'"),
    ],
)
def test_wrong_usage_ends_with_status_2(tmp_path: Path, args: list[str | bytes], message: str) -> None:
    assert_usage_error(fnrecipe(*args, cwd=tmp_path), message)
    assert list(tmp_path.iterdir()) == []


def test_every_command_and_option_is_in_the_help(tmp_path: Path) -> None:
    commands = ["", "train", "dump-config", "data", "data show", "data stats", "data cache", "tokenizer", "tokenizer train"]
    commands += ["graph", "profile", "coordinate-check", "lr-find", "new"]
    pages = [fnrecipe(*name.split(), ("-h", "--help")[number % 2], cwd=tmp_path) for number, name in enumerate(commands)]
    assert {(page.status, page.err) for page in pages} == {(0, "")}
    for page, names in zip(
        pages,
        [
            ["train", "new", "dump-config", "data", "tokenizer", "graph", "profile", "--version", "Exit status"],
            ["RECIPE", "--out", "--config-file", "--config", "--resume-with-changes"],
            ["RECIPE", "--config-file", "--config", "--sources"],
            ["cache", "show", "stats"],
            ["RECIPE", "--rows", "--valid", "--config-file", "--config"],
            ["RECIPE", "--documents", "--batches", "--valid", "--config-file", "--config"],
            ["RECIPE", "--config-file", "--config"],
            ["train"],
            ["PATH...", "--out", "--vocab-size", "--special-token", "--format", "--text-key", "--separator"],
            ["RECIPE", "--out", "--config-file", "--config"],
            ["RECIPE", "--out", "--steps", "--config-file", "--config"],
            ["RECIPE", "--widths", "--depths", "--steps", "--out", "--config-file", "--config"],
            ["RUN|RECIPE", "--out", "--start", "--end", "--steps", "--step", "--config-file", "--config"],
            ["NAME"],
        ],
        strict=True,
    ):
        assert all(name in page.out for name in names)


ABOUT_RECIPES = {"train": train, "graph": graph, "profile": profile}
EXPLAINED = [*ABOUT_RECIPES.values(), tokenizer_train]
HELP = [line.strip() for command in EXPLAINED for line in str(command.help).splitlines()]


@pytest.mark.parametrize("line", [line for line in HELP if line.startswith("fnrecipe ")])
def test_the_examples_in_the_help_are_understood(line: str) -> None:
    name, *args = shlex.split(line)[1:]
    if name in ABOUT_RECIPES:
        params = parse(*args, command=ABOUT_RECIPES[name])
        resolve(config, params["files"], params["pairs"])
    else:
        assert parse(*args[1:], command=tokenizer_train)["paths"]


WATCHED = """
import atexit, sys, time
atexit.register(lambda: print("torch" in sys.modules, time.process_time(), file=sys.stderr))
from fnrecipe.cli.main import main
main()
"""


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["train", "--help"],
        ["dump-config", "lm"],
        ["train", "lm", "--out", "x", "--config"],
        ["data", "show", "-h"],
        ["data", "stats", "lm", "--config", "a=1"],
        ["tokenizer", "train", "-h"],
    ],
)
def test_quick_commands_import_no_torch_and_cost_little(tmp_path: Path, args: list[str]) -> None:
    torch, seconds = zip(*[_watch(tmp_path, args) for _ in range(3)], strict=True)
    assert set(torch) == {"False"}
    assert min(map(float, seconds)) < 0.5


def _watch(cwd: Path, args: list[str]) -> list[str]:
    """Whether torch was imported, and the CPU seconds from the start of the process."""
    return python("-c", WATCHED, *args, cwd=cwd).err.splitlines()[-1].split()
