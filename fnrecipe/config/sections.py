"""The sections that recipes build their config from: frozen attrs classes that hold plain values and nothing else.

Names are fairseq2's wherever the meaning is the same. A section may have a method `contradictions`, which yields a
`Problem` for every two values that cannot stand together; its paths are relative to the section.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen

from fnrecipe.config.bounds import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PowerOfTwo,
    ProperFraction,
    Size,
)
from fnrecipe.errors import Problem


@frozen
class LlamaConfig:
    """Shape of a Llama decoder. `ffn_inner_dim` is the width itself: no factor of 2/3 is applied to it."""

    vocab_size: Count = 32000
    max_seq_len: Count = 2048
    model_dim: Count = 4096
    num_layers: Count = 32
    num_attn_heads: Count = 32
    num_key_value_heads: Count = 32
    ffn_inner_dim: Count = 11008
    tied_embeddings: bool = False
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02

    def contradictions(self) -> Iterator[Problem]:
        heads, groups = self.num_attn_heads, self.num_key_value_heads
        if self.model_dim % (2 * heads):
            expected = f"a multiple of 2 * num_attn_heads = {2 * heads} (rotary positions pair up the head's dimensions)"
            yield Problem("model_dim", expected, str(self.model_dim))
        if heads % groups:
            yield Problem("num_key_value_heads", f"a divisor of num_attn_heads = {heads}", str(groups))


@frozen
class ModelSection:
    family: Literal["llama"] = "llama"
    config: LlamaConfig = field(factory=LlamaConfig)


@frozen
class DataSource:
    """A JSONL file, a directory (all `*.jsonl` below it) or a glob, and its share of the tokens."""

    path: str
    weight: Positive = 1.0


@frozen
class DatasetSection:
    family: Literal["python_stdlib", "jsonl"] = "python_stdlib"
    sources: tuple[DataSource, ...] = ()
    valid_sources: tuple[DataSource, ...] = ()
    valid_fraction: ProperFraction = 0.05
    text_key: str = "text"
    max_seq_len: Count = 1024
    batch_size: Count = 8
    num_lanes: Count = 8
    pack_window: Count = 64
    prefetch: Size = 2

    def contradictions(self) -> Iterator[Problem]:
        if self.family == "jsonl" and not self.sources:
            yield Problem("sources", "at least one source for dataset.family=jsonl", "none")
        if self.family == "python_stdlib" and (self.sources or self.valid_sources):
            yield Problem("family", "jsonl where dataset.sources or dataset.valid_sources is given", self.family)
        if self.valid_sources and self.valid_fraction > 0:
            yield Problem("valid_fraction", "0 where dataset.valid_sources is given", str(self.valid_fraction))
        if self.batch_size % self.num_lanes:
            yield Problem("batch_size", f"a multiple of dataset.num_lanes = {self.num_lanes}", str(self.batch_size))


@frozen
class TokenizerSection:
    """`byte`: one token a byte. `hf`: a Hugging Face `tokenizer.json` at `path`."""

    family: Literal["byte", "hf"] = "byte"
    path: str | None = None
    eos_token: str | None = None

    def contradictions(self) -> Iterator[Problem]:
        if self.family == "hf" and self.path is None:
            yield Problem("path", "the path of a tokenizer.json for tokenizer.family=hf", "null")
        if self.family == "byte":
            for name in ("path", "eos_token"):
                if getattr(self, name) is not None:
                    yield Problem(name, "null for tokenizer.family=byte", repr(getattr(self, name)))


@frozen
class GangSection:
    """`num_leaves`: micro-batches of the global batch, whatever the number of ranks; their sum is a fixed binary tree."""

    num_leaves: PowerOfTwo = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"


@frozen
class TrainerSection:
    """`max_skipped_steps`: how many steps in a row may be skipped as not finite before the run stops."""

    jit: Literal["off", "trace"] = "trace"
    max_grad_norm: Positive | None = 1.0
    max_skipped_steps: Count = 5


@frozen
class AdamWConfig:
    lr: NonNegative = 3e-4
    betas: tuple[ProperFraction, ProperFraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1


@frozen
class OptimizerSection:
    name: Literal["adamw"] = "adamw"
    config: AdamWConfig = field(factory=AdamWConfig)


@frozen
class CosineAnnealingConfig:
    """`cycle_len`: steps from the peak to the final rate; null: all that `regime.num_steps` leaves after warm-up."""

    num_warmup_steps: Size = 0
    cycle_len: Count | None = None
    final_lr_scale: Fraction = 0.1


@frozen
class LRSchedulerSection:
    name: Literal["cosine_annealing"] = "cosine_annealing"
    config: CosineAnnealingConfig = field(factory=CosineAnnealingConfig)


@frozen
class RegimeSection:
    """How long to train and what to do when. A null interval means never; the last step is always saved and validated."""

    num_steps: Count | None = None
    num_data_epochs: Count | None = None
    checkpoint_every_n_steps: Count | None = 1000
    keep_last_n_checkpoints: Count | None = 3
    validate_every_n_steps: Count | None = 1000
    num_validation_batches: Count = 16
    publish_metrics_every_n_steps: Count = 10
    sample_prompt: str = ""
    num_sample_tokens: Size = 256

    def contradictions(self) -> Iterator[Problem]:
        if self.num_steps is None and self.num_data_epochs is None:
            yield Problem("num_steps", "a number where regime.num_data_epochs is null", "null")


@frozen
class TorchSection:
    """`num_threads`: threads of torch on the CPU; null: torch's own choice."""

    num_threads: Count | None = None


@frozen
class CommonSection:
    seed: Size = 2
    torch: TorchSection = field(factory=TorchSection)
