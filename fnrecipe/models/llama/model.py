"""Llama (Touvron et al. 2023, arXiv:2302.13971): a decoder of RMSNorm, rotary grouped-query attention and SwiGLU.

Parameters are nested dicts; linear weights are [out, in]:

    embedding [V, D]    layers.<i>.{attention_norm, query, key, value, output, ffn_norm, gate, up, down}
    norm [D]            head [V, D], unless embeddings are tied
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fnrecipe import nn, random, tree
from fnrecipe.models.flops import TokenFlops, token_flops
from fnrecipe.models.llama.config import ARCHS, LlamaConfig, num_parameters
from fnrecipe.models.model import Model
from fnrecipe.nn.attention import AttentionMask, AttentionScope, attention, attention_mask
from fnrecipe.nn.policy import Policy
from fnrecipe.parallel.mesh import Placement, replicated
from fnrecipe.transforms import unshard, unsharded_layer
from fnrecipe.tree import Tree

TENSOR_RULES = {
    **dict.fromkeys(("embedding", "head", *(f"layers.*.{name}" for name in ("query", "key", "value", "gate", "up"))), 0),
    **dict.fromkeys((f"layers.*.{name}" for name in ("output", "down")), 1),
}
"""Along which dimension tensor parallelism cuts which parameters: whole heads, feed-forward units, rows of the vocabulary."""


def shapes(config: LlamaConfig) -> Tree:
    """The parameters' shapes, in the structure of the parameters."""
    model, inner = config.model_dim, config.ffn_inner_dim
    queries, keys = (number * config.head_width for number in (config.num_attn_heads, config.num_key_value_heads))
    layer = {
        "attention_norm": (model,),
        "query": (queries, model),
        "key": (keys, model),
        "value": (keys, model),
        "output": (model, queries),
        "ffn_norm": (model,),
        "gate": (inner, model),
        "up": (inner, model),
        "down": (model, inner),
    }
    vocabulary = (config.vocab_size, model)
    head = {} if config.tied_embeddings else {"head": vocabulary}
    layers = {str(i): dict(layer) for i in range(config.num_layers)}
    return {"embedding": vocabulary, "layers": layers, "norm": (model,), **head}


def flops(config: LlamaConfig, length: int) -> TokenFlops:
    """FLOPs of training on one position of rows of `length`."""
    weights = shapes(config)
    if not config.tied_embeddings:
        del weights["embedding"]  # it is looked up in, and multiplied by nothing
    multiplied = tree.leaves(weights, lambda node: isinstance(node, tuple))
    width = config.num_attn_heads * config.head_width
    return token_flops(multiplied, layers=config.num_layers, width=width, length=length)


def init(config: LlamaConfig, key: Tensor, place: Placement = replicated) -> Tree:
    """Norms at 1, matrices normal with `init_std`, those that write to the residual stream with init_std / sqrt(2 * layers).

    Each matrix's key is folded over its path, so that no matrix depends on the others or on an order. `place(path, leaf)` is
    what becomes of each as soon as it is made, so that the whole need not be in one place.
    (Radford et al. 2019 for the scale of the residual writers.)
    """
    writer_std = config.init_std / math.sqrt(2 * config.num_layers)

    def leaf(path: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=key.device)
        std = writer_std if path.endswith((".output", ".down")) else config.init_std
        return random.normal(random.fold_in(key, path), *shape, std=std)

    def build(node: Tree, path: str) -> Tree:
        if isinstance(node, tuple):
            return place(path.removeprefix("."), leaf(path, node))
        return {name: build(child, f"{path}.{name}") for name, child in node.items()}

    return build(shapes(config), "")


def apply(
    config: LlamaConfig,
    params: Tree,
    tokens: Tensor,
    segments: Tensor,
    positions: Tensor,
    policy: Policy = Policy(),
    scope: AttentionScope = "document",
) -> nn.Logits:
    """Logits, [B, T, V]; tokens, segments and positions are int64 [B, T], as in `fnrecipe.data.Batch`.

    Where the scope is the row, that is one text whose positions go on from document to document: `positions` is not looked at.
    """
    if scope == "row":
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    angles = nn.rotary(positions, config.head_width, config.rope_theta)
    outer = unshard({name: params[name] for name in params if name != "layers"})
    x = nn.embedding(tokens, outer["embedding"])
    x = x.to(policy.dtype or x.dtype)
    mask = attention_mask(segments, scope, x.dtype, max_documents=policy.max_documents)
    for number, weights in enumerate(params["layers"].values()):
        x = _layer(config, policy, number)(weights, x, angles, mask)
    x = nn.rms_norm(x, outer["norm"], config.norm_eps)
    return nn.logits(x, outer.get("head", outer["embedding"]), policy.logits_at_once)


def _layer(config: LlamaConfig, policy: Policy, number: int) -> Callable[..., Tensor]:
    """A decoder layer that keeps what `policy` says for its gradient."""
    if policy.remat == "selective":
        return partial(_pieces, config, partial(unsharded_layer, recompute=True))
    return unsharded_layer(
        partial(_pieces, config, lambda piece: piece),
        recompute=policy.remat == "layerwise" and number % policy.every_nth_layer == 0,
    )


def _pieces(
    config: LlamaConfig,
    wrap: Callable[..., Callable[..., Tree]],
    weights: Tree,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    mask: AttentionMask,
) -> Tensor:
    """A layer in four pieces, each of which begins behind matrix products or attention and ends with its own products."""

    def piece(function: Callable[..., Tree], *names: str) -> Callable[..., Tree]:
        return partial(wrap(partial(function, config)), {name: weights[name] for name in names})

    query, key, value = piece(_heads, "attention_norm", "query", "key", "value")(x, angles)
    x = piece(_output, "output")(x, attention(query, key, value, mask))
    gates, values = piece(_gated, "ffn_norm", "gate", "up")(x)
    written: Tensor = piece(_down, "down")(x, gates, values)
    return written


def _heads(config: LlamaConfig, weights: Tree, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x = nn.entered(nn.rms_norm(x, weights["attention_norm"], config.norm_eps), weights["query"])

    def heads(weight: nn.Weight) -> Tensor:
        return nn.linear(x, weight).view(*x.shape[:-1], -1, config.head_width).transpose(1, 2)

    query, key, value = (heads(weights[name]) for name in ("query", "key", "value"))
    return nn.rotate(query, *angles), nn.rotate(key, *angles), value


def _output(config: LlamaConfig, weights: Tree, x: Tensor, mixed: Tensor) -> Tensor:
    return x + nn.linear(mixed.transpose(1, 2).flatten(-2), weights["output"])


def _gated(config: LlamaConfig, weights: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    x = nn.entered(nn.rms_norm(x, weights["ffn_norm"], config.norm_eps), weights["gate"])
    return nn.linear(x, weights["gate"]), nn.linear(x, weights["up"])


def _down(config: LlamaConfig, weights: Tree, x: Tensor, gates: Tensor, values: Tensor) -> Tensor:
    return x + nn.linear(nn.swiglu(gates, values), weights["down"])


def rules(config: LlamaConfig) -> Mapping[str, int]:
    return TENSOR_RULES


model = Model(config=LlamaConfig, archs=ARCHS, parameters=num_parameters, init=init, apply=apply, flops=flops, rules=rules)
