"""muP and CompleteP: a model with its multipliers written out, trained by torch.optim.AdamW with the tables, is the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn, optim, random, tree
from fnrecipe.config import ModelSection, resolve
from fnrecipe.models import decoder, pieces
from fnrecipe.models.decoder import Piece
from fnrecipe.models.llama import model as llama
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.model import find_model
from fnrecipe.nn.policy import Chunk
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.config import LMConfig, config
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.tree import Tree
from tests.helpers import assert_close

BASE = {"model_dim": 16, "num_layers": 2, "num_attn_heads": 2, "num_key_value_heads": 2, "ffn_inner_dim": 24}
LARGE = {"model_dim": 64, "num_layers": 6, "num_attn_heads": 4, "num_key_value_heads": 2, "ffn_inner_dim": 96}
WIDTH, DEPTH, HEADS = 4, 3, (8, 16)
TRANSFER = {"base_width": 16, "base_depth": 2, "base_head_dim": 8}
KEY, EPS, RATE, DECAY, STD = random.key(0), 1e-3, 0.02, 0.1, 0.02


def sized(sizes: Mapping[str, int], family: str = "llama", transfer: Mapping[str, Any] = {}, **more: object) -> LMConfig:
    keys = {"vocab_size": 300, "max_seq_len": 256, **sizes, **more}
    pairs = {f"model.config.{name}": value for name, value in keys.items()}
    pairs |= {f"model.transfer.{name}": value for name, value in transfer.items()}
    pairs |= {"optimizer.config.eps": EPS, "optimizer.config.lr": RATE, "optimizer.config.weight_decay": DECAY}
    pairs |= {"model.family": family, "lr_scheduler.name": "constant", "trainer.max_grad_norm": "null"}
    return resolve(config, [], [f"{key}={value}" for key, value in pairs.items()])[0]


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    drawn = (random.uniform(random.key(5), 2, 12) * 300).long()
    return drawn, torch.zeros_like(drawn), torch.arange(12).expand(2, -1)


def loss(logits: nn.Logits) -> Tensor:
    return F.cross_entropy(nn.all_logits(logits)[:, :-1].flatten(0, 1), tokens()[0][:, 1:].flatten())


def explicit(depth: float, width: float, heads: tuple[int, int]) -> decoder.Decoder[LlamaConfig]:
    """Llama with the multipliers of logits, branches and scores of attention as products."""

    def kind(config: LlamaConfig, number: int) -> decoder.Kind:
        return attrs.evolve(llama.kind(config, number), scale=math.sqrt(heads[0]) / heads[1])

    def output(config: Any, weights: Tree, mixed: Tensor) -> Tensor:
        return pieces.mixed_down(config, weights, mixed) / depth

    def down(config: Any, weights: Tree, gates: Tensor, values: Tensor) -> Tensor:
        return pieces.gated_down(config, weights, gates, values) / depth

    def rest(config: LlamaConfig, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
        x = piece.attended(output, "output")(x, mixed)
        return piece.fed(down, "down")(x, *piece(pieces.gated, "ffn_norm", "gate", "up")(x))

    def logits(config: LlamaConfig, outer: Tree, x: Tensor, chunk: Chunk) -> Tensor:
        return nn.all_logits(pieces.logits(config, outer, x, chunk)) / width

    return attrs.evolve(llama.decoder, kind=kind, rest=rest, logits=logits)


def hidden(path: str) -> bool:
    return path.startswith("layers.")


def by_the_papers(model: ModelSection, name: str, steps: int) -> Tensor:
    """Logits after training by torch: `name`'s table of initial deviations, rates, decays and epsilons."""
    depth = DEPTH if name == "completep" else 1
    reference = explicit(depth, WIDTH, HEADS)
    leaves = tree.paths(llama.init(model.config, KEY, replicated))

    def begin(path: str, leaf: Tensor) -> Tensor:
        matrix = hidden(path) and leaf.ndim == 2
        start = leaf.double() / math.sqrt(WIDTH) if matrix else leaf.double()
        if name == "completep" and path.endswith(("output", "down")):
            start = start * math.sqrt(LARGE["num_layers"] / BASE["num_layers"])
        return start.requires_grad_()

    params = {path: begin(path, leaf) for path, leaf in leaves.items()}
    groups = [
        {
            "params": [leaf],
            "lr": RATE / WIDTH if hidden(path) and leaf.ndim == 2 else RATE,
            "eps": EPS / WIDTH / (depth if hidden(path) else 1),
            "weight_decay": 0 if leaf.ndim == 1 else DECAY * WIDTH if hidden(path) else DECAY,
        }
        for path, leaf in params.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    like = llama.init(model.config, KEY, replicated)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(decoder.apply(reference, model.config, tree.from_paths(like, params), *tokens())).backward()
        optimizer.step()
    return nn.all_logits(decoder.apply(reference, model.config, tree.from_paths(like, params), *tokens())).detach()


def ours(config: LMConfig, steps: int) -> Tensor:
    params = tree.map(torch.Tensor.double, recipe.init(config, KEY, replicated))
    apply, update = find_model(config.model.family).apply, recipe.update(config)
    state = optim.init_parts(update, params)
    for number in range(1, steps + 1):
        gradients = torch.func.grad(lambda p: loss(apply(config.model.config, p, *tokens())))(params)
        updates, state, _ = update.update(gradients, state, params, torch.tensor(number))
        params = optim.apply_updates(params, updates)
    return nn.all_logits(apply(config.model.config, params, *tokens())).detach()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["mup", "completep"])
def test_multipliers_in_weights_are_multipliers(name: str, tied: bool) -> None:
    transfer = {"name": name, **TRANSFER} if name == "completep" else {"name": name, "base_width": 16, "base_head_dim": 8}
    large = sized(LARGE, transfer=transfer, tied_embeddings=tied)
    for steps in (0, 3):
        assert_close(ours(large, steps), by_the_papers(large.model, name, steps), 1e-6)
