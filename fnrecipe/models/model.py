"""A family of models: a class of configs, and pure functions of them. Nothing here imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import attrs

from fnrecipe.config.find import find_component, is_users
from fnrecipe.config.sections.model import FAMILIES, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fnrecipe.models.flops import TokenFlops
    from fnrecipe.models.hugging_face import HuggingFace
    from fnrecipe.nn import Logits, Noise
    from fnrecipe.nn.attention import AttentionScope
    from fnrecipe.nn.policy import Policy
    from fnrecipe.parallel.mesh import Placement
    from fnrecipe.tree import Tree

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class Apply(Protocol[C_contra]):
    """Logits [B, T, V] of tokens, segments and positions, int64 [B, T], as in `fnrecipe.data.Batch`."""

    def __call__(
        self,
        config: C_contra,
        params: Tree,
        tokens: Tensor,
        segments: Tensor,
        positions: Tensor,
        /,
        *,
        policy: Policy,
        scope: AttentionScope,
    ) -> Logits: ...


class NoisyApply(Protocol[C_contra]):
    """`Apply` with noise, whose numbers come from `key`, int64 [2]; None: there is no noise, as in an evaluation."""

    def __call__(
        self,
        config: C_contra,
        params: Tree,
        tokens: Tensor,
        segments: Tensor,
        positions: Tensor,
        key: Tensor | None,
        /,
        *,
        policy: Policy,
        scope: AttentionScope,
        noise: Noise,
    ) -> Logits: ...


class InitCache(Protocol[C_contra]):
    """An empty cache of so many rows and slots, which keeps keys and values in `dtype`."""

    def __call__(self, config: C_contra, rows: int, slots: int, dtype: torch.dtype, device: torch.device, /) -> Tree: ...


class Extend(Protocol[C_contra]):
    """Logits [B, V] behind one position of each row, and the cache with the keys and values of new tokens, int64 [B, T].

    Position p lies in slot p of the cache and attends to the slots up to it; those before `limit` are looked at. `last` [B]
    says of which of the T tokens the logits are. Padding may stand anywhere in a row, if its positions are later than those
    of the row's tokens.
    """

    def __call__(
        self,
        config: C_contra,
        params: Tree,
        cache: Tree,
        tokens: Tensor,
        positions: Tensor,
        last: Tensor,
        /,
        *,
        limit: int,
        policy: Policy,
    ) -> tuple[Tensor, Tree]: ...


@attrs.frozen
class Cached(Generic[C]):
    """A model applied to what follows tokens whose keys and values are kept: a pair of pure functions."""

    init: InitCache[C]
    extend: Extend[C]


@attrs.frozen
class Roles:
    """What `model.transfer` must know of a family whose parameters have the names of the others.

    scores            the parameter of each layer to which scores of attention are proportional, beside their 1 / √E; None: they
                      have no such factor, so that heads must keep their width
    writers           those to which what is added to the residual stream is proportional
    norm_offset       what norms add to their weights
    scaled_embedding  whether what is looked up is multiplied by the root of the width
    """

    scores: str | None
    writers: tuple[str, ...] = ("output", "down")
    norm_offset: float = 0.0
    scaled_embedding: bool = False


@attrs.frozen(kw_only=True)
class Family(Generic[C]):
    """What a config is resolved by.

    config        the class of its configs: frozen, by attrs, with `vocab_size`, `max_seq_len` and a default for each field
    archs         architectures by name, which `model.arch` takes
    parameters    config -> parameters of the vocabulary, and of the layers, to refuse what cannot fit; the config then also has
                  `num_layers`, `model_dim` and `ffn_inner_dim`. None: nothing is refused
    hugging_face  the names and keys of transformers' model of the family. None: there is none
    roles         what `model.transfer` must know of it. None: it has no rules for the family, and is refused
    """

    config: type[C]
    archs: Mapping[str, C] = attrs.field(factory=dict)
    parameters: Callable[[C], tuple[int, int]] | None = None
    hugging_face: HuggingFace[C] | None = None
    roles: Roles | None = None


@attrs.frozen(kw_only=True)
class Model(Family[C]):
    """A family with its functions.

    init   (config, key, place) -> parameters, each of them as `place(path, leaf)` leaves it (`fnrecipe.parallel.mesh`)
    apply  (config, parameters, tokens, segments, positions, policy=, scope=) -> logits
    flops  (config, length of a row) -> FLOPs a position, or None
    rules  config -> patterns of parameter paths, and the dimension along which tensor parallelism cuts them; those of its
           fields that are divided by it have the metadata `fnrecipe.config.affects.CUT`
    noisy  `apply` with what is random in training; None: the family has none, and a config that asks for it is refused
    stream `apply` to the end of the layers: the residual stream [B, T, D], which is no logits yet. None: nobody can look at it
    cached `apply` to a few tokens after others, for generation; None: to each token it is applied with all before it
    """

    init: Callable[[C, Tensor, Placement], Tree]
    apply: Apply[C]
    flops: Callable[[C, int], TokenFlops] | None = None
    rules: Callable[[C], Mapping[str, int]] = lambda config: {}
    noisy: NoisyApply[C] | None = None
    stream: Apply[C] | None = None
    cached: Cached[C] | None = None


def find_family(name: str) -> Family[ModelConfig]:
    """The torch-free part of the family that `model.family` names in a resolved config."""
    return find_component(name, FAMILIES)


def find_model(name: str) -> Model[ModelConfig]:
    """The family that `model.family` names in a resolved config."""
    if is_users(name):
        return cast("Model[ModelConfig]", find_component(name, FAMILIES))
    return cast("Model[ModelConfig]", importlib.import_module(f"{__package__}.{name}.model").model)
