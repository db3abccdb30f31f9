"""What is random in training: where dropout stands in each family, and that its bits depend on the key alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fnrecipe import nn, presets, random, tree
from fnrecipe.config import resolve
from fnrecipe.errors import UsageError
from fnrecipe.models import decoder, llama
from fnrecipe.models.model import find_model
from fnrecipe.models.next_token import next_token_loss
from fnrecipe.nn.noise import Noise
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.config import config as lm_config
from fnrecipe.transforms import evaluation, gradients, jit
from tests.helpers import TINY as CONFIG
from tests.helpers import assert_close, assert_same_bits, documents, packed
from tests.test_own_components import MODEL

from .families import TINY, random_params, tiny

BATCH = packed([documents(9, 14), documents(24)], 24)
ROWS = BATCH.tokens, BATCH.segments, BATCH.positions
NOISE = Noise(dropout=0.2, neftune=5.0)
KEY = random.key(4)

WRITERS = {"embedding", "positions", "output", "output_bias", "down", "down_bias"}
BEHIND = {"olmo2": {"attention_norm", "ffn_norm"}, "gemma2": {"attention_post_norm", "ffn_post_norm"}}
BEHIND |= {"olmo3": BEHIND["olmo2"], "gemma3": BEHIND["gemma2"]}
"""Norms behind sublayers: what these add is scaled by the norm's weight, in Gemma by one more than it."""


def doubled(family: str, path: str, leaf: Tensor) -> Tensor:
    name = path.rpartition(".")[2]
    if family in BEHIND and path.startswith("layers."):
        return (2 * leaf + ("gemma" in family)) if name in BEHIND[family] else leaf
    return 2 * leaf if name in WRITERS else leaf


@pytest.mark.parametrize("family", TINY)
def test_dropout_is_of_the_embeddings_and_of_what_each_sublayer_adds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout that doubles instead is a model whose writers to the residual stream are doubled."""
    model, config, keys = find_model(family), tiny(family, tied_embeddings=False), []

    def twice(x: Tensor, rate: float, key: Tensor, numbers: Tensor) -> Tensor:
        keys.append((*key.tolist(), rate))
        return 2 * x

    params = random_params(model, config)
    changed = tree.like(params, [doubled(family, path, leaf) for path, leaf in tree.paths(params).items()])
    expected = nn.all_logits(model.apply(config, changed, *ROWS, policy=Policy(), scope="document"))
    monkeypatch.setattr(decoder.nn, "dropout", twice)
    assert model.noisy is not None
    given = {"policy": Policy(), "scope": "document", "noise": Noise(dropout=0.2)}
    found = nn.all_logits(model.noisy(config, params, *ROWS, KEY, **given))  # type: ignore[arg-type]
    assert_close(found, expected, 1e-5)
    assert len(set(keys)) == len(keys) == 1 + 2 * config.num_layers
    assert {rate for *_, rate in keys} == {0.2}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_noise_of_embeddings_is_added_to_what_is_looked_up(family: str) -> None:
    """So Gemma's scale and positions of GPT-2 come behind it, as with a table that has the noise in it."""
    model, config = find_model(family), tiny(family, tied_embeddings=False)
    params, tokens = random_params(model, config), torch.arange(24)[None]
    rows = tokens, tokens * 0, tokens
    keys, lengths = random.fold_in(KEY, torch.arange(1)), torch.full_like(tokens, 24)
    table = nn.embedding_noise(params["embedding"][None, :24], 5.0, keys[0], nn.position_numbers(tokens), lengths)
    given: dict[str, Any] = {"policy": Policy(), "scope": "document"}
    expected = nn.all_logits(model.apply(config, {**params, "embedding": table[0]}, *rows, **given))
    assert model.noisy is not None
    found = nn.all_logits(model.noisy(config, params, *rows, KEY, **given, noise=Noise(neftune=5.0)))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, nn.all_logits(model.apply(config, params, *rows, **given)), rtol=1e-3)


def slope(policy: Policy = Policy(), microbatches: int = 2, noise: Noise = NOISE) -> Callable[..., Any]:
    return gradients(next_token_loss(partial(llama.apply, CONFIG, policy=policy, noise=noise)), microbatches)


PARAMS = random_params(find_model("llama"), CONFIG)


@pytest.mark.parametrize("remat", ["off", "selective", "layerwise"])
def test_recomputed_and_traced_it_has_the_same_bits(remat: Any) -> None:
    expected = slope()(PARAMS, BATCH, KEY)
    policy = Policy(remat=remat)
    assert_same_bits(slope(policy)(PARAMS, BATCH, KEY), expected)
    assert_same_bits(jit(slope(policy))(PARAMS, BATCH, KEY), expected)


def test_each_microbatch_has_noise_of_its_own() -> None:
    row = tree.map(lambda x: x[:1], BATCH)
    _, sums = slope()(PARAMS, tree.map(lambda x: torch.cat([x, x]), row), KEY)
    loss = next_token_loss(partial(llama.apply, CONFIG, noise=NOISE))
    first, second, without = (loss(PARAMS, row, key)[0] for key in (*random.fold_in(KEY, torch.arange(2)), None))
    assert torch.equal(sums["loss"], first + second)
    assert min(abs(first - second), abs(first - without), abs(second - without)) > 1e-3 * without


def test_an_evaluation_has_none() -> None:
    noisy, plain = (evaluation(next_token_loss(partial(llama.apply, CONFIG, noise=n))) for n in (NOISE, Noise()))
    assert_same_bits(noisy(PARAMS, BATCH), plain(PARAMS, BATCH))


def test_a_preset_applies_the_noise_of_the_config() -> None:
    sizes = "{vocab_size: 64, model_dim: 32, num_layers: 2, max_seq_len: 32, ffn_inner_dim: 48}"
    pairs = [f"model.config={sizes}", "dataset.max_seq_len=32", "model.dropout_p=0.2", "trainer.neftune_noise_alpha=5"]
    given, _ = resolve(lm_config, pairs=[*pairs, "trainer.logits_at_once=null"])
    found = presets.apply(given.model, given.trainer, "document")
    expected = llama.apply(CONFIG, PARAMS, *ROWS, KEY, noise=NOISE)
    assert torch.equal(nn.all_logits(found(PARAMS, *ROWS, KEY)), nn.all_logits(expected))
    assert torch.equal(nn.all_logits(found(PARAMS, *ROWS)), nn.all_logits(llama.apply(CONFIG, PARAMS, *ROWS)))


@pytest.mark.parametrize("key", ["model.dropout_p", "trainer.neftune_noise_alpha"])
def test_a_family_of_ones_own_goes_on_without_noise_and_is_refused_with_it(key: str, tmp_path: Path) -> None:
    file = tmp_path / "my_model.py"
    file.write_text(MODEL)
    sizes = [f"model.family={file}", "model.config.max_seq_len=256"]
    plain, noisy = (resolve(lm_config, pairs=[*sizes, *more])[0] for more in ([], [f"{key}=0.5"]))
    rows = presets.init(plain.model, KEY, replicated), *ROWS
    assert nn.all_logits(presets.apply(plain.model, plain.trainer, "document")(*rows, KEY)).shape == (2, 24, 264)
    with pytest.raises(UsageError) as error:
        presets.apply(noisy.model, noisy.trainer, "document")
    found = f"found the family {file}, whose Model has no noisy"
    assert str(error.value) == f"{key}: expected a family that is applied with noise, {found}"
