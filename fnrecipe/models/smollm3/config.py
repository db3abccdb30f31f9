"""The shapes of SmolLM 3, free of torch."""

from __future__ import annotations

from attrs import frozen

from fnrecipe.config.bounds import PositiveInt
from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, all_layers, every_nth, fixed, reader, rope, same, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import counted


@frozen
class SmolLM3Config(LlamaConfig):
    """Shape of a Llama of whose layers every `no_rope_layer_interval`-th does not rotate positions."""

    no_rope_layer_interval: PositiveInt = 4


ARCHS = {
    "smollm3_3b": SmolLM3Config(
        vocab_size=128256,
        max_seq_len=65536,
        model_dim=2048,
        num_layers=36,
        num_attn_heads=16,
        num_key_value_heads=4,
        tied_embeddings=True,
        rope_theta=5e6,
        norm_eps=1e-6,
    ),
}
"""By the shapes that were published."""

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
KEYS: tuple[Keys[SmolLM3Config], ...] = (
    same(defaults=DEFAULTS),
    rope(2e6),
    every_nth("no_rope_layer_interval", 4, values="no_rope_layers", interval="no_rope_layer_interval", nth=0, others=1),
    fixed(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False),
    all_layers("layer_types", "full_attention"),
)

hugging_face = HuggingFace(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    tensors=lambda config: stored(DECODER_NAMES, tied=config.tied_embeddings),
    read_config=reader(SmolLM3Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(
    config=SmolLM3Config, archs=ARCHS, parameters=counted(llama_parameters), hugging_face=hugging_face, roles=Roles("query")
)
