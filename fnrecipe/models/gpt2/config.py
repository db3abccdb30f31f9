"""The shapes of GPT-2, free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import field, frozen

from fnrecipe.config.affects import CUT
from fnrecipe.config.bounds import Positive, PositiveInt
from fnrecipe.errors import Problem
from fnrecipe.models.hugging_face import HuggingFace, Stored
from fnrecipe.models.hugging_face_keys import Keys, fixed, reader, same, writer
from fnrecipe.models.model import Family, Roles
from fnrecipe.models.parameters import Parameter, counted, in_layers


@frozen
class GPT2Config:
    """Shape of a decoder with an embedding of each position, biases, layer norms and a feed-forward layer without gates."""

    vocab_size: PositiveInt = field(default=50257, metadata=CUT)
    max_seq_len: PositiveInt = field(default=1024, metadata=CUT)
    model_dim: PositiveInt = 768
    num_layers: PositiveInt = 12
    num_attn_heads: PositiveInt = field(default=12, metadata=CUT)
    ffn_inner_dim: PositiveInt = field(default=3072, metadata=CUT)
    tied_embeddings: bool = True
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02

    @property
    def head_width(self) -> int:
        return self.model_dim // self.num_attn_heads

    def conflicts(self) -> Iterator[Problem]:
        if self.model_dim % self.num_attn_heads:
            yield Problem("model_dim", f"a multiple of num_attn_heads = {self.num_attn_heads}", str(self.model_dim))


def parameters(config: GPT2Config) -> dict[str, Parameter]:
    model, inner = config.model_dim, config.ffn_inner_dim
    layer = {
        **_norm("attention_norm", model),
        **_linear("query", (model, model), 0),
        **_linear("key", (model, model), 0),
        **_linear("value", (model, model), 0),
        **_linear("output", (model, model), 1),
        **_norm("ffn_norm", model),
        **_linear("up", (inner, model), 0),
        **_linear("down", (model, inner), 1),
    }
    embedding = Parameter((config.vocab_size, model), 0, looked_up=not config.tied_embeddings)
    positions = Parameter((config.max_seq_len, model), 0, looked_up=True)
    head = {} if config.tied_embeddings else {"head": Parameter((config.vocab_size, model), 0)}
    return {"embedding": embedding, "positions": positions, **in_layers(layer), **_norm("norm", model), **head}


def _norm(name: str, width: int) -> dict[str, Parameter]:
    return {name: Parameter((width,), start="ones"), f"{name}_bias": Parameter((width,), start="zeros")}


def _linear(name: str, shape: tuple[int, int], cut: int) -> dict[str, Parameter]:
    """A weight and its bias; those that are cut along their second dimension write to the residual stream."""
    weight = Parameter(shape, cut, "writer" if cut else "normal")
    return {name: weight, f"{name}_bias": Parameter(shape[:1], None if cut else 0, "zeros")}


ARCHS = {
    "gpt2": GPT2Config(),
    "gpt2_medium": GPT2Config(model_dim=1024, num_layers=24, num_attn_heads=16, ffn_inner_dim=4096),
    "gpt2_large": GPT2Config(model_dim=1280, num_layers=36, num_attn_heads=20, ffn_inner_dim=5120),
    "gpt2_xl": GPT2Config(model_dim=1600, num_layers=48, num_attn_heads=25, ffn_inner_dim=6400),
}
"""By the shapes that were published."""


def _both(ours: str, theirs: str, transposed: bool = False, part: int = 0, parts: int = 1) -> dict[str, Stored]:
    """Weight and bias of a module."""
    return {
        ours: Stored(f"{theirs}.weight", transposed, part, parts),
        f"{ours}_bias": Stored(f"{theirs}.bias", False, part, parts),
    }


STORED = {
    "embedding": Stored("transformer.wte.weight"),
    "positions": Stored("transformer.wpe.weight"),
    **_both("layers.*.attention_norm", "transformer.h.*.ln_1"),
    **_both("layers.*.query", "transformer.h.*.attn.c_attn", transposed=True, part=0, parts=3),
    **_both("layers.*.key", "transformer.h.*.attn.c_attn", transposed=True, part=1, parts=3),
    **_both("layers.*.value", "transformer.h.*.attn.c_attn", transposed=True, part=2, parts=3),
    **_both("layers.*.output", "transformer.h.*.attn.c_proj", transposed=True),
    **_both("layers.*.ffn_norm", "transformer.h.*.ln_2"),
    **_both("layers.*.up", "transformer.h.*.mlp.c_fc", transposed=True),
    **_both("layers.*.down", "transformer.h.*.mlp.c_proj", transposed=True),
    **_both("norm", "transformer.ln_f"),
    "head": Stored("lm_head.weight"),
}
NAMES = {
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
    "model_dim": "n_embd",
    "num_layers": "n_layer",
    "num_attn_heads": "n_head",
    "tied_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
}


def _read_inner(values: Mapping[str, object]) -> dict[str, object]:
    """Null is four times the width of the model."""
    inner, model = values.get("n_inner"), values.get("n_embd", 768)
    return {"ffn_inner_dim": 4 * model if inner is None and isinstance(model, int) else inner}


INNER: Keys[GPT2Config] = Keys(_read_inner, lambda config: {"n_inner": config.ffn_inner_dim}, {"ffn_inner_dim": "n_inner"})
KEYS: tuple[Keys[GPT2Config], ...] = (
    same(NAMES),
    INNER,
    fixed(
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    ),
)

hugging_face = HuggingFace(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=lambda config: {path: at for path, at in STORED.items() if not (config.tied_embeddings and path == "head")},
    read_config=reader(GPT2Config, *KEYS),
    write_config=writer(*KEYS),
)

family = Family(config=GPT2Config, archs=ARCHS, parameters=counted(parameters), hugging_face=hugging_face, roles=Roles("query"))
