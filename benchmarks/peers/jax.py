"""JAX and optax: pure functions, one jitted step, parameters and optimizer state donated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fnrecipe.data import Batch
from fnrecipe.models.llama import LlamaConfig

Params: TypeAlias = dict[str, Any]


def make_step(config: LlamaConfig) -> Callable[[Batch], Array]:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1))
    params = jax.jit(partial(init, config))(jax.random.key(0))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, batch: dict[str, Array]) -> tuple[Params, Any, Array]:
        loss, gradients = jax.value_and_grad(partial(mean_loss, config))(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step(batch: Batch) -> Array:
        nonlocal params, state
        arrays = {name: jnp.asarray(getattr(batch, name)) for name in ("tokens", "targets", "segments", "positions", "mask")}
        params, state, loss = update(params, state, arrays)
        return loss

    return step


def init(config: LlamaConfig, key: Array) -> Params:
    width, inner = config.model_dim, config.ffn_inner_dim
    groups = config.num_key_value_heads * (width // config.num_attn_heads)
    shapes = {
        "query": (width, width),
        "key": (width, groups),
        "value": (width, groups),
        "output": (width, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }
    keys = iter(jax.random.split(key, 2 + len(shapes) * config.num_layers))

    def normal(*shape: int) -> Array:
        return config.init_std * jax.random.normal(next(keys), shape)

    def layer() -> Params:
        norms = {"attention_norm": jnp.ones(width), "ffn_norm": jnp.ones(width)}
        return {**norms, **{name: normal(*shape) for name, shape in shapes.items()}}

    head = {} if config.tied_embeddings else {"head": normal(config.vocab_size, width)}
    layers = [layer() for _ in range(config.num_layers)]
    return {"embedding": normal(config.vocab_size, width), "layers": layers, "norm": jnp.ones(width), **head}


def mean_loss(config: LlamaConfig, params: Params, batch: dict[str, Array]) -> Array:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits(config, params, batch), batch["targets"])
    return (nats * batch["mask"]).sum() / batch["mask"].sum()


def logits(config: LlamaConfig, params: Params, batch: dict[str, Array]) -> Array:
    segments, width = batch["segments"], config.model_dim // config.num_attn_heads
    causal = jnp.tril(jnp.ones((segments.shape[1], segments.shape[1]), bool))
    mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
    angles = batch["positions"][..., None] * config.rope_theta ** (-jnp.arange(0, width, 2) / width)
    rotary = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    x = params["embedding"][batch["tokens"]]
    for layer in params["layers"]:
        x = x + attention(config, layer, rms_norm(config, x, layer["attention_norm"]), mask, rotary)
        y = rms_norm(config, x, layer["ffn_norm"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    head: Array = params["embedding" if config.tied_embeddings else "head"]
    return rms_norm(config, x, params["norm"]) @ head.T


def attention(config: LlamaConfig, layer: Params, x: Array, mask: Array, rotary: tuple[Array, Array]) -> Array:
    cosines, sines = rotary

    def heads(weight: Array) -> Array:
        return (x @ weight).reshape(*x.shape[:2], -1, config.model_dim // config.num_attn_heads)

    def turned(y: Array) -> Array:
        left, right = jnp.split(y, 2, -1)
        return jnp.concatenate([left * cosines - right * sines, right * cosines + left * sines], -1)

    query, key, value = turned(heads(layer["query"])), turned(heads(layer["key"])), heads(layer["value"])
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return mixed.reshape(x.shape) @ layer["output"]


def rms_norm(config: LlamaConfig, x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * weight
