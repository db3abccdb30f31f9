"""How batches come to the device, and when its work is captured."""

from __future__ import annotations

import re
import threading
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from fnrecipe import build, tree
from fnrecipe.build import batches, init_train_state, make_evaluation, make_step, to_device
from fnrecipe.compiler import cuda_graph
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment
from fnrecipe.errors import UsageError
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.recipes.lm.train import recipe
from tests.compiler.test_cuda_graph import Recorder
from tests.helpers import assert_same_bits, pairs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def pinned_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which tensors were pinned, which torch refuses without a GPU."""
    threads: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return threads


def first_batches(texts: Path, device: str, number: int = 3) -> list[Any]:
    config, _ = resolve(recipe.config, (), pairs(texts, dataset__prefetch=2))
    with closing(batches(recipe, config, LaneAssignment(), torch.device(device))(None)) as stream:  # type: ignore[type-var]
        return [next(stream)[0] for _ in range(number)]


def test_batches_for_cuda_are_pinned_where_they_are_read_ahead(texts: Path, pinned_in: list[str]) -> None:
    found = first_batches(texts, "cuda")
    assert set(pinned_in) == {"prefetch"}
    assert len(pinned_in) >= len(tree.leaves(found))
    for batch, other in zip(found, first_batches(texts, "cpu"), strict=True):
        assert all(map(torch.equal, tree.leaves(batch), tree.leaves(other)))


def test_on_the_cpu_nothing_is_pinned_and_nothing_copied(texts: Path, pinned_in: list[str]) -> None:
    for batch in first_batches(texts, "cpu"):
        assert [leaf.data_ptr() for leaf in tree.leaves(to_device(batch, CPU))] == [
            leaf.data_ptr() for leaf in tree.leaves(batch)
        ]
    assert pinned_in == []


@pytest.mark.parametrize("how", ["auto", "trace", "inductor"])
@pytest.mark.parametrize(
    ("device", "mesh", "where"),
    [(CPU, Mesh(), "the device cpu"), (CUDA, Mesh(shard=Axis("shard", 2)), r"several ranks \(2\)")],
)
def test_a_cuda_graph_is_refused_where_there_can_be_none(
    texts: Path, device: torch.device, mesh: Mesh, where: str, how: str
) -> None:
    config, _ = resolve(recipe.config, (), pairs(texts, trainer__cuda_graph="true", trainer__jit=how))
    with pytest.raises(UsageError, match=f"^trainer.cuda_graph: expected auto or false for {where}, found true$"):
        make_step(recipe, config, mesh, device)


@pytest.mark.parametrize(
    ("mesh", "jit", "version", "refused"),
    [
        (Mesh(shard=Axis("shard", 2)), "inductor", "2.11.0", True),
        (Mesh(replica=Axis("replica", 2)), "auto", "2.11.0", True),
        (Mesh(replica=Axis("replica", 2, ordered=False)), "inductor", "2.11.0", False),
        (Mesh(shard=Axis("shard", 2, ordered=False)), "inductor", "2.11.0", True),
        (Mesh(shard=Axis("shard", 2)), "trace", "2.11.0", False),
        (Mesh(shard=Axis("shard", 2)), "inductor", "2.13.0", False),
        (Mesh(), "inductor", "2.11.0", False),
    ],
)
def test_gathers_are_compiled_from_torch_2_13_on(
    texts: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, jit: str, version: str, refused: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    config, _ = resolve(recipe.config, (), pairs(texts, trainer__jit=jit))
    expected = f"trainer.jit: expected trace or off for several ranks (2) under torch {version}, found {jit}"
    for make in (partial(make_step, recipe), partial(make_evaluation, recipe, recipe.evaluations(recipe.config)["valid"])):
        with pytest.raises(UsageError, match=f"^{re.escape(expected)};") if refused else nullcontext():
            make(config, mesh, CUDA)


def test_on_one_gpu_the_step_and_the_evaluation_are_captured_unless_the_config_says_no(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = first_batches(texts, "cpu", 4)

    def train(**changes: Any) -> tuple[Any, Any, Any]:
        config, _ = resolve(recipe.config, (), pairs(texts, trainer__jit="trace", gang__num_microbatches=1, **changes))
        step = make_step(recipe, config, Mesh(), CUDA)
        evaluate = make_evaluation(recipe, recipe.evaluations(recipe.config)["valid"], config, Mesh(), CUDA)
        state = init_train_state(recipe, config, Mesh(), CPU)
        recorders.append(Recorder(tree.leaves(state)))
        metrics = []
        for batch in given:
            state, of_step = step(state, batch)
            metrics.append(of_step)
        return state, metrics, [evaluate(state.params, batch) for batch in given]

    recorders: list[Recorder] = []
    monkeypatch.setattr(build, "cuda_graph", partial(cuda_graph, capture=lambda function: recorders[-1](function)))
    assert_same_bits(train(), train(trainer__cuda_graph="false"))
    assert [(len(recorder.recorded), len(recorder.replayed)) for recorder in recorders] == [(2, 6), (0, 0)]
