"""Llama against Hugging Face's, and its own laws of packing and initialization."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.func import grad
from torch.fx import Node

from fnrecipe import random, tree
from fnrecipe.compiler import trace
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.data import Batch
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.models.parameters import shapes
from fnrecipe.nn.policy import Policy
from fnrecipe.tree import Tree
from tests.helpers import TINY, assert_close, documents, draw, packed

MODULES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
WRITERS = ("output", "down")


def their_name(path: str) -> str:
    if path in OUTSIDE:
        return OUTSIDE[path]
    _, layer, name = path.split(".")
    return f"model.layers.{layer}.{MODULES[name]}.weight"


def reference(config: LlamaConfig, params: Tree, dtype: torch.dtype, kernel: str) -> transformers.LlamaForCausalLM:
    """Hugging Face's model with our weights."""
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.model_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attn_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_inner_dim,
        tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation=kernel,
    )
    model = transformers.LlamaForCausalLM(theirs).to(dtype)
    weights = {their_name(path): leaf for path, leaf in tree.paths(params).items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert unknown == []
    assert missing == (["lm_head.weight"] if config.tied_embeddings else [])
    return model


def without_float32_norms(model: transformers.LlamaForCausalLM, eps: float) -> None:
    """Puts torch's norms in the place of Hugging Face's, which compute in float32 whatever they are given."""
    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":
            ours = torch.nn.RMSNorm(norm.weight.shape, eps, dtype=norm.weight.dtype)
            ours.weight = norm.weight
            model.set_submodule(name, ours)


def random_params(config: LlamaConfig, dtype: torch.dtype) -> Tree:
    """Weights large enough that attention is far from uniform, and norms are not all 1."""
    like = llama.init(config, random.key(0))
    return tree.map(lambda leaf, noise: (leaf + 0.2 * noise).to(dtype), like, draw(like, seed=1))


def summed_nats(config: LlamaConfig, params: Tree, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    segments, positions = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = llama.apply(config, params, tokens, segments, positions)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("groups", "head_dim"), [(4, None), (2, None), (1, None), (2, 4), (4, 16)])
@pytest.mark.parametrize(
    ("dtype", "kernel", "tolerance"), [(torch.float32, "eager", 1e-4), (torch.float64, "sdpa", 1e-10)], ids=["single", "double"]
)
def test_logits_and_every_gradient_are_hugging_faces(
    groups: int, head_dim: int | None, tied: bool, dtype: torch.dtype, kernel: str, tolerance: float
) -> None:
    # The roots of 256 that rotary positions take are exact, so both models have the same frequencies.
    sizes = {"num_key_value_heads": groups, "head_dim": head_dim, "tied_embeddings": tied}
    config = attrs.evolve(TINY, **sizes, rope_theta=256.0, norm_eps=1e-3)
    params = random_params(config, dtype)
    model = reference(config, params, dtype, kernel)
    if dtype == torch.float64:
        without_float32_norms(model, config.norm_eps)
    tokens, targets = torch.randint(0, config.vocab_size, (2, 3, 24), generator=torch.Generator().manual_seed(0))

    gradients, logits = grad(partial(summed_nats, config), has_aux=True)(params, tokens, targets)

    expected = model(input_ids=tokens).logits
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert_close(logits, expected.detach(), tolerance)
    theirs = {path: model.get_parameter(their_name(path)).grad for path in tree.paths(params)}
    assert_close(tree.paths(gradients), theirs, tolerance)


def apply_packed(params: Tree, batch: Batch) -> Tensor:
    return llama.apply(TINY, params, batch.tokens, batch.segments, batch.positions)


LOSS = next_token_loss(partial(llama.apply, TINY))


def test_the_logits_of_a_packed_row_are_those_of_each_document_alone() -> None:
    params, row = random_params(TINY, torch.float32), documents(5, 9, 1, 12)
    together = apply_packed(params, packed([row], 32))[0]
    start = 0
    for document in row:
        alone = apply_packed(params, packed([[document]], len(document) - 1))[0]
        stop = start + len(alone)
        assert_close(together[start:stop], alone, 1e-5)
        start = stop


def test_the_gradient_of_a_packed_batch_is_the_sum_of_its_documents() -> None:
    params, all_documents = random_params(TINY, torch.float32), documents(5, 9, 1, 12, 7, 20)
    together, sums = grad(LOSS, has_aux=True)(params, packed([all_documents[:4], all_documents[4:]], 32))
    alone = [grad(LOSS, has_aux=True)(params, packed([[d]], len(d) - 1)) for d in all_documents]
    assert_close(together, tree.map(lambda *parts: sum(parts), *(part for part, _ in alone)), 1e-5)
    assert sums["targets"] == sum(part["targets"] for _, part in alone) == 54


def test_a_row_seen_as_a_whole_is_one_document_with_padding_behind_it() -> None:
    params, documents_of_row = random_params(TINY, torch.float32), documents(5, 9, 1)
    rows = packed([documents_of_row], 24)
    ids = torch.cat([rows.tokens[rows.mask], rows.tokens[:1, :1].flatten()])
    alone = packed([[ids.numpy()]], 24)
    loss = next_token_loss(partial(llama.apply, TINY, scope="row"))

    found, expected = (
        grad(f, has_aux=True)(params, attrs.evolve(rows, segments=s, positions=p))
        for f, s, p in (
            (loss, rows.segments, rows.positions),
            (LOSS, alone.segments, alone.positions),
        )
    )
    assert_close(found, expected, 1e-5)


def test_padding_changes_nothing() -> None:
    params, batch = random_params(TINY, torch.float32), packed([documents(5, 9), documents(20)], 24)
    noise = torch.randint(1, 64, (2, *batch.tokens.shape), generator=torch.Generator().manual_seed(0))
    tokens, targets = (torch.where(batch.mask, x, n) for x, n in zip((batch.tokens, batch.targets), noise, strict=True))
    noisy = attrs.evolve(batch, tokens=tokens, targets=targets)
    assert not torch.equal(noisy.tokens, batch.tokens)
    assert torch.equal(apply_packed(params, noisy)[batch.mask], apply_packed(params, batch)[batch.mask])
    found, expected = (grad(LOSS, has_aux=True)(params, b) for b in (noisy, batch))
    assert_close(found, expected, 0.0)


def test_a_row_of_padding_adds_nothing_and_stays_finite() -> None:
    params, row = random_params(TINY, torch.float32), documents(5, 9)
    with_padding, sums = grad(LOSS, has_aux=True)(params, packed([row, []], 24))
    without, _ = grad(LOSS, has_aux=True)(params, packed([row], 24))
    assert_close(with_padding, without, 1e-6)
    assert sums["targets"] == 14


def leaf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tree.paths(llama.init(config, random.key(0))).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shapes_are_those_of_the_parameters_and_of_hugging_face(tied: bool) -> None:
    config = attrs.evolve(TINY, tied_embeddings=tied)
    params = llama.init(config, random.key(0))
    found = leaf_shapes(config)
    model = reference(config, params, torch.float32, "eager")
    assert found == {path: tuple(model.get_parameter(their_name(path)).shape) for path in found}

    def declared(path: str) -> tuple[int, ...]:
        node = shapes(llama.parameters(config), config.num_layers)
        for name in path.split("."):
            node = node[name]
        return node

    assert found == {path: declared(path) for path in found}


def test_init_has_norms_of_one_and_the_standard_deviations_of_the_config() -> None:
    config = attrs.evolve(TINY, init_std=0.3, vocab_size=264)
    for path, leaf in tree.paths(llama.init(config, random.key(7))).items():
        if leaf.ndim == 1:
            assert torch.equal(leaf, torch.ones_like(leaf))
        else:
            std = 0.3 / 2 if path.endswith(WRITERS) else 0.3  # sqrt(2 * 2 layers) = 2
            slack = 5 / leaf.numel() ** 0.5
            assert abs(leaf.mean() / std) < slack, path
            assert abs(leaf.std() / std - 1) < slack, path


def test_a_leaf_of_init_depends_on_the_key_and_its_path_alone() -> None:
    two, three = (tree.paths(llama.init(attrs.evolve(TINY, num_layers=n), random.key(0))) for n in (2, 3))
    for path, leaf in two.items():
        if path.endswith(WRITERS):
            assert_close(three[path], leaf * (2 / 3) ** 0.5, 1e-6)
        else:
            assert torch.equal(three[path], leaf), path


def test_another_key_changes_every_matrix_and_no_two_matrices_are_equal() -> None:
    config = attrs.evolve(TINY, tied_embeddings=False)
    found = [tree.paths(llama.init(config, random.key(seed))) for seed in (0, 1)]
    matrices = [leaf.flatten()[:100] for params in found for leaf in params.values() if leaf.ndim > 1]
    assert len({tuple(matrix.sign().tolist()) for matrix in matrices}) == len(matrices) == 2 * (2 + 7 * 2)


ONE_ROW = packed([documents(5, 9)], 24)
REMATS = (Policy(remat="selective"), Policy(remat="layerwise"), Policy(remat="layerwise", every_nth_layer=2))


def traced_gradient(policy: Policy) -> list[Node]:
    """The nodes of the traced gradient of the loss on one row, computed like `policy`."""
    loss = next_token_loss(partial(llama.apply, TINY, policy=policy))
    traced, _ = trace(grad(loss, has_aux=True), (random_params(TINY, torch.float32), ONE_ROW))
    return list(all_nodes(traced))


@pytest.mark.parametrize("policy", REMATS, ids=lambda policy: f"{policy.remat}{policy.every_nth_layer}")
def test_what_is_computed_again_changes_nothing_but_the_order_of_sums(policy: Policy) -> None:
    params = random_params(TINY, torch.float32)
    found, expected = (
        grad(next_token_loss(partial(llama.apply, TINY, policy=h)), has_aux=True)(params, ONE_ROW) for h in (policy, Policy())
    )
    assert_close(found, expected, 0.0 if policy.remat == "layerwise" else 1e-6)


def test_products_and_attention_are_computed_again_by_whole_layers_only() -> None:
    def number(policy: Policy, name: str) -> int:
        return sum(name in str(node.target) for node in traced_gradient(policy))

    layers = TINY.num_layers
    off, selective, layerwise, second = ([number(h, "aten.mm"), number(h, "attention")] for h in (Policy(), *REMATS))
    assert selective == off
    assert layerwise == [off[0] + 6 * layers, off[1] + layers]  # all but the last product of each, which nobody wants
    assert second == [off[0] + 6 * (layers // 2), off[1] + layers // 2]


def test_half_precision_multiplies_in_half_and_stays_near_single_precision() -> None:
    policy = Policy(dtype=torch.bfloat16, logits_at_once=7)
    products = [node for node in traced_gradient(policy) if "aten.mm" in str(node.target)]
    assert products
    assert all(source.meta["val"].dtype == torch.bfloat16 for node in products for source in node.all_input_nodes)

    params = random_params(TINY, torch.float32)
    (half, sums), (single, expected) = (
        grad(next_token_loss(partial(llama.apply, TINY, policy=h)), has_aux=True)(params, ONE_ROW) for h in (policy, Policy())
    )
    assert {leaf.dtype for leaf in tree.leaves(half)} == {torch.float32}
    torch.testing.assert_close(sums["loss"], expected["loss"], rtol=0.02, atol=0)
    for path, leaf in tree.paths(half).items():
        other = tree.paths(single)[path]
        assert F.cosine_similarity(leaf.flatten(), other.flatten(), 0) > 0.99, path
