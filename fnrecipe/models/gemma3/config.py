"""The shapes of Gemma 3 for text, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.models.gemma2 import config as gemma2
from fnrecipe.models.hugging_face import HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, fixed, reader, rope_by_kind, same, windows, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.model import Family
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class Gemma3Config(LlamaConfig):
    """Shape of a Gemma 2 with norms of query and key heads in the place of bounds.

    sliding_window          positions that a position sees; null: all
    sliding_window_pattern  of the layers, every so many see everything, and have the base `rope_theta`
    rope_local_theta        the base of the rotary frequencies of the others
    query_pre_attn_scalar   scores are divided by its root
    """

    tied_embeddings: bool = True
    head_dim: PositiveInt = 256
    rope_theta: Positive = 1e6
    rope_local_theta: Positive = 10000.0
    sliding_window: PositiveInt | None = 512
    sliding_window_pattern: PositiveInt = 6
    query_pre_attn_scalar: PositiveInt = 256


def parameters(config: Gemma3Config) -> dict[str, Parameter]:
    norm = Parameter((config.head_width,), start="zeros")
    return {**gemma2.parameters(config), **in_layers({"query_norm": norm, "key_norm": norm})}


BASE = Gemma3Config(vocab_size=262144, max_seq_len=32768, num_attn_heads=4, num_key_value_heads=1, norm_eps=1e-6)
ARCHS = {
    "gemma3_270m": evolve(BASE, model_dim=640, num_layers=18, ffn_inner_dim=2048),
    "gemma3_1b": evolve(BASE, model_dim=1152, num_layers=26, ffn_inner_dim=6912),
}
"""By the shapes that were published."""

NAMES = {
    **gemma2.NAMES,
    "layers.*.query_norm": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.key_norm": "model.layers.*.self_attn.k_norm.weight",
}
KEYS: tuple[Keys[Gemma3Config], ...] = (
    same(gemma2.OWN_KEYS, {**gemma2.DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}),
    rope_by_kind(1e6, "llama3", local=("rope_local_theta", 10000.0)),
    windows(6),
    fixed(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        use_bidirectional_attention=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
)

hugging_face = HuggingFace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Gemma3Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(config=Gemma3Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=gemma2.ROLES)
