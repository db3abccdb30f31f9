"""The traced step as code that runs, and without the memory that a run of it takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fnrecipe import tree
from fnrecipe.build import init_train_state, plain_step
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.inspect.graph import source, trace_step
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import make_mesh
from tests.helpers import assert_same_bits, documents, packed, pairs

CPU = torch.device("cpu")


def configured(**changes: Any) -> Any:
    return resolve(recipe.config, (), pairs(Path("none.jsonl"), **changes))[0]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("step", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_does_what_the_step_does(tmp_path: Path) -> None:
    config = configured()
    path = tmp_path / "step.py"
    path.write_text(source(recipe, trace_step(recipe, config, CPU)))
    mesh = make_mesh(config.gang, Gang(), CPU, recipe.rules(config))
    state = init_train_state(recipe, config, mesh, CPU)
    batch = packed([[ids] for ids in documents(*[32, 31, 9, 32, 32, 30, 32, 32])], 32)
    expected = plain_step(recipe, config, mesh, CPU)(state, batch)

    found = load(path).Step()(*tree.leaves((state, batch)))

    assert_same_bits(tree.like(expected, found), expected)


def test_inputs_have_their_names_and_values_their_shapes() -> None:
    lines = source(recipe, trace_step(recipe, configured(), CPU)).splitlines()
    assert '            state_params_layers_1_key: "f32[16, 32]",' in lines
    assert '            batch_tokens: "i64[8, 32]",' in lines
    assert any(line.lstrip().startswith('mm: "f32[') for line in lines)


def test_a_model_that_fits_nowhere_is_traced() -> None:
    model = "{vocab_size: 1000000, model_dim: 65536, num_layers: 1, num_attn_heads: 8, num_key_value_heads: 8}"
    config = configured(model__config=model, gang__num_microbatches=1)
    graph = trace_step(recipe, config, CPU)
    (embedding,) = [node for node in graph.graph.nodes if node.name == "state_params_embedding"]
    assert embedding.meta["val"].shape == (1_000_000, 65536)  # 262 GB


def test_what_needs_several_processes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"world size: expected a multiple of gang.tensor_parallel_size = 2"):
        trace_step(recipe, configured(gang__tensor_parallel_size=2), CPU)


def test_the_gradients_of_leaves_are_added_into_each_other() -> None:
    graph = trace_step(recipe, configured(gang__num_microbatches=4), CPU)
    shape = graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape
    targets = [str(node.target) for node in graph.graph.nodes if getattr(node.meta.get("val"), "shape", None) == shape]
    assert targets.count("aten.add_.Tensor") == 3
    assert not {"aten.add.Tensor", "aten.clone.default"} & set(targets)
