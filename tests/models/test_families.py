"""Every family against transformers, and under what a policy or a mesh makes of it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value

from fnrecipe import nn, random, tree
from fnrecipe.compiler import trace
from fnrecipe.compiler.regions import all_nodes
from fnrecipe.config.find import known
from fnrecipe.config.patterns import tag
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.models import decoder
from fnrecipe.models.gemma2 import model as gemma2
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.models.rope import Rope
from fnrecipe.nn.policy import Policy
from fnrecipe.tree import Tree
from tests.helpers import assert_close, documents, packed

from .families import TINY, places, random_params, reference, taken, tiny

DOCUMENT = (Path(__file__).parents[2] / "docs/models.md").read_text()
BATCH = packed([documents(9, 14), documents(24)], 24)


def apply(family: str, config: Any, **options: Any) -> Any:
    return partial(find_model(family).apply, config, **{"policy": Policy(), "scope": "document", **options})


def summed_nats(function: Any, params: Tree, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    segments, positions = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = function(params, tokens, segments, positions)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), logits


def assert_gradients_close(found: Tree, expected: Tree, tolerance: float) -> None:
    """But for leaves whose gradient is nothing but rounding, as that of a key bias is where positions are not rotated."""
    largest = max(leaf.abs().max() for leaf in tree.leaves(expected))
    others = tree.paths(expected)
    kept = {path: leaf for path, leaf in tree.paths(found).items() if others[path].abs().max() > 1e-6 * largest}
    assert {path.rpartition(".")[2] for path in others.keys() - kept.keys()} <= {"key_bias"}
    assert all(tree.paths(found)[path].abs().max() <= 1e-6 * largest for path in others.keys() - kept.keys())
    assert_close(kept, {path: others[path] for path in kept}, tolerance)


def assert_is_transformers(family: str, config: Any) -> None:
    """Logits, loss and every gradient."""
    model = find_model(family)
    params = random_params(model, config)
    theirs = reference(model, config, params)
    tokens, targets = torch.randint(0, config.vocab_size, (2, 2, 24), generator=torch.Generator().manual_seed(0))
    gradients, logits = grad(partial(summed_nats, apply(family, config)), has_aux=True)(params, tokens, targets)
    expected = theirs(input_ids=tokens).logits
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert_close(logits, expected.detach(), 1e-4)
    found = places(model, config, params)
    slopes = {path: taken(place, theirs.get_parameter(name).grad) for path, (place, name) in found.items()}
    assert_gradients_close(tree.paths(gradients), slopes, 2e-4)


def test_every_family_is_tested() -> None:
    assert sorted(TINY) == known(FAMILIES)


@pytest.mark.parametrize("family", TINY)
def test_tags_are_the_kinds_of_modules_in_transformers(family: str) -> None:
    config, model = tiny(family), find_model(family)
    params = random_params(model, config)
    theirs = reference(model, config, params)
    for path, (_, name) in places(model, config, params).items():
        module, _, kind = name.rpartition(".")
        of_module = type(theirs.get_submodule(module)).__name__
        if kind == "bias":
            expected = "@biases"
        elif module == "lm_head":
            expected = "@head"
        else:
            kinds = {"Norm": "@norms", "Embedding": "@embedding", "Linear": "@matrices", "Conv1D": "@matrices"}
            expected = kinds[re.sub(".*(?=(Norm|Embedding)$)", "", of_module)]
        assert tag(path, tree.paths(params)[path].ndim) == expected, path


@pytest.mark.parametrize("family", TINY)
def test_logits_and_every_gradient_are_transformers(family: str) -> None:
    assert_is_transformers(family, tiny(family))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", TINY)
def test_the_tree_has_the_parameters_that_are_counted_and_stored(family: str, tied: bool) -> None:
    model, config = find_model(family), tiny(family, tied_embeddings=tied)
    params = model.init(config, random.key(0), lambda path, leaf: leaf)
    sizes = {path: leaf.numel() for path, leaf in tree.paths(params).items()}
    vocabulary = sum(size for path, size in sizes.items() if path in ("embedding", "head"))
    assert model.parameters is not None
    assert model.parameters(config) == (vocabulary, sum(sizes.values()) - vocabulary)
    assert model.hugging_face is not None
    assert {path.replace("layers.0.", "layers.*.") for path in sizes if "layers." not in path or "layers.0." in path} == set(
        model.hugging_face.tensors(config)
    )
    assert ("head" in sizes) is not tied


@pytest.mark.parametrize("family", TINY)
def test_two_documents_in_a_row_are_as_each_alone(family: str) -> None:
    config = tiny(family)
    params = random_params(find_model(family), config)
    loss = next_token_loss(apply(family, config))
    (one, two), other = documents(9, 14), documents(24)[0]
    together = grad(loss, has_aux=True)(params, BATCH)[0]
    alone = [grad(loss, has_aux=True)(params, packed([[ids]], len(ids) - 1))[0] for ids in (one, two, other)]
    assert_gradients_close(together, tree.map(lambda *parts: sum(parts), *alone), 1e-4)


@pytest.mark.parametrize("policy", [Policy(remat="selective"), Policy(remat="layerwise"), Policy(logits_at_once=16)])
@pytest.mark.parametrize("family", TINY)
def test_a_policy_changes_memory_and_no_gradient(family: str, policy: Policy) -> None:
    config = tiny(family)
    params = random_params(find_model(family), config)
    found, expected = (
        grad_and_value(next_token_loss(apply(family, config, policy=p)), has_aux=True)(params, BATCH)
        for p in (policy, Policy())
    )
    assert_gradients_close(found[0], expected[0], 1e-5)
    assert found[1][0].item() == pytest.approx(expected[1][0].item(), rel=1e-6)


def products(family: str, remat: Any) -> list[torch.dtype]:
    """The dtypes of the matrix products in the traced gradient of a model that is computed in bfloat16."""
    config = tiny(family, num_layers=1)
    params = find_model(family).init(config, random.key(0), lambda path, leaf: leaf)
    loss = next_token_loss(apply(family, config, policy=Policy(torch.bfloat16, remat)))
    graph, _ = trace(grad(loss, has_aux=True), (params, BATCH))
    nodes = [node for node in all_nodes(graph) if str(node.target).startswith(("aten.mm", "aten.addmm"))]
    return [node.meta["val"].dtype for node in nodes]


@pytest.mark.parametrize("family", TINY)
def test_all_products_are_in_the_dtype_of_the_policy_and_selective_recomputation_repeats_none(family: str) -> None:
    expected = products(family, "off")
    assert set(expected) == {torch.bfloat16}
    assert len(expected) >= 3 * 6
    assert products(family, "selective") == expected


@pytest.mark.parametrize("family", TINY)
def test_a_row_seen_as_a_whole_has_positions_of_its_own(family: str) -> None:
    config = tiny(family)
    params = random_params(find_model(family), config)
    whole = apply(family, config, scope="row")(params, BATCH.tokens, BATCH.segments, BATCH.positions)
    positions = torch.arange(24).expand_as(BATCH.tokens)
    assert_close(whole, apply(family, config)(params, BATCH.tokens, torch.zeros_like(positions), positions), 1e-5)


@pytest.mark.parametrize(("window", "masks"), [(5, 2), (23, 2), (24, 1)])
def test_layers_of_a_kind_share_a_mask(window: int, masks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(decoder, "attention_mask", lambda *args: made.append(args) or nn.attention_mask(*args))
    config = tiny("olmo3", sliding_window=window)
    params = random_params(find_model("olmo3"), config)
    apply("olmo3", config)(params, BATCH.tokens, BATCH.segments, BATCH.positions)
    assert len(made) == masks


@pytest.mark.parametrize("window", [1, 2, 23, 24, 40, None])
def test_a_window_is_of_the_positions_that_transformers_means(window: int | None) -> None:
    model, config = find_model("mistral"), tiny("mistral", sliding_window=window)
    params, tokens = random_params(model, config), BATCH.tokens[1:]
    theirs = reference(model, config, params)
    found = apply("mistral", config)(params, tokens, torch.zeros_like(tokens), torch.arange(24)[None])
    assert_close(found, theirs(input_ids=tokens).logits.detach(), 1e-4)


@pytest.mark.parametrize("family", TINY)
def test_flops_are_those_of_the_products_and_of_what_each_position_sees(family: str) -> None:
    """6 for each entry of a matrix that is multiplied by, 12 for each number of a head and position seen, of itself half."""
    config, length = tiny(family), 24
    model = find_model(family)
    params = tree.paths(model.init(config, random.key(0), lambda path, leaf: leaf))
    looked_up = {"positions"} | (set() if config.tied_embeddings else {"embedding"})
    products = 6 * sum(leaf.numel() for path, leaf in params.items() if leaf.ndim == 2 and path not in looked_up)
    windows = [length if window is None else min(window, length) for window in WINDOWS.get(family, (None,) * 3)]
    width = config.num_attn_heads * config.head_width
    seen = sum(min(position, window) for window in windows for position in range(1, length + 1))
    assert model.flops is not None
    found = model.flops(config, length)
    assert found.full == products + 12 * width * sum(windows)
    assert found.causal == pytest.approx(products + 12 * width * (seen - sum(windows) / 2) / length, rel=1e-6)


WINDOWS: dict[str, tuple[int | None, ...]] = {
    "gemma2": (5, None, 5),
    "gemma3": (5, None, 5),
    "mistral": (5, 5, 5),
    "olmo3": (5, 5, None),
}
"""Of each layer of the tiny models; of those that are not here, none has one."""

PUBLISHED = {
    "gemma2": {"gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984},
    "gemma3": {"gemma3_270m": 268_098_176, "gemma3_1b": 999_885_952},
    "gpt2": {
        "gpt2": 124_439_808,
        "gpt2_medium": 354_823_168,
        "gpt2_large": 774_030_080,
        "gpt2_xl": 1_557_611_200,
    },
    "mistral": {"mistral_7b_v0_1": 7_241_732_096, "mistral_7b_v0_3": 7_248_023_552},
    "qwen2": {
        "qwen2_5_0_5b": 494_032_768,
        "qwen2_5_1_5b": 1_543_714_304,
        "qwen2_5_3b": 3_085_938_688,
        "qwen2_5_7b": 7_615_616_512,
    },
    "qwen3": {
        "qwen3_0_6b": 596_049_920,
        "qwen3_1_7b": 1_720_574_976,
        "qwen3_4b": 4_022_468_096,
        "qwen3_8b": 8_190_735_360,
    },
    "olmo2": {"olmo2_1b": 1_484_916_736, "olmo2_7b": 7_298_617_344, "olmo2_13b": 13_716_198_400},
    "olmo3": {"olmo3_7b": 7_298_011_136, "olmo3_32b": 32_233_522_176},
    "smollm3": {"smollm3_3b": 3_075_098_624},
}
"""Parameters, as they were published."""


@pytest.mark.parametrize(("family", "arch"), [(family, arch) for family in PUBLISHED for arch in PUBLISHED[family]])
def test_an_arch_has_the_parameters_that_were_published(family: str, arch: str) -> None:
    model = find_model(family)
    assert model.parameters is not None
    assert sum(model.parameters(model.archs[arch])) == PUBLISHED[family][arch]
    assert sorted(PUBLISHED[family]) == sorted(model.archs)


@pytest.mark.parametrize(("arch", "name"), [("llama3_2_1b", "llama"), ("llama3_1_8b", "llama"), ("olmo3_7b", "olmo3")])
def test_scaled_frequencies_are_transformers(arch: str, name: str) -> None:
    """Of the published shapes, whose longest waves are far longer than a row of a test."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = find_model(name)
    config, width = model.archs[arch], model.archs[arch].head_width
    assert model.hugging_face is not None
    theirs = AutoConfig.for_model(model.hugging_face.model_type, **model.hugging_face.write_config(config))
    kind = "full_attention" if name == "olmo3" else None
    expected, sharpened = ROPE_INIT_FUNCTIONS[{"llama": "llama3", "olmo3": "yarn"}[name]](theirs, layer_type=kind)
    cosines, sines = decoder._angles(Rope(config.rope_theta, config.rope_scaling), torch.tensor([[1]]), width, torch.float32)
    found = torch.atan2(sines, cosines)[0, 0, 0, width // 2 :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.hypot(sines, cosines)[0, 0, 0, 0].item(), sharpened, rtol=1e-6, atol=0)
    plain = ROPE_INIT_FUNCTIONS["linear"](transformers_without_scaling(config))[0]
    assert not torch.allclose(found, plain)


def transformers_without_scaling(config: Any) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "linear", "factor": 1.0, "rope_theta": config.rope_theta}
    return LlamaConfig(hidden_size=config.model_dim, num_attention_heads=config.num_attn_heads, rope_parameters=rope)


@pytest.mark.parametrize("width", [640, 1152])
def test_embeddings_of_gemma_are_scaled_in_the_dtype_of_activations(width: int) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    theirs = Gemma3TextScaledWordEmbedding(8, width, None, embed_scale=width**0.5).to(torch.bfloat16)
    config = attrs.evolve(find_model("gemma3").config(), model_dim=width, vocab_size=8)
    tokens = torch.arange(8)[None]
    found = gemma2.embed(config, {}, theirs.weight.detach()[tokens], tokens)
    assert torch.equal(found, theirs(tokens))
    assert not torch.equal(found, (theirs.weight.float() * width**0.5).to(torch.bfloat16)[None]), "the root is rounded"


@pytest.mark.parametrize("window", [None, 3])
def test_scores_with_a_bound_out_of_reach_are_scores(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 24, 6, generator=generator) for heads in (4, 2, 2))
    mask = nn.attention_mask(BATCH.segments, "document", window)
    capped = nn.softcapped_attention(query, key, value, mask, 1e4, 0.3)
    assert_close(capped, nn.attention(query, key, value, mask, 0.3), 1e-5)
    assert not torch.allclose(capped, nn.softcapped_attention(query, key, value, mask, 0.5, 0.3), rtol=0.05)


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_cross_entropy_of_bounded_logits_is_that_of_the_formula(chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(2, 24, 8, generator=generator), torch.randn(64, 8, generator=generator)

    def found(x: Tensor, head: Tensor) -> Tensor:
        return nn.cross_entropy(nn.logits(x, head, chunk, 3.0), BATCH.targets, BATCH.mask)[0]

    def expected(x: Tensor, head: Tensor) -> Tensor:
        logits = 3 * torch.tanh(x @ head.T / 3)
        return F.cross_entropy(logits[BATCH.mask], BATCH.targets[BATCH.mask], reduction="sum")

    assert_close(grad(found, (0, 1))(x, head), grad(expected, (0, 1))(x, head), 1e-5)
    assert_close(nn.all_logits(nn.logits(x, head, chunk, 3.0)), 3 * torch.tanh(x @ head.T / 3), 1e-6)


def test_every_family_and_each_key_of_its_own_is_in_the_documents() -> None:
    rows = {row.split("|")[1].strip(): row for row in DOCUMENT.splitlines() if row.startswith("| `")}
    llama = {field.name for field in attrs.fields(find_model("llama").config)}
    for family in TINY:
        model = find_model(family)
        own = {field.name for field in attrs.fields(model.config)} - llama
        missing = [name for name in [*model.archs, *own] if f"`{name}`" not in rows[f"`{family}`"]]
        assert not missing
