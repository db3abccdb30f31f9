"""A machine that lies: a flipped bit in what one rank holds, a step that is computed differently the second time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fnrecipe import random, tree
from fnrecipe.errors import MachineError
from fnrecipe.optim.adamw import adamw
from fnrecipe.parallel.mesh import is_shard
from fnrecipe.runtime.gang import Gang
from fnrecipe.shell.guards.machine import hash_of, recomputed
from fnrecipe.step import State, init_state, train_step
from fnrecipe.transforms import jit
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits, end, rows, start
from tests.ranks import mesh_of, on_ranks
from tests.recipes.test_regression import FILE, TRACED, results, train

UPDATE = adamw(lambda step: torch.tensor(0.1, dtype=torch.float64))
KEY = random.key(2)
NUMBERS: dict[str, Callable[[], torch.Tensor]] = {
    "w": lambda: random.normal(KEY, 64, 16),
    "b": lambda: random.normal(KEY, 3),
}


def state_of(place: Callable[[str, Any], Tree] = lambda path, leaf: leaf) -> State:
    return init_state({name: place(name, make()) for name, make in NUMBERS.items()}, UPDATE, KEY)


def flip(leaf: torch.Tensor, index: int = 1, bit: int = 3) -> None:
    leaf.view(torch.int32).view(-1)[index] ^= 1 << bit


def hashes(rank: int, size: int, config: dict[str, Any], expected: int) -> None:
    mesh = mesh_of(rank, size, num_microbatches=size, **config)
    gang = Gang(rank, size, dist.new_group(backend="gloo"))
    state = state_of(mesh.cut)
    assert hash_of(state, "step 1", gang) == expected


def lies(rank: int, size: int, config: dict[str, Any], liar: int, path: str, named: str) -> None:
    mesh = mesh_of(rank, size, num_microbatches=size, **config)
    gang = Gang(rank, size, dist.new_group(backend="gloo"))
    state = state_of(mesh.cut)
    if rank == liar:
        (local,) = tree.leaves(tree.paths(state, is_shard)[path])
        flip(local)
    with pytest.raises(MachineError, match=rf"step 40: expected the same numbers .* found others on {named}, in {path};"):
        hash_of(state, "step 40", gang)


@pytest.mark.parametrize("config", [{}, {"sharding": "fsdp"}, {"sharding": "zero1", "shard_size": 2}], ids=str)
def test_the_hash_is_that_of_one_process(config: dict[str, Any]) -> None:
    on_ranks(4, hashes, config, hash_of(state_of(), "", Gang()))


@pytest.mark.parametrize(
    ("size", "config", "liar", "path", "named"),
    [
        (3, {}, 2, "params.w", r"rank 2 \(\S+\)"),
        (2, {}, 1, "optimizer.0.mean.b", r"rank 0 \(\S+\) or rank 1 \(\S+\)"),
        (4, {"sharding": "fsdp", "shard_size": 2}, 3, "params.w", r"rank 1 \(\S+\) or rank 3 \(\S+\)"),
    ],
    ids=["of three", "of two", "of two replicas"],
)
def test_a_rank_that_holds_something_else_is_named(size: int, config: dict[str, Any], liar: int, path: str, named: str) -> None:
    if size == 3:
        on_ranks(size, lies_whole, liar, path, named)
    else:
        on_ranks(size, lies, config, liar, path, named)


def lies_whole(rank: int, size: int, liar: int, path: str, named: str) -> None:
    """Of any number of ranks, each of which has all of the state."""
    gang, state = Gang(rank, size, dist.new_group(backend="gloo")), state_of()
    if rank == liar:
        flip(tree.paths(state)[path])
    with pytest.raises(MachineError, match=rf"found others on {named}, in {path};"):
        hash_of(state, "step 40", gang)


def test_another_bit_is_another_hash() -> None:
    state = state_of()
    before = hash_of(state, "", Gang())
    flip(tree.paths(state)["optimizer.0.mean.w"])
    assert hash_of(state, "", Gang()) != before


def test_a_run_records_hashes_and_is_no_other_run(tmp_path: Path) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "out", "regime.hash_every_n_steps=4", "regime.recompute_every_n_steps=3")
    train(tmp_path / "fast", *TRACED, "regime.hash_every_n_steps=4", "regime.recompute_every_n_steps=3")
    found, fast = results(tmp_path / "out"), results(tmp_path / "fast")
    hashed = [json.loads(line) for line in found.pop("metrics/hashes.jsonl").splitlines()]
    assert [row["step"] for row in hashed] == [4, 8, 12, 16, 20]
    assert len({row["hashes/state"] for row in hashed}) == 5
    assert all(0 <= row["hashes/state"] < 1 << 53 for row in hashed)
    assert found == results(tmp_path / "plain")
    assert fast["metrics/hashes.jsonl"] == (tmp_path / "out/metrics/hashes.jsonl").read_bytes()


def squares(params: Tree, batch: torch.Tensor, key: Any) -> Any:
    total = (params["w"].sum(0) * batch).square().sum() + params["b"].sum()
    return total, {"loss": total, "targets": torch.tensor(1)}


@pytest.mark.parametrize("wrap", [lambda step: step, lambda step: jit(step, donate=1)], ids=["eager", "traced"])
def test_a_step_that_is_computed_twice_is_the_step(wrap: Any) -> None:
    plain, twice = wrap(train_step(squares, UPDATE)), recomputed(wrap(train_step(squares, UPDATE)), 2, 0, Gang())
    one, other = state_of(), state_of()
    for number in range(1, 5):
        one, expected = plain(one, torch.ones(16) * number)
        other, found = twice(other, torch.ones(16) * number)
        assert_same_bits((other, found), (one, expected))


def test_a_chip_that_computes_something_else_is_told() -> None:
    calls = iter(range(100))
    step = train_step(squares, UPDATE)

    def lying(state: State, batch: Tree) -> Any:
        state, metrics = step(state, batch)
        if next(calls) == 5:
            flip(state.params["w"])
        return state, metrics

    twice, state = recomputed(lying, 2, 10, Gang()), state_of()
    for _ in range(3):
        state, _ = twice(state, torch.ones(16))
    with pytest.raises(
        MachineError, match=r"step 14: expected the same bits .* found others on rank 0, in \S*params\.w; its chip"
    ):
        twice(state, torch.ones(16))


LIAR = """
import os
import attrs
import torch
from tests.recipes.regression import recipe as regression

def watched(ticks):
    for tick in ticks:
        yield tick
        if tick.number == 7 and os.environ["RANK_OF_LIAR"] == os.environ.get("RANK", "0"):
            tick.state.params["weight"].local.view(torch.int32)[5] ^= 1 << 20

recipe = attrs.evolve(regression, name="liar", observers=lambda config, write: [watched])
"""


@pytest.mark.slow
def test_a_run_of_ranks_ends_with_the_name_of_the_one_that_lies_and_goes_on_from_what_is_sound(tmp_path: Path) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    command = "train", str(tmp_path / "liar.py"), "--out", str(tmp_path / "out"), "--nproc", "4", "--config", *TRACED
    often = "regime.hash_every_n_steps=2", "regime.publish_metrics_every_n_steps=2"
    ended = end(start(*command, *often, env={"RANK_OF_LIAR": "2"}))
    assert ended.status == 1
    (line,) = ended.errors.splitlines()
    assert line.startswith(
        "error: step 8: expected the same numbers on all ranks that hold a copy of them, found others on rank 2"
    )
    assert [row["step"] for row in rows(tmp_path / "out/metrics/hashes.jsonl")] == [2, 4, 6]
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step_00000005"]
    ended = end(start(*command, *often, env={"RANK_OF_LIAR": "none"}))
    assert ended.status == 0, ended.errors
    assert end(start("train", FILE, "--out", str(tmp_path / "one"), "--config", *TRACED, *often)).status == 0
    assert (tmp_path / "out/metrics/hashes.jsonl").read_bytes() == (tmp_path / "one/metrics/hashes.jsonl").read_bytes()
