"""Adapters: the adapted model is that of the merged weights, and so are its gradients; nothing is computed for the base."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import attrs
import pytest
import torch
from torch import Tensor
from torch.func import grad

from fnrecipe import nn, presets, random, tree
from fnrecipe.compiler import trace
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.config import AdapterSection, ModelSection, TrainerSection
from fnrecipe.errors import UsageError
from fnrecipe.generation.generator import go_on, make_generator
from fnrecipe.generation.sampling import Sampling
from fnrecipe.models import adapter
from fnrecipe.models.adapter import ADAPTER, adapted, merged
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import replicated
from fnrecipe.transforms import gradients, jit
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits, documents, draw, packed

from .families import TINY, random_params, tiny

BATCH = packed([documents(9, 14), documents(24)], 24)
LORA, DORA = (AdapterSection(name, rank=3, alpha=6.0) for name in ("lora", "dora"))


def section(family: str, given: AdapterSection, **sizes: Any) -> ModelSection:
    return ModelSection(family=family, adapter=given, config=tiny(family, **sizes))


def params_of(model: ModelSection, dtype: torch.dtype = torch.float32) -> Tree:
    """Random weights, and an adapter that is far from its beginning: magnitudes about those of the weights' rows."""
    base = random_params(find_model(model.family), model.config)
    begun = adapter.init(model, random.key(1), replicated, lambda: base)
    moved = tree.map(lambda leaf, noise: leaf + 0.2 * noise, begun[ADAPTER], draw(begun[ADAPTER], 3))
    return tree.map(lambda leaf: leaf.to(dtype), {**begun, ADAPTER: moved})


def loss_of(model: ModelSection, policy: Policy = Policy()) -> Any:
    plain = partial(find_model(model.family).apply, model.config, policy=policy, scope="document")
    return next_token_loss(lambda params, *rows: plain(adapted(model.adapter, params, rows[3]), *rows[:3]))


def is_adapter(path: str, parameter: Tensor) -> bool:
    return path.startswith(f"{ADAPTER}.")


@pytest.mark.parametrize("given", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("family", TINY)
def test_it_is_the_model_of_the_merged_weights_in_every_family(family: str, given: AdapterSection) -> None:
    model = section(family, given, num_layers=2)
    params = params_of(model, torch.float64)
    found, _ = loss_of(model)(params, BATCH)
    base, _ = loss_of(model)({**params, ADAPTER: {}}, BATCH)
    whole, _ = loss_of(model)(merged(given, params), BATCH)
    torch.testing.assert_close(found, whole)
    assert abs(found - base) > 1e-3 * base


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule() -> None:
    model = section("llama", LORA)
    params, scale = params_of(model, torch.float64), LORA.scale
    found, _ = gradients(loss_of(model), 1, trains=is_adapter)(params, BATCH, random.key(0))
    slopes = tree.paths(grad(lambda whole: loss_of(model)(whole, BATCH)[0])(merged(LORA, params)))
    leaves = tree.paths(params[ADAPTER])
    expected = {}
    for path, leaf in leaves.items():
        weight, _, part = path.rpartition(".")
        slope = slopes[weight]
        other = leaves[f"{weight}.{'b' if part == 'a' else 'a'}"]
        expected[f"{ADAPTER}.{path}"] = scale * (other.t() @ slope if part == "a" else slope @ other.t())
        assert leaf.shape == expected[f"{ADAPTER}.{path}"].shape
    assert_close(found, expected, 1e-10)


def test_gradients_of_dora_take_the_norms_as_constants() -> None:
    """Beside those of LoRA behind the gain, that of a magnitude is its row's share of the slope along its direction."""
    model = section("llama", DORA)
    params = params_of(model, torch.float64)
    found = gradients(loss_of(model), 1, trains=is_adapter)(params, BATCH, random.key(0))[0]
    slopes = tree.paths(grad(lambda whole: loss_of(model)(whole, BATCH)[0])(merged(DORA, params)))
    leaves, base = tree.paths(params[ADAPTER]), tree.paths({k: v for k, v in params.items() if k != ADAPTER})
    for weight in adapter.targets(model):
        a, b, magnitude = (leaves[f"{weight}.{part}"] for part in ("a", "b", "magnitude"))
        direction = base[weight] + DORA.scale * b @ a
        norm = direction.norm(dim=1, keepdim=True)
        slope = slopes[weight] * (magnitude[:, None] / norm)
        expected = {
            "a": DORA.scale * b.t() @ slope,
            "b": DORA.scale * slope @ a.t(),
            "magnitude": (slopes[weight] * direction / norm).sum(1),
        }
        assert_close({part: found[f"{ADAPTER}.{weight}.{part}"] for part in expected}, expected, 1e-8)


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_as_its_base_in_float32(name: Literal["lora", "dora"], dtype: Literal["float32", "bfloat16"]) -> None:
    model = attrs.evolve(section("llama", AdapterSection(name)), dtype=dtype)
    params = presets.init(model, random.key(0), replicated)
    leaves = tree.paths(params[ADAPTER])
    assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}
    assert all(bool((leaf == 0).all()) for path, leaf in leaves.items() if path.endswith(".b"))
    width = leaves["layers.0.down.a"].shape[1]
    largest = leaves["layers.0.down.a"].abs().max() * width**0.5
    assert 0.95 < largest <= 1, "uniform in ±1/√in"
    base = {key: value for key, value in params.items() if key != ADAPTER}
    assert_same_bits(base, presets.init(attrs.evolve(model, adapter=AdapterSection()), random.key(0), replicated))
    apply = presets.apply(model, TrainerSection(logits_at_once=None), "document")
    logits = [apply(each, BATCH.tokens, BATCH.segments, BATCH.positions) for each in (params, base)]
    torch.testing.assert_close(*logits)
    assert_close(presets.merged(model, params), base, 1e-6 if dtype == "float32" else 1e-2)


def test_targets_choose_matrices_of_layers() -> None:
    some = attrs.evolve(LORA, targets=("layers.*.query", "layers.1.d*"))
    tagged = attrs.evolve(LORA, targets=("@matrices",))
    assert [*adapter.targets(section("llama", tagged))] == [*adapter.targets(section("llama", LORA))]
    assert [*adapter.targets(section("llama", some, num_layers=2))] == ["layers.0.query", "layers.1.query", "layers.1.down"]
    assert len(adapter.targets(section("llama", LORA, num_layers=2))) == 14


@pytest.mark.parametrize("target", ["layers.*.querry", "*.queryy"])
def test_a_target_that_fits_nothing_is_told_before_anything_is_made(target: str) -> None:
    model = section("llama", attrs.evolve(LORA, targets=("layers.*.key", target)))

    def base() -> Tree:
        raise AssertionError

    with pytest.raises(UsageError) as caught:
        adapter.init(model, random.key(0), replicated, base)
    begin = "model.adapter.targets: expected patterns of matrices of layers, found "
    assert str(caught.value) == f"{begin}{target!r}; did you mean layers.*.query?"


@pytest.mark.parametrize("target", ["embedding", "norm", "layers.*.attention_norm"])
def test_what_is_no_matrix_of_a_layer_has_no_adapter(target: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.adapter\.targets: expected patterns of matrices of layers, found "):
        adapter.targets(section("llama", attrs.evolve(LORA, targets=(target,))))


def test_generation_with_a_cache_is_that_of_the_merged_weights() -> None:
    model = section("llama", DORA)
    params, cached = params_of(model), find_model("llama").cached
    made = make_generator(cached, model.config, Sampling(temperature=0.0), context=32, vocab_size=64, dtype=torch.float32)
    given = (adapted(DORA, params), merged(DORA, params))
    ours, theirs = (go_on(made, each, [5, 17, 20], random.key(0), 12) for each in given)
    assert ours == theirs


def test_flops_are_those_of_the_products_that_are_computed() -> None:
    """Six for each parameter that is trained; four for a frozen one, whose own gradient nobody needs."""
    model = section("llama", LORA, num_layers=2)
    frozen = {
        path: leaf for path, leaf in tree.paths(random_params(find_model("llama"), model.config)).items() if leaf.ndim == 2
    }
    whole = presets.flops(attrs.evolve(model, adapter=AdapterSection()), 24)
    found = presets.flops(model, 24)
    assert whole is not None
    assert found is not None
    trained = tree.leaves(params_of(model)[ADAPTER])
    products = sum(leaf.numel() for leaf in frozen.values())
    assert "head" not in frozen, "the embedding is the head"
    for ours, theirs in ((found.full, whole.full), (found.causal, whole.causal)):
        assert ours == theirs - 2 * products + 6 * sum(leaf.numel() for leaf in trained)


def test_a_frozen_base_is_not_widened() -> None:
    """Of a base in bfloat16 no float32 copy is made before the layers: each weight is rounded where it is used."""
    model = attrs.evolve(section("llama", LORA), dtype="bfloat16")
    params = presets.init(model, random.key(0), replicated)
    function = gradients(loss_of(model, Policy(torch.bfloat16)), 1, trains=is_adapter)
    graph, _ = trace(function, (params, BATCH, random.key(0)))
    wide = [node.meta["val"] for node in all_nodes(graph) if "_to_copy" in str(node.target)]
    shapes = {leaf.shape for path, leaf in tree.paths(params).items() if leaf.ndim == 2 and not is_adapter(path, leaf)}
    assert not [value for value in wide if value.dtype == torch.float32 and value.shape in shapes]


# Dropout.

DROPPING = attrs.evolve(LORA, dropout=0.3)


def test_a_multiplies_what_dropout_leaves_and_the_base_all() -> None:
    """As in peft; the mask is what a product with zeros as the base, and units as the adapter, leaves of ones."""
    x, weight, (a, b) = (
        draw(torch.empty(2, 5, 8), 1),
        draw(torch.empty(6, 8), 2),
        (draw(torch.empty(3, 8), 3), draw(torch.empty(6, 3), 4)),
    )
    key = random.key(7)

    def product(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return nn.linear(x, nn.Adapted(base, a, b, (), key, scale, 0.3))

    mask = product(torch.ones(2, 5, 8), torch.zeros(8, 8), torch.eye(8), torch.eye(8), 1.0)
    rate = int(0.3 * 2**16) / 2**16
    assert {round(float(each), 5) for each in mask.unique()} == {0.0, round(1 / (1 - rate), 5)}
    assert_close(product(x, weight, a, b, 2.0), x @ weight.t() + 2 * (x * mask) @ a.t() @ b.t(), 1e-5)


def test_each_weight_drops_by_a_key_of_its_own_that_its_path_and_the_loss_give() -> None:
    model = section("llama", DROPPING, num_layers=2)
    params = params_of(model)
    layers = [adapted(DROPPING, params, random.key(seed))["layers"] for seed in (5, 5, 6)]
    keys = [[tuple(layer[name].key.tolist()) for layer in each.values() for name in ("query", "down")] for each in layers]
    assert keys[0] == keys[1]
    assert len({*keys[0], *keys[2]}) == 8


@pytest.mark.parametrize(
    "policy", [Policy(), Policy(remat="selective"), Policy(remat="layerwise")], ids=["off", "selective", "layerwise"]
)
def test_a_step_drops_the_same_whatever_is_computed_again(policy: Policy) -> None:
    """By the gradient of the function as it is, against that of its trace with what is recomputed in it."""
    model = section("llama", DROPPING, num_layers=2)
    params = params_of(model)
    expected, sums = gradients(loss_of(model), 2, trains=is_adapter)(params, BATCH, random.key(0))
    found, others = jit(gradients(loss_of(model, policy), 2, trains=is_adapter))(params, BATCH, random.key(0))
    assert_close(found, expected, 1e-5)
    torch.testing.assert_close(others["loss"], sums["loss"])
    other = gradients(loss_of(model), 2, trains=is_adapter)(params, BATCH, random.key(1))[1]
    assert other["loss"] != sums["loss"]


def test_without_a_key_or_a_rate_nothing_is_dropped_nor_drawn() -> None:
    model, still = section("llama", DROPPING), section("llama", LORA)
    params = params_of(model)
    applied = [presets.apply(each, TrainerSection(logits_at_once=None), "document") for each in (model, still)]
    rows = BATCH.tokens, BATCH.segments, BATCH.positions
    assert_same_bits(applied[0](params, *rows), applied[1](params, *rows, random.key(0)))
    draws = [
        [node for node in all_nodes(trace(apply, (params, *rows, random.key(0)))[0]) if "bitwise_xor" in str(node.target)]
        for apply in applied
    ]
    assert draws[0]
    assert not draws[1]
