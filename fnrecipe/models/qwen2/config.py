"""The shapes of Qwen 2 and 2.5, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, all_layers, fixed, reader, rope, same, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class Qwen2Config(LlamaConfig):
    """Shape of a Llama whose queries, keys and values have biases."""


def parameters(config: Qwen2Config) -> dict[str, Parameter]:
    queries, keys = (number * config.head_width for number in (config.num_attn_heads, config.num_key_value_heads))
    biases = {"query_bias": queries, "key_bias": keys, "value_bias": keys}
    return {
        **llama_parameters(config),
        **in_layers({name: Parameter((width,), 0, "zeros") for name, width in biases.items()}),
    }


BASE = Qwen2Config(vocab_size=151936, max_seq_len=32768, rope_theta=1e6, norm_eps=1e-6)
ARCHS = {
    "qwen2_5_0_5b": evolve(
        BASE,
        model_dim=896,
        num_layers=24,
        num_attn_heads=14,
        num_key_value_heads=2,
        ffn_inner_dim=4864,
        tied_embeddings=True,
    ),
    "qwen2_5_1_5b": evolve(
        BASE,
        max_seq_len=131072,
        model_dim=1536,
        num_layers=28,
        num_attn_heads=12,
        num_key_value_heads=2,
        ffn_inner_dim=8960,
        tied_embeddings=True,
    ),
    "qwen2_5_3b": evolve(
        BASE,
        model_dim=2048,
        num_layers=36,
        num_attn_heads=16,
        num_key_value_heads=2,
        ffn_inner_dim=11008,
        tied_embeddings=True,
    ),
    "qwen2_5_7b": evolve(
        BASE,
        vocab_size=152064,
        max_seq_len=131072,
        model_dim=3584,
        num_layers=28,
        num_attn_heads=28,
        num_key_value_heads=4,
        ffn_inner_dim=18944,
    ),
}
"""By the shapes that were published."""

NAMES = {
    **DECODER_NAMES,
    "layers.*.query_bias": "model.layers.*.self_attn.q_proj.bias",
    "layers.*.key_bias": "model.layers.*.self_attn.k_proj.bias",
    "layers.*.value_bias": "model.layers.*.self_attn.v_proj.bias",
}
DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
KEYS: tuple[Keys[Qwen2Config], ...] = (
    same(defaults=DEFAULTS),
    rope(),
    fixed(hidden_act="silu", use_sliding_window=False),
    all_layers("layer_types", "full_attention"),
)

hugging_face = HuggingFace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Qwen2Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(
    config=Qwen2Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=Roles("query")
)
