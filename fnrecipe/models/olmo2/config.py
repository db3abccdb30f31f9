"""The shapes of OLMo 2, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, fixed, reader, rope, same, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class Olmo2Config(LlamaConfig):
    """Shape of a Llama with norms behind attention and feed-forward layer, and of all query and all key heads together."""


def parameters(config: Olmo2Config) -> dict[str, Parameter]:
    queries, keys = (number * config.head_width for number in (config.num_attn_heads, config.num_key_value_heads))
    norms = {"query_norm": Parameter((queries,), 0, "ones"), "key_norm": Parameter((keys,), 0, "ones")}
    return {**llama_parameters(config), **in_layers(norms)}


BASE = Olmo2Config(vocab_size=100352, max_seq_len=4096, rope_theta=500_000.0, norm_eps=1e-6)
ARCHS = {
    "olmo2_1b": evolve(BASE, model_dim=2048, num_layers=16, num_attn_heads=16, num_key_value_heads=16, ffn_inner_dim=8192),
    "olmo2_7b": BASE,
    "olmo2_13b": evolve(BASE, model_dim=5120, num_layers=40, num_attn_heads=40, num_key_value_heads=40, ffn_inner_dim=13824),
}
"""By the shapes that were published."""

NAMES = {
    **DECODER_NAMES,
    "layers.*.attention_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.ffn_norm": "model.layers.*.post_feedforward_layernorm.weight",
    "layers.*.query_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.key_norm": "model.layers.*.self_attn.k_norm.weight",
}
DEFAULTS = {"vocab_size": 50304, "num_attention_heads": 32, "num_key_value_heads": None}
KEYS: tuple[Keys[Olmo2Config], ...] = (same(defaults=DEFAULTS), rope(), fixed(hidden_act="silu", attention_bias=False))

hugging_face = HuggingFace(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Olmo2Config, *KEYS),
    write_config=writer(*KEYS),
)

ROLES = Roles("query_norm", writers=("attention_norm", "ffn_norm"))
family = Family(config=Olmo2Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=ROLES)
