"""The shapes of OLMo 3, free of torch."""

from __future__ import annotations

from attrs import evolve, frozen

from fnrecipe.config.bounds import PositiveInt
from fnrecipe.models.hugging_face import HuggingFace, stored
from fnrecipe.models.hugging_face_keys import DECODER_KEYS, Keys, fixed, reader, rope_by_kind, same, windows, writer
from fnrecipe.models.model import Family
from fnrecipe.models.olmo2.config import NAMES, ROLES, Olmo2Config, parameters
from fnrecipe.models.parameters import counted
from fnrecipe.models.rope import YarnScaling


@frozen
class Olmo3Config(Olmo2Config):
    """Shape of an OLMo 2 whose layers see the last `sliding_window` positions, but every `sliding_window_pattern`-th all.

    Only the rotary positions of the latter are scaled.
    """

    sliding_window: PositiveInt | None = 4096
    sliding_window_pattern: PositiveInt = 4
    rope_scaling: YarnScaling | None = None  # type: ignore[assignment] # the one kind of scaling that an OLMo 3 has


BASE = Olmo3Config(
    vocab_size=100278,
    max_seq_len=65536,
    rope_theta=500_000.0,
    norm_eps=1e-6,
    rope_scaling=YarnScaling(attention_factor=1.2079441541679836),
)
ARCHS = {
    "olmo3_7b": BASE,
    "olmo3_32b": evolve(BASE, model_dim=5120, num_layers=64, num_attn_heads=40, num_key_value_heads=8, ffn_inner_dim=27648),
}
"""By the shapes that were published, for long contexts."""

DEFAULTS = {"vocab_size": 50304, "num_attention_heads": 32, "num_key_value_heads": None, "sliding_window": 4096}
KEYS: tuple[Keys[Olmo3Config], ...] = (
    same({**DECODER_KEYS, "sliding_window": "sliding_window"}, DEFAULTS),
    rope_by_kind(500_000.0, "yarn"),
    windows(4),
    fixed(hidden_act="silu", attention_bias=False),
)

hugging_face = HuggingFace(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    tensors=lambda config: stored(NAMES, tied=config.tied_embeddings),
    read_config=reader(Olmo3Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(config=Olmo3Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=ROLES)
