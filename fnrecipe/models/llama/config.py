"""The shapes of Llamas, free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import field, frozen

from fnrecipe.config.affects import CUT
from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.errors import Problem
from fnrecipe.models.hugging_face import DECODER_NAMES, HuggingFace, stored
from fnrecipe.models.hugging_face_keys import Keys, fixed, reader, rope, same, writer
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers
from fnrecipe.models.rope import Llama3Scaling


@frozen
class LlamaConfig:
    """Shape of a Llama decoder. `ffn_inner_dim` is the width itself: no factor of 2/3 is applied to it.

    `head_dim`: width of a head; null: model_dim / num_attn_heads. `rope_scaling`: null: as in the first two Llamas.
    """

    vocab_size: PositiveInt = field(default=32000, metadata=CUT)
    max_seq_len: PositiveInt = 2048
    model_dim: PositiveInt = 4096
    num_layers: PositiveInt = 32
    num_attn_heads: PositiveInt = field(default=32, metadata=CUT)
    num_key_value_heads: PositiveInt = field(default=32, metadata=CUT)
    head_dim: PositiveInt | None = None
    ffn_inner_dim: PositiveInt = field(default=11008, metadata=CUT)
    tied_embeddings: bool = False
    rope_theta: Positive = 10000.0
    rope_scaling: Llama3Scaling | None = None
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02

    @property
    def head_width(self) -> int:
        return self.head_dim or self.model_dim // self.num_attn_heads

    def conflicts(self) -> Iterator[Problem]:
        heads, groups = self.num_attn_heads, self.num_key_value_heads
        pairs = "rotary positions pair up the head's dimensions"
        if self.head_dim is None and self.model_dim % (2 * heads):
            yield Problem("model_dim", f"a multiple of 2 * num_attn_heads = {2 * heads} ({pairs})", str(self.model_dim))
        if self.head_dim is not None and self.head_dim % 2:
            yield Problem("head_dim", f"an even number ({pairs})", str(self.head_dim))
        if heads % groups:
            yield Problem("num_key_value_heads", f"a divisor of num_attn_heads = {heads}", str(groups))


def parameters(config: LlamaConfig) -> dict[str, Parameter]:
    """Whole heads, feed-forward units and rows of the vocabulary are cut."""
    model, inner = config.model_dim, config.ffn_inner_dim
    queries, keys = (number * config.head_width for number in (config.num_attn_heads, config.num_key_value_heads))
    norm = Parameter((model,), start="ones")
    layer = {
        "attention_norm": norm,
        "query": Parameter((queries, model), 0),
        "key": Parameter((keys, model), 0),
        "value": Parameter((keys, model), 0),
        "output": Parameter((model, queries), 1, "writer"),
        "ffn_norm": norm,
        "gate": Parameter((inner, model), 0),
        "up": Parameter((inner, model), 0),
        "down": Parameter((model, inner), 1, "writer"),
    }
    embedding = Parameter((config.vocab_size, model), 0, looked_up=not config.tied_embeddings)
    head = {} if config.tied_embeddings else {"head": Parameter((config.vocab_size, model), 0)}
    return {"embedding": embedding, **in_layers(layer), "norm": norm, **head}


num_parameters = counted(parameters)

ARCHS = {
    "llama_tiny": LlamaConfig(
        vocab_size=264,
        max_seq_len=256,
        model_dim=256,
        num_layers=4,
        num_attn_heads=4,
        num_key_value_heads=2,
        ffn_inner_dim=688,
        tied_embeddings=True,
    ),
    "llama_125m": LlamaConfig(model_dim=768, num_layers=12, num_attn_heads=12, num_key_value_heads=12, ffn_inner_dim=2048),
    "llama_1b": LlamaConfig(model_dim=2048, num_layers=22, num_key_value_heads=4, ffn_inner_dim=5632),  # TinyLlama's
    "llama2_7b": LlamaConfig(max_seq_len=4096),
    "llama3_8b": LlamaConfig(
        vocab_size=128256, max_seq_len=8192, num_key_value_heads=8, ffn_inner_dim=14336, rope_theta=500_000.0
    ),
    "llama3_1_8b": LlamaConfig(
        vocab_size=128256,
        max_seq_len=131072,
        num_key_value_heads=8,
        ffn_inner_dim=14336,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(),
    ),
    "llama3_2_1b": LlamaConfig(
        vocab_size=128256,
        max_seq_len=131072,
        model_dim=2048,
        num_layers=16,
        num_key_value_heads=8,
        head_dim=64,
        ffn_inner_dim=8192,
        tied_embeddings=True,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=32.0),
    ),
    "llama3_2_3b": LlamaConfig(
        vocab_size=128256,
        max_seq_len=131072,
        model_dim=3072,
        num_layers=28,
        num_attn_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        ffn_inner_dim=8192,
        tied_embeddings=True,
        rope_theta=500_000.0,
        rope_scaling=Llama3Scaling(factor=32.0),
    ),
    "smollm2_135m": LlamaConfig(
        vocab_size=49152,
        max_seq_len=8192,
        model_dim=576,
        num_layers=30,
        num_attn_heads=9,
        num_key_value_heads=3,
        ffn_inner_dim=1536,
        tied_embeddings=True,
        rope_theta=100_000.0,
    ),
    "smollm2_360m": LlamaConfig(
        vocab_size=49152,
        max_seq_len=8192,
        model_dim=960,
        num_attn_heads=15,
        num_key_value_heads=5,
        ffn_inner_dim=2560,
        tied_embeddings=True,
        rope_theta=100_000.0,
    ),
    "smollm2_1_7b": LlamaConfig(
        vocab_size=49152,
        max_seq_len=8192,
        model_dim=2048,
        num_layers=24,
        ffn_inner_dim=8192,
        tied_embeddings=True,
        rope_theta=130_000.0,
    ),
}
"""By the shapes that were published."""

KEYS: tuple[Keys[LlamaConfig], ...] = (
    same(defaults={"num_attention_heads": 32, "num_key_value_heads": None, "rms_norm_eps": 1e-6}),
    rope(),
    fixed(hidden_act="silu", attention_bias=False, mlp_bias=False),
)

hugging_face = HuggingFace(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=lambda config: stored(DECODER_NAMES, tied=config.tied_embeddings),
    read_config=reader(LlamaConfig, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(config=LlamaConfig, archs=ARCHS, parameters=num_parameters, hugging_face=hugging_face, roles=Roles("query"))
