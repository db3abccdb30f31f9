"""What becomes of a run's output directory while it is written to, and what a run makes of one that lies."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.config import resolve
from fnrecipe.errors import CheckpointError, DataError, FnrecipeError
from fnrecipe.recipe import Recipe
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.shell import train as run
from tests.checkpoints import sign
from tests.helpers import end, last_step, pairs, start
from tests.shell.stages import before_batch

SHORT: dict[str, Any] = {
    "regime__num_steps": 4,
    "regime__checkpoint_every_n_steps": 2,
    "dataset__prefetch": 0,
    "trainer__jit": "off",
}


def train(texts: Path, out: Path, trained: Recipe[Any] = recipe, **changes: Any) -> int:
    config, _ = resolve(recipe.config, (), pairs(texts, **{**SHORT, **changes}))
    return run.train(trained, config, out)


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whatever_a_run_writes_has_the_modes_of_the_umask(texts: Path, tmp_path: Path, umask: int) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    models = {
        "regime__keep_last_n_checkpoints": 1,
        "regime__keep_checkpoint_every_n_steps": 2,
        "regime__keep_model_only": "true",
    }
    assert train(texts, out, dataset__cache=cache, **models) == 0
    found = {path: path.stat().st_mode for root in (out, cache) for path in [root, *root.rglob("*")]}
    wrong = {
        path: oct(mode) for path, mode in found.items() if stat.S_IMODE(mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
    assert {path.suffix for path in found} >= {".safetensors", ".json", ".jsonl", ".yaml", ".log", ".txt"}
    assert {path.name for path in found} >= {".lock", "SHA256SUMS", "step_00000004", "model_00000002"}


def replaced(out: Path) -> None:
    out.rename(out.with_name("moved"))
    shutil.copytree(out.with_name("moved"), out)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("moment", [1, 3])
@pytest.mark.parametrize("act", [shutil.rmtree, replaced])
def test_a_directory_that_is_lost_ends_the_run_and_is_not_made_again(
    texts: Path, tmp_path: Path, act: Callable[[Path], Any], moment: int
) -> None:
    out, left = tmp_path / "out", {}

    def lose() -> None:
        act(out)
        left.update(contents(out))

    with pytest.raises(FnrecipeError) as caught:  # a save beside the steps might write there while `act` is at it
        train(texts, out, before_batch(moment, lose), regime__checkpoint_in_background=False)
    assert str(caught.value) == f"{out}: the output directory was removed, renamed or replaced while the run was writing to it"
    assert contents(out) == left
    assert out.exists() == (act is replaced)


@pytest.mark.slow
def test_a_directory_that_is_renamed_under_a_run_is_told_in_one_line(texts: Path, tmp_path: Path) -> None:
    process = start("train", "lm", "--out", str(tmp_path / "out"), "--config", *pairs(texts, regime__num_steps=100_000))
    while process.poll() is None and last_step(tmp_path / "out") < 3:
        time.sleep(0.01)
    (tmp_path / "out").rename(tmp_path / "moved")
    ended = end(process)
    told = "the output directory was removed, renamed or replaced while the run was writing to it"
    assert (ended.status, ended.errors) == (1, f"error: {tmp_path}/out: {told}\n")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    assert train(texts, out) == 0
    return out


def relate(out: Path, key: str, value: Any) -> None:
    """Puts a value into the manifest of the last checkpoint, with the right sum."""
    place = sorted((out / "checkpoints").iterdir())[-1]
    document = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**document, key: value}))
    sign(place)


@pytest.mark.parametrize(
    "cursor",
    [3, "x", [], {"0": 1}, {str(lane): 5 for lane in range(4)}, {str(lane): [[[1, "x"], {}]] * 3 for lane in range(4)}],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cursor_of_no_stream_is_told(trained: Path, texts: Path, tmp_path: Path, cursor: Any, workers: int) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    relate(out, "cursor", cursor)
    with pytest.raises(FnrecipeError) as caught:
        train(texts, out, regime__num_steps=6, dataset__num_workers=workers)
    assert len(str(caught.value).splitlines()) == 1


def test_a_state_of_another_step_than_its_manifest_is_refused(trained: Path, texts: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "checkpoints/step_00000004").rename(out / "checkpoints/step_00000005")
    relate(out, "step", 5)
    with pytest.raises(CheckpointError, match="step_00000005: expected the state of step 5, found that of 4"):
        train(texts, out, regime__num_steps=6)


def test_a_checkpoint_that_was_passed_over_is_set_aside_and_costs_no_other_one(texts: Path, tmp_path: Path) -> None:
    few = {"regime__keep_last_n_checkpoints": 2}
    assert train(texts, tmp_path, regime__num_steps=6, **few) == 0
    (shard,) = (tmp_path / "checkpoints/step_00000006").glob("*.safetensors")
    *rest, last = shard.read_bytes()
    shard.write_bytes(bytes([*rest, last ^ 1]))
    with pytest.raises(DataError):
        train(texts, tmp_path, before_batch(1, stop), regime__num_steps=6, **few)
    checkpoints = tmp_path / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000004", "step_00000006.damaged"}
    assert train(texts, tmp_path, regime__num_steps=6, **few) == 0
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000004", "step_00000006", "step_00000006.damaged"}


def stop() -> None:
    raise DataError("stop")
