"""Named architectures against what was published of them, and what a head width of its own changes."""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import torch

from fnrecipe import random, tree
from fnrecipe.config import resolve
from fnrecipe.errors import ConfigError
from fnrecipe.models import llama
from fnrecipe.models.llama import LlamaConfig
from fnrecipe.models.llama.config import ARCHS
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.models.rope import Llama3Scaling
from fnrecipe.recipes.lm.config import config
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.transforms import evaluation
from tests.helpers import TINY, documents, packed
from tests.ranks import mesh_of, on_ranks

PUBLISHED = {
    "llama_1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}
"""Parameters; llama_1b is TinyLlama."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_arch_has_the_parameters_that_were_published(name: str) -> None:
    assert sum(llama.num_parameters(ARCHS[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", ARCHS)
def test_every_arch_is_a_valid_config_by_its_name(name: str) -> None:
    resolved, _ = resolve(config, pairs=[f"model.name={name}"])
    assert resolved.model.config == ARCHS[name]


def test_the_default_of_the_recipe_is_the_tiny_one() -> None:
    assert config.model.config == ARCHS["llama_tiny"]


def test_heads_may_be_wider_than_their_share_of_the_model() -> None:
    wide = attrs.evolve(TINY, head_dim=16)
    found = tree.paths(llama.init(wide, random.key(0)))
    assert found["layers.0.query"].shape == (4 * 16, 32)
    assert found["layers.0.key"].shape == found["layers.0.value"].shape == (2 * 16, 32)
    assert found["layers.0.output"].shape == (32, 4 * 16)


def test_a_head_of_the_width_that_is_the_default_changes_nothing() -> None:
    explicit = attrs.evolve(TINY, head_dim=8)
    key, tokens = random.key(0), torch.arange(20).reshape(2, 10)
    logits = [llama.apply(shape, llama.init(shape, key), tokens, tokens * 0, tokens % 10) for shape in (TINY, explicit)]
    assert torch.equal(*logits)


def test_attention_takes_the_flops_of_its_heads() -> None:
    """6 times what is in products, and 12 times heads x width of a head x length, by hand."""
    wide, length = attrs.evolve(TINY, head_dim=16), 24
    products = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 48 * 32) + 64 * 32
    assert llama.flops(wide, length).full == 6 * products + 12 * 2 * 64 * length


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (
            ["model.config.head_dim=7"],
            "model.config.head_dim: expected an even number (rotary positions pair up the head's dimensions), found 7",
        ),
        (["model.config.head_dim=0"], "model.config.head_dim: expected an integer of at least 1 or null, found 0"),
        (["model.config.head_dim=32", "model.config.model_dim=100", "model.config.num_attn_heads=6"], None),
    ],
)
def test_what_the_width_of_a_head_may_be(pairs: list[str], line: str | None) -> None:
    if line is None:
        resolve(config, pairs=pairs)
    else:
        with pytest.raises(ConfigError) as caught:
            resolve(config, pairs=pairs)
        assert str(caught.value) == f"{line} (command line)"


def test_tensor_parallelism_cuts_whole_heads_of_any_width() -> None:
    pairs = ["gang.tensor_parallel_size=2", "model.config.head_dim=30", "model.config.num_key_value_heads=1"]
    with pytest.raises(ConfigError) as caught:
        resolve(config, pairs=pairs)
    line = "model.config.num_key_value_heads: expected a multiple of gang.tensor_parallel_size = 2, found 1 (command line)"
    assert str(caught.value) == line
    changed, _ = resolve(config, pairs=pairs[:2])
    rules = recipe.rules(changed)
    assert (rules["layers.*.query"], rules["layers.*.output"]) == (0, 1)


def check_wide_heads(rank: int, size: int) -> None:
    wide, batch = attrs.evolve(TINY, head_dim=12), packed([[ids] for ids in documents(10, 12, 16, 7)], 16)
    loss, mesh = next_token_loss(partial(llama.apply, wide)), mesh_of(rank, size, tensor_parallel_size=size)
    params = llama.init(wide, random.key(0), mesh.cut)
    assert tree.paths(params)["layers.0.query"].shape == (4 * 12 // size, 32)
    found = evaluation(loss, 1, mesh)(params, batch)["loss"]
    expected, _ = loss(llama.init(wide, random.key(0)), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_ranks_share_wide_heads() -> None:
    on_ranks(2, check_wide_heads)


def test_the_default_shape_is_llama_2s() -> None:
    assert attrs.evolve(LlamaConfig(), max_seq_len=4096) == ARCHS["llama2_7b"]


@pytest.mark.parametrize(
    ("pairs", "scaling"),
    [
        (["model.config.rope_scaling={factor: 4}"], Llama3Scaling(4.0)),
        (["model.config.rope_scaling.factor=4"], Llama3Scaling(4.0)),
        (["model.name=llama3_2_1b", "model.config.rope_scaling.low_freq_factor=2"], Llama3Scaling(32.0, 2.0)),
        (["model.name=llama3_2_1b", "model.config.rope_scaling=null"], None),
        (["model.name=llama3_2_1b"], Llama3Scaling(32.0)),
    ],
)
def test_the_scaling_of_rotary_frequencies_is_a_section_or_null(pairs: list[str], scaling: Llama3Scaling | None) -> None:
    changed, _ = resolve(config, pairs=pairs)
    assert changed.model.config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("pairs", "lines"),
    [
        (
            ["model.config.rope_scaling={high_freq_factor: 1}"],
            ["model.config.rope_scaling.high_freq_factor: expected a number above low_freq_factor = 1.0, found 1.0"],
        ),
        (
            ["model.config.rope_scaling={factor: 0}", "model.config.num_layers=0"],
            [
                "model.config.num_layers: expected an integer of at least 1, found 0",
                "model.config.rope_scaling.factor: expected a number above 0, found 0",
            ],
        ),
        (
            ["model.name=llama3_2_1b", "model.config.rope_scaling=null", "model.config.num_layers=0"],
            ["model.config.num_layers: expected an integer of at least 1, found 0"],
        ),
    ],
)
def test_what_is_wrong_in_a_section_that_may_be_null_is_told(pairs: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config, pairs=pairs)
    assert str(caught.value).splitlines() == [f"{line} (command line)" for line in lines]
