"""muP and CompleteP: a model with its multipliers written out, trained by torch.optim.AdamW with the tables, is the truth."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn, optim, random, tree
from fnrecipe.components.groups import parts
from fnrecipe.config import ModelSection, resolve
from fnrecipe.config.find import known
from fnrecipe.config.sections.model import FAMILIES
from fnrecipe.errors import ConfigError
from fnrecipe.inspect.parameters import shares
from fnrecipe.models import decoder, pieces, transfer
from fnrecipe.models.decoder import Piece
from fnrecipe.models.llama import model as llama
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.model import find_model
from fnrecipe.nn.policy import Chunk
from fnrecipe.parallel.mesh import replicated
from fnrecipe.recipes.lm.config import LMConfig, config
from fnrecipe.recipes.lm.train import recipe
from fnrecipe.tree import Tree
from tests.helpers import assert_close, assert_same_bits
from tests.models.families import SIZES, TINY

BASE = {"model_dim": 16, "num_layers": 2, "num_attn_heads": 2, "num_key_value_heads": 2, "ffn_inner_dim": 24}
LARGE = {"model_dim": 64, "num_layers": 4, "num_attn_heads": 4, "num_key_value_heads": 2, "ffn_inner_dim": 96}
WIDTH, DEPTH, HEADS = 4, 2, (8, 16)
TRANSFER = {"base_width": 16, "base_depth": 2, "base_head_dim": 8}
KEY, EPS, RATE, DECAY, STD = random.key(0), 1e-3, 0.02, 0.1, 0.02


def sized(
    sizes: Mapping[str, int], family: str = "llama", transfer: Mapping[str, Any] = {}, *written: str, **more: object
) -> LMConfig:
    keys = {"vocab_size": 300, "max_seq_len": 256, **sizes, **more}
    pairs = {f"model.config.{name}": value for name, value in keys.items()}
    pairs |= {f"model.transfer.{name}": value for name, value in transfer.items()}
    pairs |= {"optimizer.config.eps": EPS, "optimizer.config.lr": RATE, "optimizer.config.weight_decay": DECAY}
    pairs |= {"model.family": family, "lr_scheduler.name": "constant", "trainer.max_grad_norm": "null"}
    return resolve(config, [], [*(f"{key}={value}" for key, value in pairs.items()), *written])[0]


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


@pytest.mark.parametrize(("name", "tied"), [("mup", True), ("completep", False)])
def test_multipliers_in_weights_are_multipliers(name: str, tied: bool) -> None:
    base = TRANSFER if name == "completep" else {"base_width": 16, "base_head_dim": 8}
    large = sized(LARGE, transfer={"name": name, **base}, tied_embeddings=tied)
    for steps in (0, 3):
        assert_close(ours(large, steps), by_the_papers(large.model, name, steps), 1e-6)


class Slowed(Piece):
    """A piece whose branches are divided by the depth."""

    def attended(self, function: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
        return super().attended(lambda *args: function(*args) / DEPTH, *names)

    def fed(self, function: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
        return super().fed(lambda *args: function(*args) / DEPTH, *names)


@pytest.mark.parametrize("family", known(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_scores_branches_and_logits_are_multiplied_in_each_family(family: str, tied: bool) -> None:
    """Biases are not zero, and norms not one, as they may be after some steps."""
    sizes = {**SIZES, "num_key_value_heads": 2, **TINY[family]}
    fields = {field.name for field in attrs.fields(find_model(family).config)}
    sizes = {name: value for name, value in sizes.items() if name in fields and name not in ("vocab_size", "max_seq_len")}
    sizes = {name: value for name, value in sizes.items() if name != "rope_scaling"}
    sizes = {**sizes, "tied_embeddings": tied} if "tied_embeddings" in fields else sizes
    roles = find_model(family).roles
    assert roles
    given = {"base_head_dim": 3} if roles.scores else {}
    sizes["num_layers"] = DEPTH
    sizes |= {"final_logit_softcapping": "null"} if "final_logit_softcapping" in fields else {}  # no product with the logits'
    large = sized(sizes, family, {"name": "completep", "base_width": 8, "base_depth": 1, **given})
    known_decoder = importlib.import_module(f"fnrecipe.models.{family}.model").decoder
    section, width = large.model, large.model.config.head_width
    params = tree.map(lambda leaf: leaf.double() + 0.02, recipe.init(sized(sizes, family), KEY, replicated))
    factors = transfer.rules(section)

    def taken_in(path: str, leaf: Tensor) -> Tensor:
        mine = factors[transfer.role(section, path, leaf.ndim)]
        own = 4**-0.5 if hidden(path) and leaf.ndim == 2 else 1
        own = own * DEPTH**0.5 if path.rpartition(".")[2] in ("output", "down") else own
        return leaf * mine.init / own + mine.shift

    changed = tree.from_paths(params, {path: taken_in(path, leaf) for path, leaf in tree.paths(params).items()})

    def kind(config: Any, number: int) -> decoder.Kind:
        plain = known_decoder.kind(config, number)
        return attrs.evolve(plain, scale=math.sqrt(3) / width) if roles.scores else plain

    def rest(config: Any, piece: Piece, x: Tensor, mixed: Tensor) -> Tensor:
        return known_decoder.rest(config, Slowed(piece.wrap, piece.config, piece.weights), x, mixed)

    def embed(config: Any, outer: Tree, x: Tensor, positions: Tensor) -> Tensor:
        found = known_decoder.embed(config, outer, x, positions)
        return found / 2 if roles.scaled_embedding else found

    reference = attrs.evolve(known_decoder, kind=kind, rest=rest, embed=embed)
    found = nn.all_logits(find_model(family).apply(section.config, changed, *tokens()))
    assert_close(found, nn.all_logits(decoder.apply(reference, section.config, params, *tokens())) / 4, 1e-9)


def test_without_a_transfer_and_at_its_base_nothing_changes() -> None:
    plain, at_base = sized(BASE), sized(BASE, transfer={"name": "completep", **TRANSFER})
    assert_same_bits(recipe.init(plain, KEY, replicated), recipe.init(at_base, KEY, replicated))
    (part,) = parts(plain.optimizer, plain.model)
    (same,) = parts(at_base.optimizer, at_base.model)
    assert (
        (part.label, part.config, part.lr_scale) == (same.label, same.config, same.lr_scale) == ("", plain.optimizer.config, 1)
    )


def test_groups_and_a_transfer_multiply() -> None:
    group = "{params: [layers.0.*, embedding], lr_scale: 3, weight_decay: 0.5}"
    large = sized(LARGE, "llama", {"name": "mup", "base_width": 16}, f"optimizer.groups=[{group}]")
    found = {share.name: share for share in shares(recipe, large)}
    label = "layers.0.*,embedding"
    assert {name: (share.lr_scale, share.weight_decay) for name, share in found.items()} == {
        label: ("x 3", "0.5"),
        f"{label}/matrices": ("x 0.75", "2"),
        "others": ("x 1", "0.1, of matrices"),
        "last_norm": ("x 0.25", "0.4, of matrices"),
        "matrices": ("x 0.25", "0.4, of matrices"),
    }
    assert found["others"].patterns == ("layers.*.attention_norm", "layers.*.ffn_norm")
    assert sum(share.tensors for share in found.values()) == 2 + 9 * LARGE["num_layers"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"base_width": 8}, "model.transfer.name: expected mup or completep beside other keys of the transfer, found null"),
        (
            {"name": "mup"},
            "model.transfer.base_width: expected the model_dim for which the rates were found, for mup, found",
        ),
        ({"name": "completep", "base_width": 8}, "model.transfer.base_depth: expected the num_layers for which"),
        ({"name": "mup", "base_width": 8, "base_depth": 2}, "model.transfer.base_depth: expected null for mup"),
    ],
)
def test_keys_that_do_not_fit_are_refused(pairs: Mapping[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        sized(BASE, transfer=pairs)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "model={family: gemma2, transfer: {base_head_dim: 16}}",
            "model.transfer.base_head_dim: expected null for the family gemma2, whose scores depend on query_pre_attn_scalar",
        ),
        (
            "optimizer={name: muon, config: {adamw_params: ['*']}}",
            "optimizer.config.adamw_params: expected ['@embedding', '@head'] beside model.transfer, whose",
        ),
        ("model.adapter.name=lora", "model.transfer.name: expected null beside model.adapter.name=lora, found 'mup'"),
        ("optimizer.name=soap", "optimizer.name: expected an optimizer for which model.transfer.name=mup has rules, adamw, "),
        ("optimizer.groups=[{params: [head], name: sgd}]", "optimizer.groups[0].name: expected an optimizer for which"),
    ],
)
def test_what_has_no_rules_is_refused(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(config, [], ["model.transfer.name=mup", "model.transfer.base_width=64", pair])


def test_a_family_without_roles_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("import attrs\nfrom fnrecipe.models.llama.model import model\nmodel = attrs.evolve(model, roles=None)\n")
    expected = r"^model\.transfer\.name: expected null for a family that is none of gemma2, gemma3, gpt2, llama, "
    with pytest.raises(ConfigError, match=expected):
        resolve(config, [], ["model.transfer={name: mup, base_width: 64}", f"model.family={mine}"])


@pytest.mark.parametrize("scale", ["jordan", "match_rms"])
def test_muons_matrices_keep_their_rate_unless_their_updates_grow(scale: str) -> None:
    muon = f"optimizer={{name: muon, config: {{scale: {scale}, adamw: {{eps: 1}}}}}}"
    large = resolve(sized(LARGE, transfer={"name": "mup", "base_width": 16}), [], [muon])[0]
    found = {part.label: part for part in parts(large.optimizer, large.model)}
    slower = 2 if scale == "match_rms" else 1
    matrices = next(part for part in found.values() if "matrices" in part.roles)
    assert (matrices.lr_scale, attrs.asdict(matrices.config)["weight_decay"]) == (1 / slower, 0.1 * slower)
    assert {label: attrs.asdict(part.config)["adamw"]["eps"] for label, part in found.items()}["last_norm"] == 1
    assert attrs.asdict(found[""].config)["adamw"]["eps"] == 1 / WIDTH
