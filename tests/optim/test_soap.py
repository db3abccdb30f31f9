"""SOAP over many renewals of its bases, and whose rows it turns: a float64 rule in NumPy is the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fnrecipe import optim, presets, tree
from fnrecipe.config import LRSchedulerSection, OptimizerSection, RegimeSection, TrainerSection, resolve, structure
from fnrecipe.errors import ConfigError
from fnrecipe.recipes.lm.config import config

EVERY, STEPS, RATE = 3, 31, 0.01


def gradient(step: int, rows: int = 5, columns: int = 4) -> Tensor:
    """Of full rank; which rows and columns are the large ones changes with the step."""
    i, j = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    sizes = torch.exp(torch.sin(0.31 * step + 1.7 * i)) * torch.exp(torch.cos(0.23 * step + 2.1 * j))
    return sizes * torch.cos(0.7 * (4 * i + j) + 1.3 * step + i * j)


def by_rule(turned: tuple[bool, bool]) -> tuple[np.ndarray, int]:
    """The sum of updates as Vyas et al. 2024 write them, algorithms 3 and 4; and how often a renewal changed an order."""
    moments, bases, changes = [np.zeros((5, 5)), np.zeros((4, 4))], [np.eye(5), np.eye(4)], 0
    mean = square = total = np.zeros((5, 4))
    for number in range(STEPS):
        g = gradient(number + 1).numpy()
        if number:
            mean = 0.95 * mean + 0.05 * g
            square = 0.95 * square + 0.05 * (bases[0].T @ g @ bases[1]) ** 2
            first, second = mean / (1 - 0.95**number), square / (1 - 0.95**number)
            total = total - RATE * bases[0] @ (bases[0].T @ first @ bases[1] / (np.sqrt(second) + 1e-8)) @ bases[1].T
        moments = [0.95 * m + 0.05 * new for m, new in zip(moments, (g @ g.T, g.T @ g), strict=True)]
        for side in (0, 1):
            if not turned[side] or number % EVERY:
                continue
            if number == 0:
                bases[side] = np.linalg.svd(moments[side])[0]
                continue
            sizes = np.diag(bases[side].T @ moments[side] @ bases[side])
            order = np.argsort(-sizes)
            changes += int((order != np.sort(order)).any())
            bases[side] = np.linalg.qr(moments[side] @ bases[side][:, order])[0]
            square = np.take(square, order, axis=side)
    return total, changes


@pytest.mark.parametrize("turned", [(True, True), (False, True)], ids=["both sides", "columns"])
def test_soap_is_its_rule_over_renewals_that_change_the_order(turned: tuple[bool, bool]) -> None:
    expected, changes = by_rule(turned)
    assert changes > 2
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        transform = optim.scale_by_soap(every=EVERY, rows=turned[0])
        params = {"a": torch.zeros(5, 4, dtype=dtype)}
        state = transform.init(params)
        for step in range(1, STEPS + 1):
            updates, state, _ = transform.update({"a": gradient(step).to(dtype)}, state, params, torch.tensor(step))
            params = {"a": params["a"] - RATE * updates["a"]}
        assert (params["a"] - torch.from_numpy(expected)).abs().max() < tolerance
        assert len(state["left"]["a"]) == (5 if turned[0] else 0)


def moved(**config: object) -> dict[str, Tensor]:
    """How parameters are moved by three gradients of which the third row is 0."""
    section = structure({"name": "soap", "config": {"precondition_frequency": 1, **config}}, OptimizerSection())
    update = presets.update(section, LRSchedulerSection(), TrainerSection(max_grad_norm=None), RegimeSection(num_steps=8))
    params = {"embedding": torch.zeros(5, 4), "layers": {"0": {"query": torch.zeros(5, 4)}}, "norm": torch.zeros(4)}
    state = update.init(params)
    for step in range(1, 4):
        g = gradient(step).float()
        g[2] = 0
        gradients = {"embedding": g, "layers": {"0": {"query": g}}, "norm": g[0]}
        updates, state, _ = update.update(gradients, state, params, torch.tensor(step))
        params = optim.apply_updates(params, updates)
    return tree.paths(params)


def test_rows_of_tokens_are_not_turned_unless_the_config_says_so() -> None:
    """So a token that was not seen stays where it is, to the last bit, and each has Adam's means of its own."""
    found, both = moved(), moved(one_sided_params=[])
    assert all(value.any() for value in found.values())
    assert not found["embedding"][2].any()
    assert torch.equal(both["embedding"], both["layers.0.query"])
    assert torch.equal(both["layers.0.query"], found["layers.0.query"])
    assert not torch.allclose(both["embedding"], found["embedding"], rtol=1e-2)


@pytest.mark.parametrize(("name", "key"), [("soap", "one_sided_params"), ("muon", "adamw_params"), ("dion2", "adamw_params")])
def test_a_tag_that_there_is_not_is_told(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.{key}: expected a known tag, found '@embeddings'.*@embedding\b"):
        resolve(config, pairs=[f"optimizer.name={name}", f"optimizer.config.{key}=['@embeddings']"])
