"""What a config needs at least, against what is really made."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe import random, tree
from fnrecipe.build import init_train_state
from fnrecipe.config import resolve
from fnrecipe.data import LaneAssignment, collate
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.parallel.mesh import Axis, Mesh
from fnrecipe.recipes.lm.config import LMConfig, config, needs
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.recipes.lm.train import recipe
from tests.cli.helpers import python


@st.composite
def llamas(draw: st.DrawFn) -> LlamaConfig:
    groups, per_group, half = (draw(st.integers(1, 3)) for _ in range(3))
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 50)),
        model_dim=2 * groups * per_group * half,
        num_layers=draw(st.integers(1, 3)),
        num_attn_heads=groups * per_group,
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([None, 2, 6])),
        ffn_inner_dim=draw(st.integers(1, 20)),
        tied_embeddings=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=50)
@given(llamas())
def test_parameters_are_counted_as_they_are_made(model: LlamaConfig) -> None:
    made = tree.paths(llama.init(model, random.key(0)))
    vocabulary = sum(leaf.numel() for path, leaf in made.items() if path in ("embedding", "head"))
    assert llama.num_parameters(model) == (vocabulary, sum(leaf.numel() for leaf in made.values()) - vocabulary)


def sizes(changed: LMConfig, ranks: int = 1) -> dict[str, int]:
    """The bytes that each part needs."""
    found = needs(changed, ranks)
    return {part: sum(need.size for need in found if need.part == part) for part in {need.part for need in found}}


def state_size(changed: LMConfig, ranks: int = 1) -> int:
    return sum(need.size for need in needs(changed, ranks) if need.part == "state" and need.what != "activations")


def num_bytes(value: Any) -> int:
    leaves = [leaf for leaf in tree.leaves(value) if leaf.ndim]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["replicate", "zero1", "zero2", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_state_is_counted_as_a_rank_holds_it(dtype: str, sharding: Any, ranks: int) -> None:
    changed, _ = resolve(config, pairs=[f"model.dtype={dtype}", f"gang.sharding={sharding}"])
    cut = 1 if sharding == "replicate" else ranks
    state = init_train_state(
        recipe, changed, Mesh(shard=Axis("shard", cut, 0, blocks=8), sharding=sharding), torch.device("cpu")
    )
    parts = num_bytes(state.params)
    params = parts if sharding == "fsdp" else parts * cut
    gradients = parts if sharding in ("zero2", "fsdp") else parts * cut
    held = params + gradients + num_bytes(state.optimizer)
    assert 0.99 * held <= state_size(changed, ranks) <= held


def test_tensor_parallelism_divides_the_state() -> None:
    changed = attrs.evolve(config, gang=attrs.evolve(config.gang, tensor_parallel_size=2))
    assert state_size(changed, 2) * 2 == state_size(config)


def test_a_batch_takes_at_least_what_is_counted() -> None:
    rows, length = config.dataset.batch_size, config.dataset.max_seq_len
    batch = collate([[]] * rows, length)
    written = sum(array.nbytes for array in (batch.segments, batch.sources, batch.mask))
    assert sizes(config)["batch"] == written
    assert sizes(config, 2)["batch"] * 2 == written


def test_readers_take_at_least_what_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "some words"}) + "\n" for _ in range(300)))
    pairs = [
        f"dataset={{sources: [{{path: {tmp_path / 'a.jsonl'}}}], num_lanes: 8, num_readers: 8, batch_size: 8, max_seq_len: 16}}"
    ]
    changed, _ = resolve(config, pairs=pairs)
    tracemalloc.start()
    try:
        stream = train_stream(changed, LaneAssignment())(None)
        list(islice(stream, 1))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sizes(changed)["stream"] + sizes(changed)["batch"] <= taken


def test_a_worker_takes_at_least_what_is_counted(tmp_path: Path) -> None:
    code = "import numpy, fnrecipe.data; print(open('/proc/self/smaps_rollup').read())"
    facts = dict(line.split(":", 1) for line in python("-c", code, cwd=tmp_path).out.splitlines()[1:] if ":" in line)
    private = sum(int(facts[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))
    changed, _ = resolve(config, pairs=["dataset.num_workers=8"])
    assert sizes(changed)["workers"] / 8 <= private


@pytest.mark.parametrize("frozen", ["model.adapter={name: lora, rank: 1}", "trainer.trains=[layers.0.query]"])
@pytest.mark.parametrize("sharding", ["replicate", "zero2", "fsdp"])
def test_of_frozen_parameters_there_are_no_gradients_and_moments(frozen: str, sharding: str) -> None:
    changed, _ = resolve(config, pairs=[frozen, f"gang.sharding={sharding}"])
    state = init_train_state(recipe, changed, Mesh(), torch.device("cpu"))
    base = {path: leaf for path, leaf in tree.paths(state.params).items() if not path.startswith("adapter.")}
    assert 0.99 * num_bytes(base) <= state_size(changed) <= num_bytes(base)
    assert num_bytes(state.optimizer) < 0.15 * num_bytes(base)
