"""The shapes of Qwen 3, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.config.bounds import PositiveInt
from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, all_layers, fixed, reader, rope, same, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class Qwen3Config(LlamaConfig):
    """Shape of a Llama whose query and key heads are normalised, each by itself; the width of a head is always given."""

    head_dim: PositiveInt = 128


def parameters(config: Qwen3Config) -> dict[str, Parameter]:
    norm = Parameter((config.head_width,), start="ones")
    return {**llama_parameters(config), **in_layers({"query_norm": norm, "key_norm": norm})}


BASE = Qwen3Config(vocab_size=151936, max_seq_len=40960, num_key_value_heads=8, rope_theta=1e6, norm_eps=1e-6)
ARCHS = {
    "qwen3_0_6b": evolve(BASE, model_dim=1024, num_layers=28, num_attn_heads=16, ffn_inner_dim=3072, tied_embeddings=True),
    "qwen3_1_7b": evolve(BASE, model_dim=2048, num_layers=28, num_attn_heads=16, ffn_inner_dim=6144, tied_embeddings=True),
    "qwen3_4b": evolve(BASE, model_dim=2560, num_layers=36, ffn_inner_dim=9728, tied_embeddings=True),
    "qwen3_8b": evolve(BASE, num_layers=36, ffn_inner_dim=12288),
}
"""By the shapes that were published."""

NAMES = {
    **DECODER_NAMES,
    "layers.*.query_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.key_norm": "model.layers.*.self_attn.k_norm.weight",
}
DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
KEYS: tuple[Keys[Qwen3Config], ...] = (
    same(defaults=DEFAULTS),
    rope(),
    fixed(hidden_act="silu", attention_bias=False, use_sliding_window=False),
    all_layers("layer_types", "full_attention"),
)

hugging_face = HuggingFace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Qwen3Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(
    config=Qwen3Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=Roles("query_norm")
)
