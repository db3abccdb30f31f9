"""Where the parameters and the shape of a model lie in the files of Hugging Face: a value that a family gives. No torch here.

Its tables are data, read in both directions; a `config.json` is given as the mapping that its JSON is, and no file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import attrs

C = TypeVar("C")


@attrs.frozen
class Stored:
    """Where a parameter lies in Hugging Face's files: a part of the tensor `name`, transposed if that is kept [in, out].

    name   with `*` for the number of the layer: "model.layers.*.self_attn.q_proj.weight"
    part   which of `parts` equal parts along the first dimension of the tensor, once that is [out, in]
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


@attrs.frozen(kw_only=True)
class HuggingFace(Generic[C]):
    """A family as transformers knows it.

    model_type    of `config.json`: "llama"
    architecture  the class of the model: "LlamaForCausalLM"
    tensors       config -> pattern of our parameter paths ("layers.*.query") -> where such a parameter lies; one that is tied
                  to another is not there
    read_config   the mapping in a `config.json` of transformers 4 or 5 -> the config. Absent keys have transformers' defaults;
                  dtypes, dropout, token ids and everything else that is not the model's shape are not looked at
    write_config  config -> what `config.json` says of it in both versions, without `model_type` and `architectures`

    `read_config` raises a ConfigError that names each key with a wrong value, or one that the family cannot compute.
    """

    model_type: str
    architecture: str
    tensors: Callable[[C], Mapping[str, Stored]]
    read_config: Callable[[Mapping[str, object]], C]
    write_config: Callable[[C], dict[str, object]]


DECODER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers.*.attention_norm": "model.layers.*.input_layernorm.weight",
    "layers.*.query": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.key": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.value": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.output": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.gate": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.up": "model.layers.*.mlp.up_proj.weight",
    "layers.*.down": "model.layers.*.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Our parameters of a Llama, and where they lie."""


def stored(names: Mapping[str, str], *, tied: bool) -> dict[str, Stored]:
    """A table of names as one of places, without the head of a model whose head is the embedding."""
    return {path: Stored(name) for path, name in names.items() if not (tied and path == "head")}
