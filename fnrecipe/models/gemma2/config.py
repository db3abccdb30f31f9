"""The shapes of Gemma 2, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import DECODER_KEYS, Keys, fixed, reader, rope, same, windows, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class Gemma2Config(LlamaConfig):
    """Shape of a decoder with norms before and behind each branch, GELUs, and scaled embeddings.

    sliding_window           positions that a position sees; null: all
    sliding_window_pattern   of the layers, every so many see everything
    query_pre_attn_scalar    scores are divided by its root
    attn_logit_softcapping   the bound of scores; null: none
    final_logit_softcapping  that of logits
    """

    tied_embeddings: bool = True
    head_dim: PositiveInt = 256
    sliding_window: PositiveInt | None = 4096
    sliding_window_pattern: PositiveInt = 2
    query_pre_attn_scalar: PositiveInt = 256
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0


def parameters(config: LlamaConfig) -> dict[str, Parameter]:
    """Norms multiply by one more than their weights."""
    norm = Parameter((config.model_dim,), start="zeros")
    norms = in_layers(dict.fromkeys(("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"), norm))
    return {**llama_parameters(config), **norms, "norm": norm}


BASE = Gemma2Config(vocab_size=256000, max_seq_len=8192, norm_eps=1e-6)
ARCHS = {
    "gemma2_2b": evolve(BASE, model_dim=2304, num_layers=26, num_attn_heads=8, num_key_value_heads=4, ffn_inner_dim=9216),
    "gemma2_9b": evolve(BASE, model_dim=3584, num_layers=42, num_attn_heads=16, num_key_value_heads=8, ffn_inner_dim=14336),
}
"""By the shapes that were published."""

NAMES = {
    **DECODER_NAMES,
    "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.ffn_norm": "model.layers.*.pre_feedforward_layernorm.weight",
    "layers.*.ffn_post_norm": "model.layers.*.post_feedforward_layernorm.weight",
}
OWN_KEYS = {**DECODER_KEYS, **{name: name for name in ("sliding_window", "query_pre_attn_scalar")}}
DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
KEYS: tuple[Keys[Gemma2Config], ...] = (
    same(
        {**OWN_KEYS, **{name: name for name in SOFTCAPS}},
        {**DEFAULTS, **SOFTCAPS, "vocab_size": 256000, "max_position_embeddings": 8192},
    ),
    rope(),
    windows(2),
    fixed(hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=None),
)

hugging_face = HuggingFace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Gemma2Config, *KEYS),
    write_config=writer(*KEYS),
)

ROLES = Roles(None, writers=("attention_post_norm", "ffn_post_norm"), norm_offset=1.0, scaled_embedding=True)
family = Family(config=Gemma2Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=ROLES)
