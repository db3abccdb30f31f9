"""The decoder that most families are: an embedding, layers that attend, a head. A family is a `Decoder` of a few functions.

A layer is written in pieces, each of which begins behind matrix products or attention and ends with its own products. So
`selective` recomputation, which is that of every piece, repeats no product; and a piece gathers the weights that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from fnrecipe import nn, random, tree
from fnrecipe.models.flops import TokenFlops, token_flops
from fnrecipe.models.model import Cached, Family, Model
from fnrecipe.models.parameters import Table, cuts, pattern, shapes
from fnrecipe.models.rope import Llama3Scaling, Rope, YarnScaling
from fnrecipe.nn.attention import AttentionMask, AttentionScope, attention_mask
from fnrecipe.nn.noise import Noise
from fnrecipe.nn.policy import Chunk, Policy
from fnrecipe.parallel.mesh import Placement, replicated, spans_ranks
from fnrecipe.transforms import unshard, unsharded_layer
from fnrecipe.transforms.region import region
from fnrecipe.tree import Tree

Angles = tuple[Tensor, Tensor] | tuple[()]
"""Cosines and sines of rotary positions; nothing where positions are not rotated."""

Heads = tuple[Tensor, Tensor, Tensor]
"""Query heads [B, H, T, E], key heads and value heads [B, G, T, E]."""


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


Drops = tuple[Tensor, Tensor] | tuple[()]
"""What dropout comes from: keys, int64 [2, 2], of what attention and feed-forward layer add, and `nn.position_numbers`."""


@attrs.frozen
class Piece:
    """Makes pieces of a layer: `function(config, weights, *activations)` of those weights called `names` that the layer has.

    wrap     what becomes of each function of weights
    dropout  the probability by which what is added to the residual stream is dropped
    drops    nothing where none is
    """

    wrap: Callable[[Callable[..., Tree]], Callable[..., Tree]]
    config: DecoderConfig
    weights: Tree
    dropout: float = 0.0
    drops: Drops = ()

    def __call__(self, function: Callable[..., Tree], *names: str) -> Callable[..., Tree]:
        return partial(self.wrap(partial(function, self.config)), self._named(names))

    def attended(self, function: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
        """(x, *activations) -> x plus what the function makes of the attention."""
        return self._added(0, function, names)

    def fed(self, function: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
        """(x, *activations) -> x plus what the function makes of the feed-forward layer."""
        return self._added(1, function, names)

    def _added(self, number: int, function: Callable[..., Tensor], names: tuple[str, ...]) -> Callable[..., Tensor]:
        def add(weights: Tree, drops: Drops, x: Tensor, *activations: Tensor) -> Tensor:
            written = function(self.config, weights, *activations)
            if drops:
                keys, numbers = drops
                written = nn.dropout(written, self.dropout, keys[number], numbers)
            return x + written

        return partial(self.wrap(add), self._named(names), self.drops)

    def _named(self, names: tuple[str, ...]) -> Tree:
        return {name: self.weights[name] for name in names if name in self.weights}


@attrs.frozen
class Kind:
    """A kind of layer: a position attends to the last `window` positions, or to all; and which rotary positions it has.

    scale    what multiplies the scores of attention; None: 1 / √E
    softcap  their bound; None: none
    """

    window: int | None = None
    rope: Rope | None = None
    scale: float | None = None
    softcap: float | None = None


@attrs.frozen(kw_only=True)
class Decoder(Generic[C]):
    """The functions of a family.

    table   config -> its parameters
    kind    (config, number of a layer) -> what kind of layer it is
    heads   (config, piece, x, angles) -> query, key and value heads of a layer
    rest    (config, piece, x, attention) -> x behind that layer, from the attention of the heads, [B, H, T, E]
    embed   (config, parameters outside of layers, embeddings of the tokens, positions) -> x
    logits  (config, parameters outside of layers, x, positions whose logits may be allocated at once) -> logits
    """

    table: Callable[[C], Table]
    kind: Callable[[C, int], Kind]
    heads: Callable[[C, Piece, Tensor, Angles], Heads]
    rest: Callable[[C, Piece, Tensor, Tensor], Tensor]
    logits: Callable[[C, Tree, Tensor, Chunk], nn.Logits]
    embed: Callable[[C, Tree, Tensor, Tensor], Tensor] = lambda config, outer, x, positions: x


def make_model(family: Family[C], decoder: Decoder[C]) -> Model[C]:
    """The family with the functions of the decoder."""
    return Model(
        **attrs.asdict(family, recurse=False),
        init=partial(init, decoder.table),
        apply=partial(apply, decoder),
        noisy=partial(apply, decoder),
        stream=partial(apply, attrs.evolve(decoder, logits=lambda config, outer, x, chunk: x)),
        flops=partial(flops, decoder),
        rules=lambda config: cuts(decoder.table(config)),
        cached=Cached(partial(init_cache, decoder), partial(extend, decoder)),
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
    key: Tensor | None = None,
    policy: Policy = Policy(),
    scope: AttentionScope = "document",
    noise: Noise = Noise(),
) -> nn.Logits:
    """Logits, [B, T, V]; tokens, segments and positions are int64 [B, T], as in `fnrecipe.data.Batch`.

    Where the scope is the row, that is one text whose positions go on from document to document: `positions` is not looked at.
    Masks and rotary positions are computed once for all layers of a kind. The numbers of the noise come from `key`, int64 [2];
    without one there is none.
    """
    if scope == "row":
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    kinds = [_within(decoder.kind(config, number), tokens.shape[1]) for number in range(config.num_layers)]
    outer = unshard({name: params[name] for name in params if name != "layers"})
    x, drops = _embedded(decoder, config, outer, (tokens, segments, positions), key, policy, noise)
    ropes = dict.fromkeys(kind.rope for kind in kinds)
    angles = {rope: _angles(rope, positions, config.head_width, x.dtype) for rope in ropes}
    windows = dict.fromkeys(kind.window for kind in kinds)
    masks = {window: attention_mask(segments, scope, window, policy.max_documents) for window in windows}
    recomputed = [policy.remat == "layerwise" and number % policy.every_nth_layer == 0 for number in range(config.num_layers)]
    hows = dict.fromkeys(zip(kinds, recomputed, strict=True))
    layers = {how: _layer(decoder, config, policy, noise.dropout, *how) for how in hows}
    for weights, kind, again, drop in zip(params["layers"].values(), kinds, recomputed, drops, strict=True):
        x = layers[kind, again](weights, x, angles[kind.rope], masks[kind.window], drop)
    return decoder.logits(config, outer, x, policy.logits_at_once)


def init_cache(decoder: Decoder[C], config: C, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tree:
    """A cache for each layer: slots in the structure of `params["layers"]`."""
    groups = decoder.table(config)["layers.*.key"].shape[0] // config.head_width

    def empty() -> Tensor:
        return torch.zeros(rows, groups, slots, config.head_width, dtype=dtype, device=device)

    return {str(number): nn.KeyValueCache(empty(), empty()) for number in range(config.num_layers)}


def extend(
    decoder: Decoder[C],
    config: C,
    params: Tree,
    cache: Tree,
    tokens: Tensor,
    positions: Tensor,
    last: Tensor,
    *,
    limit: int,
    policy: Policy = Policy(),
) -> tuple[Tensor, Tree]:
    """Logits [B, V] behind the tokens numbered `last`, and the longer cache (`fnrecipe.models.model.Extend`)."""
    kinds = [_within(decoder.kind(config, number), limit) for number in range(config.num_layers)]
    outer = unshard({name: params[name] for name in params if name != "layers"})
    x = decoder.embed(config, outer, _looked_up(outer, tokens, policy), positions)
    ropes = dict.fromkeys(kind.rope for kind in kinds)
    angles = {rope: _angles(rope, positions, config.head_width, x.dtype) for rope in ropes}
    masks = {window: nn.slot_mask(positions, limit, x.dtype, window) for window in dict.fromkeys(kind.window for kind in kinds)}
    layers, kept = {kind: _cached_layer(decoder, config, kind, limit) for kind in dict.fromkeys(kinds)}, {}
    for (name, weights), kind in zip(params["layers"].items(), kinds, strict=True):
        x, kept[name] = layers[kind](unshard(weights), cache[name], x, positions, angles[kind.rope], masks[kind.window])
    chosen = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1]))
    return nn.all_logits(decoder.logits(config, outer, chosen, None))[:, 0], kept


def _looked_up(outer: Tree, tokens: Tensor, policy: Policy) -> Tensor:
    x = nn.embedding(tokens, outer["embedding"])
    return x.to(policy.dtype or x.dtype)


def _embedded(
    decoder: Decoder[C],
    config: C,
    outer: Tree,
    rows: tuple[Tensor, Tensor, Tensor],
    key: Tensor | None,
    policy: Policy,
    noise: Noise,
) -> tuple[Tensor, Sequence[Drops]]:
    """What the layers begin with, of tokens, segments and positions, and what dropout in each of them comes from."""
    tokens, segments, positions = rows
    x, drops = _looked_up(outer, tokens, policy), [()] * config.num_layers
    if key is None or noise == Noise():
        return decoder.embed(config, outer, x, positions), drops
    keys = random.fold_in(key, torch.arange(2 + 2 * config.num_layers, device=key.device))
    numbers = nn.own_positions(nn.position_numbers(tokens), outer["embedding"])
    if noise.neftune:
        lengths = nn.own_positions(nn.document_sums(torch.ones_like(segments), segments), outer["embedding"])
        x = nn.embedding_noise(x, noise.neftune, keys[0], numbers, lengths)
    x = decoder.embed(config, outer, x, positions)
    if not noise.dropout:
        return x, drops
    return nn.dropout(x, noise.dropout, keys[1], numbers), [(keys[i : i + 2], numbers) for i in range(2, len(keys), 2)]


def _within(kind: Kind, length: int) -> Kind:
    """The kind without a window that holds a whole row of `length`, so that one mask serves all layers that see everything."""
    return kind if kind.window is None or kind.window < length else attrs.evolve(kind, window=None)


def _angles(rope: Rope | None, positions: Tensor, width: int, dtype: torch.dtype) -> Angles:
    """Rounded to the dtype of what is rotated: once, and not in each layer."""
    if rope is None:
        return ()
    scaled, sharper = _scaled(rope)
    cosines, sines = nn.rotary(positions, width, rope.theta, scaled, sharper)
    return cosines.to(dtype), sines.to(dtype)


def _scaled(rope: Rope) -> tuple[Callable[[Tensor], Tensor] | None, float]:
    """What scales the frequencies, and the factor on cosines and sines."""
    match rope.scaling:
        case None:
            return None, 1.0
        case Llama3Scaling():
            return partial(nn.llama3_scaled, **attrs.asdict(rope.scaling)), 1.0
        case YarnScaling(factor, length, sharpened, fast, slow):
            scaled = partial(nn.yarn_scaled, theta=rope.theta, factor=factor, length=length, fast=fast, slow=slow)
            return scaled, 1 + 0.1 * math.log(max(factor, 1)) if sharpened is None else sharpened


def attend(kind: Kind, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    if kind.softcap is None:
        return nn.attention(query, key, value, mask, kind.scale)
    return nn.softcapped_attention(query, key, value, mask, kind.softcap, kind.scale)


def _cached_layer(decoder: Decoder[C], config: C, kind: Kind, limit: int) -> Callable[..., tuple[Tensor, Tree]]:
    """A layer of a kind that stores keys and values, and attends to the first `limit` slots: a region, traced once."""

    def layer(
        weights: Tree, cache: nn.KeyValueCache, x: Tensor, positions: Tensor, angles: Angles, mask: AttentionMask
    ) -> tuple[Tensor, Tree]:
        piece = Piece(lambda function: function, config, weights)
        query, key, value = decoder.heads(config, piece, x, angles)
        kept = nn.stored(cache, key, value, positions)
        key, value = (slots[:, :, :limit].to(x.dtype) for slots in (kept.keys, kept.values))
        return decoder.rest(config, piece, x, attend(kind, query, key, value, mask)), kept

    return region(layer, "layer", inline=True)


def _layer(
    decoder: Decoder[C], config: C, policy: Policy, dropout: float, kind: Kind, recompute: bool
) -> Callable[..., Tensor]:
    """A layer of a kind that keeps what `policy` says for its gradient: a region, unless it gathers or has sums over ranks."""

    def layer(
        wrap: Callable[..., Callable[..., Tree]], weights: Tree, x: Tensor, angles: Angles, mask: AttentionMask, drops: Drops
    ) -> Tensor:
        piece = Piece(wrap, config, weights, dropout, drops)
        query, key, value = decoder.heads(config, piece, x, angles)
        mixed = attend(kind, query, key, value, mask)
        return decoder.rest(config, piece, x, mixed)

    if policy.remat == "selective":
        whole: Callable[..., Tensor] = partial(layer, partial(unsharded_layer, recompute=True))
    else:
        whole = unsharded_layer(partial(layer, lambda function: function), recompute=recompute)
    called = region(whole, "layer", inline=True)
    return lambda weights, *args: (whole if spans_ranks(weights) else called)(weights, *args)
