"""Lists of blocks against the pairs of positions that they stand for, and the train step of a device that has no mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe import tree
from fnrecipe.build import init_train_state, plain_step
from fnrecipe.compiler import trace
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.config import resolve
from fnrecipe.nn import block_mask
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from tests.helpers import packed, pairs

CPU, META = torch.device("cpu"), torch.device("meta")
LISTS = st.integers(1, 21).flatmap(
    lambda n: st.lists(st.lists(st.integers(-1, 4), min_size=n, max_size=n), min_size=1, max_size=2)
)


def pairs_of(counts: Tensor, numbers: Tensor) -> list[tuple[int, int, int]]:
    """(row, block, listed block)."""
    blocks = product(range(counts.shape[0]), range(counts.shape[-1]))
    found = [(r, i, j) for r, i in blocks for j in numbers[r, 0, i, : counts[r, 0, i]].tolist()]
    assert len(set(found)) == len(found)
    return found


def block_pairs(segments: Tensor, size: int) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """(row, block of queries, block of keys), and which of its pairs of positions see each other."""
    length = segments.shape[1]
    sees = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    number = -(-length // size)
    for row, i, j in product(range(len(segments)), range(number), range(number)):
        yield (row, i, j), sees[row, i * size : (i + 1) * size, j * size : (j + 1) * size]


@settings(max_examples=60, deadline=None)
@given(rows=LISTS, size=st.sampled_from([1, 2, 4, 8]), as_packed=st.booleans())
def test_blocks_are_listed_by_what_their_positions_see(rows: list[list[int]], size: int, as_packed: bool) -> None:
    if as_packed:
        rows = [sorted(row, key=lambda number: number if number >= 0 else 9) for row in rows]
    segments = torch.tensor(rows)
    seen = block_mask.block_mask(segments, size)
    part, whole = pairs_of(*seen.keys[:2]), pairs_of(*seen.keys[2:])

    assert not set(part) & set(whole)
    for place, sees in block_pairs(segments, size):
        if place in whole:
            assert sees.all(), place
        elif place not in part:
            assert not sees.any(), place
        elif as_packed:
            assert sees.any(), place
    for of_keys, of_queries in ((part, seen.queries[:2]), (whole, seen.queries[2:])):
        assert sorted((row, j, i) for row, i, j in of_keys) == sorted(pairs_of(*of_queries))


def test_a_row_of_one_document_is_computed_without_looking_at_pairs_but_on_the_diagonal() -> None:
    seen = block_mask.block_mask(torch.zeros(1, 24, dtype=torch.int64), 8)
    assert seen.keys[0].tolist() == [[[1, 1, 1]]]
    assert seen.keys[2].tolist() == [[[0, 1, 2]]]


LENGTH, LEAVES, LAYERS = 300, 2, 2
MODEL = (
    f"{{vocab_size: 264, max_seq_len: {LENGTH}, model_dim: 64, num_layers: {LAYERS}, num_attn_heads: 4, "
    "num_key_value_heads: 2, ffn_inner_dim: 64, tied_embeddings: true}"
)


def step_on(device: torch.device, **changes: Any) -> GraphModule:
    """The traced train step, by shapes alone."""
    values = {"dataset__max_seq_len": LENGTH, "model__config": MODEL, "dataset__batch_size": 4, **changes}
    config = resolve(recipe.config, (), pairs(Path("none.jsonl"), **values))[0]
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    args = init_train_state(recipe, config, mesh, CPU), packed([[]] * 4, LENGTH)
    graph, _ = trace(plain_step(recipe, config, mesh, device), tree.map(lambda x: x.to(device), args), donate=1)
    return graph


def values(graph: GraphModule) -> list[Tensor]:
    return [leaf for node in all_nodes(graph) for leaf in tree.leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def quadratic(graph: GraphModule) -> list[Tensor]:
    """Values with an entry for every pair of positions of a row."""
    return [value for value in values(graph) if sum(size >= LENGTH for size in value.shape[-2:]) == 2]


@pytest.mark.parametrize("mode", ["off", "layerwise"])
def test_the_step_of_a_device_without_a_mask_holds_nothing_for_every_pair_of_positions(mode: str) -> None:
    graph = step_on(META, trainer__dtype="bfloat16", trainer__activation_checkpointing__mode=mode)
    targets = [node.target for node in all_nodes(graph)]
    forward, backward = torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward

    again = 2 if mode == "layerwise" else 1
    assert [targets.count(target) for target in (forward, backward)] == [again * LEAVES * LAYERS, LEAVES * LAYERS]
    assert not quadratic(graph)
    assert not [node for part in graph.modules() for node in part.graph.nodes if isinstance(node.type, str)]
    assert max(value.numel() for value in values(graph) if value.dtype == torch.int32) == 2 * 3 * 3


def test_the_mask_of_the_cpu_would_be_seen_and_whole_rows_need_none() -> None:
    assert quadratic(step_on(CPU))
    assert not quadratic(step_on(CPU, dataset__attention="row"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_kernel_that_reads_the_lists_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's for the CPU: forward alone, without logsumexp, and only where no sizes are kept as symbols."""
    monkeypatch.setitem(block_mask._OPTIONS, "OUTPUT_LOGSUMEXP", False)
    query, key, value = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    segments = torch.stack([torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH) // 140])
    seen = block_mask.block_mask(segments)
    assert pairs_of(*seen.keys[:2])
    assert pairs_of(*seen.keys[2:])

    def function(*args: Tensor) -> Tensor:
        return block_mask.flex_forward(block_mask.block_mask(args[3]), *args[:3])[0]

    args = [query, key, value, segments]
    graph, _ = trace(function, tuple(args))
    expected = graph(*args)
    torch.testing.assert_close(torch._inductor.compile(graph, args)(*args), expected)
