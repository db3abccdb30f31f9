"""`fnrecipe checkpoint`: what it prints, and its exit status."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.checkpoints import save_cut, save_two
from tests.cli.helpers import Verb, assert_usage_error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory as of a run, with checkpoints of steps 10 and 20."""
    (tmp_path / "run").mkdir()
    save_two(tmp_path / "run/checkpoints")
    return tmp_path / "run"


def damage(place: Path) -> None:
    """Flips the last bit of the tensors, which nothing but reading every byte finds."""
    path = place / "state_0000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cells(text: str, first: str) -> list[str]:
    """The row of a printed table that begins with `first`."""
    (row,) = [line for line in text.splitlines() if re.match(rf"│ {re.escape(first)} ", line)]
    return [cell.strip() for cell in row.strip("│").split("│")]


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_list_prints_what_there_is(verb: Verb, run: Path, tmp_path: Path, place: str) -> None:
    (run / "checkpoints/step_00000010/state.json").write_text("{}")
    (run / "checkpoints/step_00000030.tmp").mkdir()
    (run / "checkpoints/step_00000040").symlink_to(tmp_path)
    ended = verb("list", tmp_path / place)
    assert (ended.status, ended.err) == (0, "")
    assert cells(ended.out, "20")[-4:] == ["2.1 kB", "3", "", "whole"]
    assert cells(ended.out, "10")[-1] == "cannot be loaded: state.json is not what SHA256SUMS says"
    assert "found a link" in cells(ended.out, "40")[-1]


def test_verify_reads_every_byte(verb: Verb, run: Path) -> None:
    assert verb("verify", run).status == 0
    first, second = (run / f"checkpoints/step_000000{step}" for step in (10, 20))
    damage(first)
    assert cells(verb("list", run).out, "10")[-1] == "whole"
    ended = verb("verify", run)
    assert ended.status == 1
    lines = [f"{first}: state_0000.safetensors is not what SHA256SUMS says", f"{second}: whole, 2.1 kB"]
    assert ended.out.splitlines() == lines
    assert verb("verify", run, "--step", "20").status == 0
    assert verb("verify", second).status == 0
    assert verb("verify", first).status == 1


def test_show_prints_each_tensor_and_how_it_is_cut(verb: Verb, tmp_path: Path) -> None:
    save_cut(tmp_path, 7, {"params.x": torch.ones(6, 4), "params.y": torch.ones(3).bfloat16(), "step": torch.tensor(7)}, 3)
    ended = verb("show", tmp_path)
    assert ended.status == 0
    assert cells(ended.out, "params.x") == ["params.x", "float32", "[6, 4]", "dim 0 in 3", "96 B"]
    assert cells(ended.out, "params.y")[1:] == ["bfloat16", "[3]", "dim 0 in 3", "6 B"]
    assert cells(ended.out, "step")[1:] == ["int64", "[]", "whole in state_0000", "8 B"]
    assert "step 7, 3 tensors in 3 files, verified" in ended.out
    assert "size: 110 B: params 102 B, step 8 B" in ended.out


def test_diff_names_what_differs(verb: Verb, run: Path) -> None:
    ended = verb("diff", run, run / "checkpoints/step_00000010")
    assert ended.status == 1
    assert cells(ended.out, "params.layers.0.query")[1:] == ["float32 [2, 3]", "float32 [2, 3]", "6 of 6", "10", "0.5"]
    assert ended.out.splitlines()[-2:] == ["step: 20 in A, 10 in B", "1 of 10 tensors differ"]


def test_diff_of_two_shardings_is_none(verb: Verb, tmp_path: Path) -> None:
    tensors = {"x": torch.randn(8, 4), "n": torch.tensor(3)}
    for name, parts in (("a", 1), ("b", 4)):
        save_cut(tmp_path / name, 5, tensors, parts)
    ended = verb("diff", tmp_path / "a", tmp_path / "b", "--step", "5")
    assert (ended.status, ended.out.splitlines()[-1]) == (0, "2 tensors are alike")


def test_diff_takes_the_newest_that_is_whole_and_says_so(verb: Verb, run: Path) -> None:
    damage(run / "checkpoints/step_00000020")
    ended = verb("diff", run, run / "checkpoints/step_00000010")
    assert ended.status == 0
    assert "step_00000020: damaged checkpoint passed over" in ended.err


def test_errors_are_one_line(verb: Verb, run: Path, tmp_path: Path) -> None:
    damage(run / "checkpoints/step_00000010")
    assert_usage_error(verb("diff", run, run / "checkpoints/step_00000010"), "expected a whole checkpoint, found a damaged one")
    assert_usage_error(verb("diff", run, run, "--step", "15"), "expected a checkpoint of step 15, found those of 10, 20")
    assert_usage_error(verb("verify", run, "--step", "15"), "expected a checkpoint of step 15, found those of 10, 20")
    step = run / "checkpoints/step_00000020"
    assert_usage_error(verb("show", step, "--step", "10"), "expected the directory of a run, found a checkpoint of step 20")
    (tmp_path / "empty").mkdir()
    assert_usage_error(verb("list", tmp_path / "empty"), "expected a run with checkpoints, or a checkpoint, found none")
    assert_usage_error(verb("list", tmp_path / "nothing"), "found no directory")
