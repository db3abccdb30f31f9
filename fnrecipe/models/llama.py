"""Llama (Touvron et al. 2023, arXiv:2302.13971): a decoder of RMSNorm, rotary grouped-query attention and SwiGLU.

Parameters are nested dicts; linear weights are [out, in]:

    embedding [V, D]    layers.<i>.{attention_norm, query, key, value, output, ffn_norm, gate, up, down}
    norm [D]            head [V, D], unless embeddings are tied
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fnrecipe import nn, random
from fnrecipe.config import LlamaConfig
from fnrecipe.tree import Tree


def shapes(config: LlamaConfig) -> Tree:
    """The parameters' shapes, in the structure of the parameters."""
    model, inner = config.model_dim, config.ffn_inner_dim
    groups = config.num_key_value_heads * (model // config.num_attn_heads)
    layer = {
        "attention_norm": (model,),
        "query": (model, model),
        "key": (groups, model),
        "value": (groups, model),
        "output": (model, model),
        "ffn_norm": (model,),
        "gate": (inner, model),
        "up": (inner, model),
        "down": (model, inner),
    }
    vocabulary = (config.vocab_size, model)
    head = {} if config.tied_embeddings else {"head": vocabulary}
    layers = {str(i): dict(layer) for i in range(config.num_layers)}
    return {"embedding": vocabulary, "layers": layers, "norm": (model,), **head}


def init(config: LlamaConfig, key: Tensor) -> Tree:
    """Norms at 1, matrices normal with `init_std`, those that write to the residual stream with init_std / sqrt(2 * layers).

    Each matrix's key is folded over its path, so that no matrix depends on the others or on an order.
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
            return leaf(path, node)
        return {name: build(child, f"{path}.{name}") for name, child in node.items()}

    return build(shapes(config), "")


def apply(config: LlamaConfig, params: Tree, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """Logits, [B, T, V]; tokens, segments and positions are int64 [B, T], as in `fnrecipe.data.Batch`."""
    angles = nn.rotary(positions, config.model_dim // config.num_attn_heads, config.rope_theta)
    mask = nn.segment_mask(segments)
    x = F.embedding(tokens, params["embedding"])
    for layer in params["layers"].values():
        x = x + _attention(config, layer, nn.rms_norm(x, layer["attention_norm"], config.norm_eps), angles, mask)
        x = x + nn.swiglu(nn.rms_norm(x, layer["ffn_norm"], config.norm_eps), layer["gate"], layer["up"], layer["down"])
    head = params["embedding"] if config.tied_embeddings else params["head"]
    return F.linear(nn.rms_norm(x, params["norm"], config.norm_eps), head)


def _attention(config: LlamaConfig, layer: Tree, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    def heads(weight: Tensor, number: int) -> Tensor:
        return F.linear(x, weight).view(*x.shape[:-1], number, -1).transpose(1, 2)

    query = nn.rotate(heads(layer["query"], config.num_attn_heads), *angles)
    key = nn.rotate(heads(layer["key"], config.num_key_value_heads), *angles)
    value = heads(layer["value"], config.num_key_value_heads)
    return F.linear(nn.attention(query, key, value, mask).transpose(1, 2).flatten(-2), layer["output"])
