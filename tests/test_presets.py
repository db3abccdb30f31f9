"""Sections as what they stand for, against the functions that they stand for."""

from __future__ import annotations

import pytest
import torch

from fnrecipe import optim, presets, random
from fnrecipe.config import resolve
from fnrecipe.models import llama
from fnrecipe.nn.linear_cross_entropy import DeferredLogits
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.config import LMConfig, config
from tests.helpers import TINY, assert_same_bits, draw


def changed(*pairs: str) -> LMConfig:
    return resolve(config, pairs=pairs)[0]


@pytest.mark.parametrize(
    ("pairs", "schedule"),
    [
        ([], optim.cosine_annealing(1.5e-3, num_warmup_steps=40, num_steps=600, final_scale=0.1)),
        (
            ["lr_scheduler.name=wsd", "lr_scheduler.config.num_warmup_steps=0.05"],
            optim.wsd(1.5e-3, num_warmup_steps=30, num_decay_steps=120, num_steps=600, final_scale=0.0),
        ),
        (
            ["lr_scheduler={name: wsd, config: {num_decay_steps: 0}}", "regime={num_steps: null, num_data_epochs: 1}"],
            optim.wsd(1.5e-3, num_warmup_steps=0, num_decay_steps=0, num_steps=1, final_scale=0.0),
        ),
    ],
)
def test_the_update_is_the_optimizer_on_the_schedule(pairs: list[str], schedule: optim.Schedule) -> None:
    given = changed(*pairs, "optimizer.config.weight_decay=0.3", "trainer.max_grad_norm=0.5")
    ours = presets.update(given.optimizer, given.lr_scheduler, given.trainer, given.regime)
    theirs = optim.adamw(schedule, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, max_norm=0.5)
    params = {"a": torch.randn(3, 4), "b": torch.randn(4)}
    for step in (1, 2, 500, 700):
        gradients = draw(params, seed=step)
        found, expected = (
            update.update(gradients, update.init(params), params, torch.tensor(step)) for update in (ours, theirs)
        )
        assert_same_bits(found, expected)


def test_parameters_and_logits_are_those_of_the_family() -> None:
    sizes = "{vocab_size: 64, model_dim: 32, num_layers: 2, max_seq_len: 32, ffn_inner_dim: 48}"
    given = changed(f"model.config={sizes}", "dataset.max_seq_len=32", "model.dtype=bfloat16", "trainer.dtype=bfloat16")
    key, tokens = random.key(3), torch.arange(16)[None]
    params = presets.init(given.model, key, replicated)
    expected = llama.init(TINY, key, lambda _, leaf: leaf.to(torch.bfloat16))
    assert_same_bits(params, expected)
    found = presets.apply(given.model, given.trainer, "document")(params, tokens, tokens * 0, tokens)
    logits = llama.apply(TINY, params, tokens, tokens * 0, tokens, policy=Policy(torch.bfloat16, logits_at_once=512))
    assert isinstance(found, DeferredLogits)
    assert isinstance(logits, DeferredLogits)
    assert torch.equal(found.x, logits.x)
    assert found.chunk == logits.chunk


def test_the_policy_is_what_the_trainer_says() -> None:
    checkpointing = (
        "trainer={dtype: bfloat16, activation_checkpointing: {mode: layerwise, every_nth_layer: 3}, logits_at_once: 7}"
    )
    assert presets.policy(changed(checkpointing).trainer) == Policy(torch.bfloat16, "layerwise", 3, 7)
