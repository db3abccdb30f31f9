"""The train step of a GPU by shapes alone: which kernels attend within documents, and what is kept of the mask."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fnrecipe import tree
from fnrecipe.build import init_train_state, plain_step
from fnrecipe.compiler import trace
from fnrecipe.compiler.cost import operation_costs
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.config import resolve
from fnrecipe.nn import cudnn_attention
from fnrecipe.nn.attention import formula
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from tests.helpers import packed, pairs

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTH, LEAVES, LAYERS, ROWS, LIMIT = 300, 2, 2, 4, 8
KERNELS = {
    "flash": ("aten._flash_attention_forward.default", "fnrecipe.flash_attention_backward.default"),
    "cudnn": ("fnrecipe.cudnn_attention.default", "fnrecipe.cudnn_attention_backward.default"),
    "efficient": ("aten._efficient_attention_forward.default", "fnrecipe.efficient_attention_backward.default"),
}
MODEL = (
    f"{{vocab_size: 264, max_seq_len: {LENGTH}, model_dim: 64, num_layers: {LAYERS}, num_attn_heads: 4, "
    "num_key_value_heads: 2, ffn_inner_dim: 64, tied_embeddings: true}"
)


def step_on(device: torch.device, **changes: Any) -> GraphModule:
    """The traced train step, by shapes alone."""
    values = {"dataset__max_seq_len": LENGTH, "model__config": MODEL, "dataset__batch_size": ROWS, **changes}
    config = resolve(recipe.config, (), pairs(Path("none.jsonl"), **values))[0]
    mesh = make_mesh(config.gang, Gang(), device, recipe.rules(config))
    args = init_train_state(recipe, config, mesh, CPU), packed([[]] * ROWS, LENGTH)
    graph, _ = trace(plain_step(recipe, config, mesh, device), tree.map(lambda x: x.to(device), args), donate=1)
    return graph


def values(graph: GraphModule) -> list[Tensor]:
    return [leaf for node in all_nodes(graph) for leaf in tree.leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def quadratic(graph: GraphModule) -> list[Tensor]:
    """Values with an entry for every pair of positions of a row."""
    return [value for value in values(graph) if sum(size >= LENGTH for size in value.shape[-2:]) == 2]


@pytest.mark.parametrize("mode", ["off", "layerwise"])
@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "flash"), ("bfloat16", "cudnn"), ("float32", "efficient")])
def test_the_step_of_a_gpu_runs_ragged_kernels_and_holds_nothing_for_every_pair_of_positions(
    dtype: str, kernel: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn_attention, "is_supported", lambda *_: kernel == "cudnn")
    graph = step_on(META, trainer__dtype=dtype, trainer__activation_checkpointing__mode=mode)
    targets = Counter(str(node.target) for node in all_nodes(graph))
    forward, backward = (targets[name] for name in KERNELS[kernel])

    assert (forward, backward) == ((2 if mode == "layerwise" else 1) * LEAVES * LAYERS, LEAVES * LAYERS)
    costs = operation_costs(graph)
    products = 2 * (2 * forward + 5 * backward) * (ROWS // LEAVES) * LENGTH * LENGTH * 64
    assert sum(costs[name.removesuffix(".default")].flops for name in KERNELS[kernel]) == products
    assert not quadratic(graph)
    documents = ROWS // LEAVES * LIMIT
    lengths = {documents} if kernel == "cudnn" else set()
    assert {value.numel() for value in values(graph) if value.dtype == torch.int32} == {documents + 1} | lengths


def test_the_step_of_a_cpu_holds_nothing_for_every_pair_either_and_the_formula_would_be_seen() -> None:
    assert not quadratic(step_on(CPU))
    assert not quadratic(step_on(CPU, dataset__attention="row"))
    inputs = torch.randn(3, 1, 1, LENGTH, 8)
    assert quadratic(trace(lambda *given: formula(*given, scale=1.0), (*inputs, torch.ones(LENGTH, LENGTH) > 0))[0])
