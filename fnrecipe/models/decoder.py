"""The decoder that most families are: an embedding, layers that attend, a head. A family is a `Decoder` of a few functions.

A layer is written in pieces, each of which begins behind matrix products or attention and ends with its own products. So
`selective` recomputation, which is that of every piece, repeats no product; and a piece gathers the weights that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from fnrecipe import nn, random, tree
from fnrecipe.models.flops import TokenFlops, token_flops
from fnrecipe.models.model import Family, Model
from fnrecipe.models.parameters import Table, cuts, pattern, shapes
from fnrecipe.models.rope import Llama3Scaling, Rope, YarnScaling
from fnrecipe.nn.attention import AttentionMask, AttentionScope, attention_mask
from fnrecipe.nn.policy import Chunk, Policy
from fnrecipe.parallel.mesh import Placement, replicated
from fnrecipe.transforms import unshard, unsharded_layer
from fnrecipe.tree import Tree

Angles = tuple[Tensor, Tensor] | tuple[()]
"""Cosines and sines of rotary positions; nothing where positions are not rotated."""


class DecoderConfig(Protocol):
    """What is read of any decoder's config."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_attn_heads(self) -> int: ...

    @property
    def head_width(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...

    @property
    def init_std(self) -> float: ...


C = TypeVar("C", bound=DecoderConfig)


class Piece(Protocol):
    """A piece of a layer: `function(config, weights, *activations)` of the layer's weights called `names`, of those it has."""

    def __call__(self, function: Callable[..., Tree], *names: str) -> Callable[..., Tree]: ...


@attrs.frozen
class Kind:
    """A kind of layer: a position attends to the last `window` positions, or to all; and which rotary positions it has."""

    window: int | None = None
    rope: Rope | None = None


@attrs.frozen(kw_only=True)
class Decoder(Generic[C]):
    """The functions of a family.

    table   config -> its parameters
    kind    (config, number of a layer) -> what kind of layer it is
    layer   (config, piece, x, angles, mask) -> x
    embed   (config, parameters outside of layers, tokens, positions, dtype) -> x in that dtype
    logits  (config, parameters outside of layers, x, positions whose logits may be allocated at once) -> logits
    """

    table: Callable[[C], Table]
    kind: Callable[[C, int], Kind]
    layer: Callable[[C, Piece, Tensor, Angles, AttentionMask], Tensor]
    embed: Callable[[C, Tree, Tensor, Tensor, torch.dtype | None], Tensor]
    logits: Callable[[C, Tree, Tensor, Chunk], nn.Logits]


def make_model(family: Family[C], decoder: Decoder[C]) -> Model[C]:
    """The family with the functions of the decoder."""
    return Model(
        **attrs.asdict(family, recurse=False),
        init=partial(init, decoder.table),
        apply=partial(apply, decoder),
        flops=partial(flops, decoder),
        rules=lambda config: cuts(decoder.table(config)),
    )


def init(table: Callable[[C], Table], config: C, key: Tensor, place: Placement = replicated) -> Tree:
    """Parameters as the table says that they begin.

    Each matrix's key is folded over its path, so that no matrix depends on the others or on an order. `place(path, leaf)` is
    what becomes of each as soon as it is made, so that the whole need not be in one place.
    (Radford et al. 2019 for the scale of the residual writers.)
    """
    parameters, writer_std = table(config), config.init_std / math.sqrt(2 * config.num_layers)

    def leaf(path: str, shape: tuple[int, ...]) -> Tensor:
        start = parameters[pattern(path)].start
        if start in ("ones", "zeros"):
            return torch.full(shape, float(start == "ones"), device=key.device)
        std = writer_std if start == "writer" else config.init_std
        # The path begins with a dot: so it did when keys were first folded over it.
        return random.normal(random.fold_in(key, f".{path}"), *shape, std=std)

    def build(node: Tree, path: str) -> Tree:
        if isinstance(node, tuple):
            return place(path, leaf(path, node))
        return {name: build(child, f"{path}.{name}".removeprefix(".")) for name, child in node.items()}

    return build(shapes(parameters, config.num_layers), "")


def flops(decoder: Decoder[C], config: C, length: int) -> TokenFlops:
    """FLOPs of training on one position of rows of `length`."""
    table, width = decoder.table(config), config.num_attn_heads * config.head_width
    products = {path: parameter for path, parameter in table.items() if not parameter.looked_up}
    multiplied = tree.leaves(shapes(products, config.num_layers), lambda node: isinstance(node, tuple))
    windows = [decoder.kind(config, number).window or length for number in range(config.num_layers)]
    return token_flops(multiplied, windows=windows, width=width, length=length)


def apply(
    decoder: Decoder[C],
    config: C,
    params: Tree,
    tokens: Tensor,
    segments: Tensor,
    positions: Tensor,
    policy: Policy = Policy(),
    scope: AttentionScope = "document",
) -> nn.Logits:
    """Logits, [B, T, V]; tokens, segments and positions are int64 [B, T], as in `fnrecipe.data.Batch`.

    Where the scope is the row, that is one text whose positions go on from document to document: `positions` is not looked at.
    Masks and rotary positions are computed once for all layers of a kind.
    """
    if scope == "row":
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    kinds = [_within(decoder.kind(config, number), tokens.shape[1]) for number in range(config.num_layers)]
    angles = {rope: _angles(rope, positions, config.head_width) for rope in dict.fromkeys(kind.rope for kind in kinds)}
    outer = unshard({name: params[name] for name in params if name != "layers"})
    x = decoder.embed(config, outer, tokens, positions, policy.dtype)
    windows = dict.fromkeys(kind.window for kind in kinds)
    masks = {window: attention_mask(segments, scope, x.dtype, window, policy.max_documents) for window in windows}
    for number, (weights, kind) in enumerate(zip(params["layers"].values(), kinds, strict=True)):
        x = _layer(decoder, config, policy, number)(weights, x, angles[kind.rope], masks[kind.window])
    return decoder.logits(config, outer, x, policy.logits_at_once)


def _within(kind: Kind, length: int) -> Kind:
    """The kind without a window that holds a whole row of `length`, so that one mask serves all layers that see everything."""
    return kind if kind.window is None or kind.window < length else attrs.evolve(kind, window=None)


def _angles(rope: Rope | None, positions: Tensor, width: int) -> Angles:
    if rope is None:
        return ()
    match rope.scaling:
        case None:
            return nn.rotary(positions, width, rope.theta)
        case Llama3Scaling():
            return nn.rotary(positions, width, rope.theta, partial(nn.llama3_scaled, **attrs.asdict(rope.scaling)))
        case YarnScaling(factor, length, sharpened, fast, slow):
            scaled = partial(nn.yarn_scaled, theta=rope.theta, factor=factor, length=length, fast=fast, slow=slow)
            sharper = 1 + 0.1 * math.log(max(factor, 1)) if sharpened is None else sharpened
            return nn.rotary(positions, width, rope.theta, scaled, sharper)


def _layer(decoder: Decoder[C], config: C, policy: Policy, number: int) -> Callable[..., Tensor]:
    """A layer that keeps what `policy` says for its gradient."""

    def layer(
        wrap: Callable[..., Callable[..., Tree]], weights: Tree, x: Tensor, angles: Angles, mask: AttentionMask
    ) -> Tensor:
        def piece(function: Callable[..., Tree], *names: str) -> Callable[..., Tree]:
            return partial(wrap(partial(function, config)), {name: weights[name] for name in names if name in weights})

        return decoder.layer(config, piece, x, angles, mask)

    if policy.remat == "selective":
        return partial(layer, partial(unsharded_layer, recompute=True))
    return unsharded_layer(
        partial(layer, lambda function: function),
        recompute=policy.remat == "layerwise" and number % policy.every_nth_layer == 0,
    )
