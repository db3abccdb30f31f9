"""Checkpoints: what is written comes back, what is damaged is never loaded, and what fails leaves the rest alone."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from fnrecipe import checkpoint, optim, tree
from fnrecipe.errors import CheckpointError
from fnrecipe.random import key
from fnrecipe.step import init_state
from tests.checkpoints import CURSOR, FILES, FINGERPRINTS, assert_is_step, newest, save_two, sign, silent, small_state
from tests.helpers import assert_same_bits
from tests.nobody import error_of_nobody, public

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return save_two(tmp_path)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is written comes back.


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    patterns = torch.randint(0, 256, (2, 3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = {str(dtype): (patterns % 2).bool() if dtype == torch.bool else patterns.clone().view(dtype) for dtype in DTYPES}
    state |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(-0.0), "strided": torch.arange(6.0).view(2, 3).t()}
    checkpoint.save(tmp_path, 3, state, CURSOR, FINGERPRINTS)
    found = checkpoint.newest(tmp_path, silent)
    assert found is not None
    assert (found.step, found.cursor, found.files) == (3, CURSOR, FINGERPRINTS)
    assert_same_bits(checkpoint.restore(found, tree.map(torch.empty_like, state)), state)


def test_a_state_comes_back_by_its_paths(tmp_path: Path) -> None:
    state = small_state(0.1)
    checkpoint.save(tmp_path, 0, state, None, FINGERPRINTS)
    found = checkpoint.newest(tmp_path, silent)
    assert found is not None
    assert found.tensors.keys() == tree.paths(state).keys()
    assert_same_bits(checkpoint.restore(found, small_state(2.0)), state)


def test_a_checkpoint_is_read_by_other_tools(two: Path) -> None:
    place = two / "step_00000020"
    assert names(place) == set(FILES)
    with safetensors.safe_open(place / FILES[0], "pt") as file:
        assert set(file.keys()) == tree.paths(small_state()).keys()
        assert torch.equal(file.get_tensor("params.layers.0.query"), torch.full((2, 3), 20.0))
    text = (place / "state.json").read_text()
    document = json.loads(text)
    assert document["step"] == 20
    assert document["files"] == FINGERPRINTS
    one_line = {"format", "step", "shards"}
    assert len(text.splitlines()) == 2 + sum(1 if key in one_line else 2 + len(document[key]) for key in document)
    assert document["tensors"]["params.layers.0.query"] == ["float32", [2, 3], {FILES[0]: [[0, 2], [0, 3]]}]
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=place, check=True, capture_output=True)


@pytest.mark.parametrize("cursor", [None, [], {}, [1, {"a": {}}], {"0": {"1": [1, [2]], "2": {}}, 'a"\n': "ü"}])
@pytest.mark.parametrize("files", [{}, {'a: "\n': "1"}])
def test_any_cursor_and_any_names_of_files_come_back(tmp_path: Path, cursor: Any, files: dict[str, str]) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, cursor, files)
    found = checkpoint.newest(tmp_path, silent)
    assert found is not None
    assert (found.cursor, found.files) == (cursor, files)


def test_changing_what_was_loaded_does_not_change_the_checkpoint(two: Path) -> None:
    before = contents(two)
    found = checkpoint.newest(two, silent)
    assert found is not None
    for leaf in tree.leaves(checkpoint.restore(found, small_state())):
        leaf.zero_()
    assert contents(two) == before
    assert_is_step(checkpoint.newest(two, silent), 20)


def test_saving_again_what_is_there_and_whole_changes_nothing(two: Path) -> None:
    before = contents(two)
    assert checkpoint.save(two, 20, small_state(99.0), None, FINGERPRINTS) == two / "step_00000020"
    assert contents(two) == before


def test_the_newest_is_the_greatest_number_whatever_the_clock_says(two: Path) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoint.save(two, step, small_state(float(step)), None, FINGERPRINTS)
    os.utime(two / "step_00000010", (2**33, 2**33))
    found = [place.name for place in checkpoint.committed(two)]
    assert found == ["step_00000010", "step_00000020", "step_99999999", "step_100000000"]
    assert_is_step(checkpoint.newest(two, silent), 100_000_000)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_without_checkpoints_there_is_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "checkpoints")
    assert checkpoint.newest(tmp_path / "checkpoints", silent) is None


# What is damaged is never loaded.


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(two: Path, name: str) -> None:
    path = two / "step_00000020" / name
    whole, draw = path.read_bytes(), random.Random(name)
    for bit in draw.sample(range(8 * len(whole)), 60):
        flip(path, bit)
        found, warnings = newest(two)
        assert_is_step(found, 10)
        assert len(warnings) == 1
        assert "step_00000020" in warnings[0]
        flip(path, bit)
    assert_is_step(checkpoint.newest(two, silent), 20)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer by one byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "longer by a line": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not text": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "missing": Path.unlink,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_falls_back_to_the_checkpoint_before(two: Path, name: str, damage: Callable[[Path], Any]) -> None:
    damage(two / "step_00000020" / name)
    found, warnings = newest(two)
    assert_is_step(found, 10)
    assert ["step_00000020" in text for text in warnings] == [True]


@pytest.mark.parametrize("name", FILES)
def test_when_all_are_damaged_nothing_starts_from_scratch(two: Path, name: str) -> None:
    for place in checkpoint.committed(two):
        (place / name).unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpoint.newest(two, lambda text: None)


def test_an_empty_directory_is_a_damaged_checkpoint(two: Path) -> None:
    (two / "step_00000030").mkdir()
    found, warnings = newest(two)
    assert_is_step(found, 20)
    assert len(warnings) == 1


def test_saving_over_a_damaged_checkpoint_writes_it_anew_and_keeps_the_damaged_one(two: Path) -> None:
    flip(two / "step_00000020" / FILES[0], 1000)
    damaged = (two / "step_00000020" / FILES[0]).read_bytes()
    checkpoint.save(two, 20, small_state(20.0), CURSOR, FINGERPRINTS)
    assert_is_step(checkpoint.newest(two, silent), 20)
    assert (two / "step_00000020.damaged" / FILES[0]).read_bytes() == damaged


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused_by_name(two: Path, number: int) -> None:
    place = two / "step_00000020"
    document = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(
        json.dumps({key: document[key] for key in document if key != "files"} | {"format": number})
    )
    sign(place)
    with pytest.raises(CheckpointError, match=f"step_00000020: expected checkpoint format 3, found {number}"):
        checkpoint.newest(two, silent)


@pytest.mark.parametrize("name", [".", *FILES])
def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(name: str) -> None:
    with public() as root:
        (save_two(root) / "step_00000020" / name).chmod(0o000)
        told = error_of_nobody(lambda: checkpoint.newest(root, silent))
    assert told.startswith(f"CheckpointError: {root}/step_00000020: ")
    assert "Permission denied" in told


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_a_planted_pickle_is_never_opened(two: Path, tmp_path: Path) -> None:
    canary, place = tmp_path / "canary", two / "step_00000020"
    bomb = pickle.dumps(Planted(canary))
    for name in (".metadata", "state.pt", "data.pkl"):
        (place / name).write_bytes(bomb)
    assert_is_step(checkpoint.newest(two, silent), 20)
    (place / FILES[0]).write_bytes(bomb)
    sign(place)
    found, (warning,) = newest(two)
    assert_is_step(found, 10)
    assert "step_00000020: damaged" in warning
    assert not canary.exists()
    pickle.loads(bomb)  # noqa: S301 (the bomb does go off)
    assert canary.exists()


def test_stray_names_are_neither_loaded_nor_removed(two: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "step_00000099"
    shutil.copytree(two / "step_00000020", elsewhere)
    strays = ["step_12.bak", "step_x", "step_", "step_00000030.bak", "step_00000040.damaged", "step_50", "xstep_00000060", "70"]
    strays += ["step_000000050", "step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661", "step_00000050\n"]
    for name in strays:
        shutil.copytree(two / "step_00000020", two / name)
    (two / "step_00000080").write_text("a file")
    (two / "step_00000090").symlink_to(elsewhere)
    before = contents(elsewhere)
    assert [place.name for place in checkpoint.committed(two)] == ["step_00000010", "step_00000020"]
    found, warnings = newest(two)
    assert_is_step(found, 20)
    assert [text.partition("step_")[2] for text in warnings] == [
        "00000090: damaged checkpoint passed over: step_00000090: expected a directory, found a link",
        "00000080: damaged checkpoint passed over: step_00000080: expected a directory, found a file",
    ]
    checkpoint.prune(two, checkpoint.Policy(last=1))
    assert names(two) == {"step_00000020", "step_00000080", "step_00000090", *strays}
    assert contents(elsewhere) == before


# What fails leaves the rest alone.


class Killed(BaseException):
    """The end of a process, as far as files go: nothing after it runs but `finally`."""


CALLS = {"fsync": (os, 5), "rename": (Path, 1), "mkdir": (Path, 1), "write_text": (Path, 2)}
"""Calls that a save makes: where they live, and how many there are at least."""
over_calls = pytest.mark.parametrize("call", CALLS)
FULL = OSError(errno.ENOSPC, "No space left on device")


def failing_save(root: Path, call: str, after: int, error: BaseException) -> BaseException | None:
    """What comes out of saving step 30 where each `call` but the first so many raises `error`."""
    owner, _ = CALLS[call]
    real, calls = getattr(owner, call), 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, call, failing)
        try:
            checkpoint.save(root, 30, small_state(30.0), CURSOR, FINGERPRINTS)
        except (CheckpointError, Killed) as caught:
            return caught
    return None


@over_calls
def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_half_written(two: Path, call: str) -> None:
    before, failures = contents(two), 0
    while caught := failing_save(two, call, failures, FULL):
        failures += 1
        assert "No space left on device" in str(caught)
        assert "step_00000030" in str(caught)
        assert contents(two).items() >= before.items()
        assert not [name for name in names(two) if name.endswith(".tmp")]
        found = checkpoint.newest(two, silent)
        assert_is_step(found, 30 if "step_00000030" in names(two) else 20)
        shutil.rmtree(two / "step_00000030", ignore_errors=True)
    assert failures >= CALLS[call][1]
    assert_is_step(checkpoint.newest(two, silent), 30)


@over_calls
def test_a_kill_at_any_call_loses_nothing_and_the_next_save_works(two: Path, call: str) -> None:
    before, kills = contents(two), 0
    while failing_save(two, call, kills, Killed()):
        kills += 1
        assert contents(two).items() >= before.items()
        assert_is_step(checkpoint.newest(two, silent), 30 if "step_00000030" in names(two) else 20)
        checkpoint.save(two, 30, small_state(30.0), CURSOR, FINGERPRINTS)
        assert_is_step(checkpoint.newest(two, silent), 30)
        checkpoint.prune(two, checkpoint.Policy(last=3))
        assert names(two) == {"step_00000010", "step_00000020", "step_00000030"}
        shutil.rmtree(two / "step_00000030")
    assert kills >= CALLS[call][1]


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_a_checkpoint_error(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(two / "step_00000020/state.json", 9)

    def refuse(*args: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        checkpoint.save(two, 20, small_state(), None, FINGERPRINTS)


def test_a_root_that_is_a_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError):
        checkpoint.save(tmp_path / "checkpoints", 1, small_state(), None, FINGERPRINTS)


# What does not fit is named.


def test_everything_that_does_not_fit_is_named_at_once(two: Path) -> None:
    found = checkpoint.newest(two, silent)
    assert found is not None
    other = {"layers": {"0": {"query": torch.zeros(2, 4)}, "1": {"query": torch.zeros(2, 3)}}, "norm": torch.ones(3).half()}
    like = init_state(other, optim.stateless(lambda u, p, s: (u, {})), key(0))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(found, like)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the checkpoint does not fit this config"
    assert set(lines[1:]) == {
        "params.layers.0.query: expected float32 [2, 4], found float32 [2, 3] in the checkpoint",
        "params.layers.1.query: not in the checkpoint",
        "params.norm: expected float16 [3], found float32 [3] in the checkpoint",
        *(
            f"optimizer.{name}: not in the state of this config"
            for name in ("count", "mean.layers.0.query", "mean.norm", "square.layers.0.query", "square.norm")
        ),
    }
