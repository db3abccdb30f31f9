"""The shapes of Mistrals, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.config.bounds import PositiveInt
from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import DECODER_KEYS, Keys, fixed, reader, rope, same, writer
from fnrecipe.models.llama.config import LlamaConfig
from fnrecipe.models.llama.config import parameters as llama_parameters
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import counted


@frozen
class MistralConfig(LlamaConfig):
    """Shape of a Llama whose positions attend to the last `sliding_window` of them; null: to all."""

    sliding_window: PositiveInt | None = None


SEVEN = MistralConfig(max_seq_len=32768, num_key_value_heads=8, ffn_inner_dim=14336)
ARCHS = {
    "mistral_7b_v0_1": evolve(SEVEN, sliding_window=4096),
    "mistral_7b_v0_3": evolve(SEVEN, vocab_size=32768, rope_theta=1e6),
}
"""By the shapes that were published."""

DEFAULTS = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
KEYS: tuple[Keys[MistralConfig], ...] = (
    same({**DECODER_KEYS, "sliding_window": "sliding_window"}, DEFAULTS),
    rope(),
    fixed(hidden_act="silu"),
)

hugging_face = HuggingFace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=lambda config: stored(DECODER_NAMES, tied=config.tied_embeddings),
    read_config=reader(MistralConfig, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(
    config=MistralConfig, archs=ARCHS, parameters=counted(llama_parameters), hugging_face=hugging_face, roles=Roles("query")
)
