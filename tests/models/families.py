"""Every family as a tiny model with random weights, and transformers' model with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fnrecipe import random, tree
from fnrecipe.models.model import Model, find_model
from fnrecipe.models.parameters import pattern
from fnrecipe.models.rope import Llama3Scaling, YarnScaling
from fnrecipe.tree import Tree
from tests.helpers import draw

SIZES = {
    "vocab_size": 64,
    "max_seq_len": 32,
    "model_dim": 32,
    "num_layers": 3,
    "num_attn_heads": 4,
    "ffn_inner_dim": 48,
    "norm_eps": 1e-3,
}
SCALED = {"rope_theta": 100.0, "rope_scaling": Llama3Scaling(4.0, original_max_position_embeddings=16)}
TINY: Mapping[str, dict[str, Any]] = {
    "llama": {**SCALED, "tied_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tied_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gpt2": {},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 5,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "head_dim": 12,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 7,
        "rope_theta": 300.0,
        "rope_local_theta": 100.0,
        "tied_embeddings": True,
    },
    "olmo2": {},
    "olmo3": {
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "rope_theta": 100.0,
        "rope_scaling": YarnScaling(4.0, 16, beta_fast=1.5, beta_slow=0.2),
    },
    "smollm3": {"no_rope_layer_interval": 2},
}
"""What each family has beside the sizes and two key-value heads."""


def tiny(family: str, **changes: Any) -> Any:
    """A config of the family."""
    cls = find_model(family).config
    given = {**SIZES, "num_key_value_heads": 2, **TINY[family], **changes}
    names = {field.name: field for field in attrs.fields(cls)}
    return cls(**{name: value for name, value in given.items() if name in names})


def random_params(model: Model[Any], config: Any) -> Tree:
    """Weights large enough that attention is far from uniform, and norms are not all 1."""
    like = model.init(config, random.key(0), lambda path, leaf: leaf)
    return tree.map(lambda leaf, noise: leaf + 0.2 * noise, like, draw(like, seed=1))


def places(model: Model[Any], config: Any, params: Tree) -> dict[str, tuple[Any, str]]:
    """For each of our paths: where it lies, and the name of that tensor."""
    assert model.hugging_face is not None
    stored = model.hugging_face.tensors(config)
    found = {}
    for path in tree.paths(params):
        place = stored[pattern(path)]
        number = next((part for part in path.split(".") if part.isdecimal()), "")
        found[path] = (place, place.name.replace("*", number))
    return found


def taken(place: Any, tensor: Tensor) -> Tensor:
    """Our parameter of their tensor."""
    return (tensor.T if place.transposed else tensor).chunk(place.parts)[place.part]


def reference(model: Model[Any], config: Any, params: Tree) -> Any:
    """Hugging Face's model with our weights."""
    import transformers  # not where ranks import this module: it takes seconds

    assert model.hugging_face is not None
    found = places(model, config, params)
    parts: dict[str, dict[int, Tensor]] = {}
    for path, leaf in tree.paths(params).items():
        place, name = found[path]
        parts.setdefault(name, {})[place.part] = leaf
    turned = {name for place, name in found.values() if place.transposed}
    whole = {name: torch.cat([tensors[number] for number in sorted(tensors)]) for name, tensors in parts.items()}
    values = {**model.hugging_face.write_config(config), "pad_token_id": None, "attn_implementation": "eager"}
    theirs = transformers.AutoConfig.for_model(model.hugging_face.model_type, **values)
    reference = getattr(transformers, model.hugging_face.architecture)(theirs).eval()
    state = {name: tensor.T if name in turned else tensor for name, tensor in whole.items()}
    ignored = {name for name, _ in reference.named_buffers()}
    missing, unknown = reference.load_state_dict(state, strict=False)
    assert unknown == []
    assert [name for name in missing if name not in ignored] == (["lm_head.weight"] if config.tied_embeddings else [])
    return reference
