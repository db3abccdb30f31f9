"""The model: its family and its shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen

from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.errors import Problem


@frozen
class LlamaConfig:
    """Shape of a Llama decoder. `ffn_inner_dim` is the width itself: no factor of 2/3 is applied to it."""

    vocab_size: PositiveInt = 32000
    max_seq_len: PositiveInt = 2048
    model_dim: PositiveInt = 4096
    num_layers: PositiveInt = 32
    num_attn_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 32
    ffn_inner_dim: PositiveInt = 11008
    tied_embeddings: bool = False
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02

    def conflicts(self) -> Iterator[Problem]:
        heads, groups = self.num_attn_heads, self.num_key_value_heads
        if self.model_dim % (2 * heads):
            expected = f"a multiple of 2 * num_attn_heads = {2 * heads} (rotary positions pair up the head's dimensions)"
            yield Problem("model_dim", expected, str(self.model_dim))
        if heads % groups:
            yield Problem("num_key_value_heads", f"a divisor of num_attn_heads = {heads}", str(groups))


@frozen
class ModelSection:
    """`dtype`: of the parameters and of what the optimizer keeps for them."""

    family: Literal["llama"] = "llama"
    dtype: Literal["float32", "bfloat16"] = "float32"
    config: LlamaConfig = field(factory=LlamaConfig)
