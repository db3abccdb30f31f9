"""The sections that recipes build their config from: frozen attrs classes that hold plain values and nothing else.

Names are fairseq2's wherever the meaning is the same. A section may have a method `contradictions`, which yields a
`Problem` for every two values that cannot stand together; its paths are relative to the section.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.converters import optional

from fnrecipe.config.bounds import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PowerOfTwo,
    ProperFraction,
    Size,
    StepFraction,
)
from fnrecipe.config.paths import expanded
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
    """`dtype`: of the parameters and of what the optimizer keeps for them."""

    family: Literal["llama"] = "llama"
    dtype: Literal["float32", "bfloat16"] = "float32"
    config: LlamaConfig = field(factory=LlamaConfig)


@frozen
class DataSource:
    """A file, a directory, a glob or an address, or `stdlib:` for the sources of Python's library; and its share of the tokens.

    `weight_schedule`: points (tokens trained on, weight) that follow `weight`, joined by straight lines.
    In a config, its path alone may stand for a source, and a source alone for a list of one.
    """

    PLAIN_TEXT: ClassVar[str] = "path"

    path: str = field(converter=expanded)
    name: str | None = None
    format: Literal["auto", "jsonl", "parquet", "text", "python", "tokens"] = "auto"
    text_key: str = "text"
    separator: str | None = None
    dtype: Literal["uint16", "uint32"] = "uint16"
    weight: NonNegative = 1.0
    weight_schedule: tuple[tuple[Size, NonNegative], ...] = ()

    def contradictions(self) -> Iterator[Problem]:
        steps = [0, *(tokens for tokens, _ in self.weight_schedule)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            yield Problem("weight_schedule", "numbers of tokens above 0 that increase", str(steps[1:]))
        if self.weight == 0 and not any(weight for _, weight in self.weight_schedule):
            yield Problem("weight", "a number above 0, at least later in weight_schedule", "0")
        if not self.path:
            yield Problem("path", "a file, a directory, a glob or an address", "''")
        if self.separator == "":
            yield Problem("separator", "text, or null for one document a file", "''")


@frozen
class DatasetSection:
    sources: tuple[DataSource, ...] = (DataSource("stdlib:"),)
    valid_sources: tuple[DataSource, ...] = ()
    valid_fraction: ProperFraction = 0.05
    max_bad_records: Size = 0
    max_record_bytes: Count = 64 << 20
    order: Literal["blocks", "documents", "sequential"] = "blocks"
    shuffle_window: Count = 256
    finished_source: Literal["drop", "repeat", "stop"] = "drop"
    packing: Literal["best_fit", "concat"] = "best_fit"
    pack_window: Count = 512
    max_seq_len: Count = 1024
    attention: Literal["document", "row"] = "document"
    batch_size: Count = 8
    num_lanes: Count = 8
    num_readers: Count | None = None
    num_workers: Size = 0
    prefetch: Size = 2
    cache: str | None = field(default=None, converter=optional(expanded))

    def contradictions(self) -> Iterator[Problem]:
        if not self.sources:
            yield Problem("sources", "at least one source", "none")
        if self.valid_sources and self.valid_fraction > 0:
            yield Problem("valid_fraction", "0 where dataset.valid_sources is given", str(self.valid_fraction))
        if self.batch_size % self.num_lanes:
            yield Problem("batch_size", f"a multiple of dataset.num_lanes = {self.num_lanes}", str(self.batch_size))
        if self.num_workers and self.num_lanes % self.num_workers:
            yield Problem("num_workers", f"a divisor of dataset.num_lanes = {self.num_lanes}", str(self.num_workers))
        if self.num_readers and self.num_lanes % self.num_readers:
            yield Problem("num_readers", f"a divisor of dataset.num_lanes = {self.num_lanes}", str(self.num_readers))
        if self.order == "documents" and self.cache is not None:
            yield Problem("cache", "null for dataset.order=documents: the cache keeps blocks", repr(self.cache))
        if self.sources and not any(source.weight for source in self.sources):
            yield Problem("sources", "a source whose weight is above 0 from the start", "none")
        if self.sources and not any([source.weight, *(w for _, w in source.weight_schedule)][-1] for source in self.sources):
            yield Problem("sources", "a source whose weight is above 0 at the end", "none")
        names = source_names((*self.sources, *self.valid_sources))
        if len(set(names)) < len(names):
            yield Problem("sources", "a `name` of its own for each source of training and validation", ", ".join(names))


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """What sources are called in metrics: their `name`, or the last part of their path without its suffix."""
    return [source.name or source.path.rstrip("/:").rsplit("/", 1)[-1].split(".")[0] or source.path for source in sources]


@frozen
class TokenizerSection:
    """`byte`: one token a byte. `hf`: a Hugging Face `tokenizer.json` at `path`."""

    family: Literal["byte", "hf"] = "byte"
    path: str | None = field(default=None, converter=optional(expanded))
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = True
    add_eos: bool = True

    def contradictions(self) -> Iterator[Problem]:
        if self.family == "hf" and self.path is None:
            yield Problem("path", "the path of a tokenizer.json for tokenizer.family=hf", "null")
        if self.family == "byte":
            for name in ("path", "bos_token", "eos_token"):
                if getattr(self, name) is not None:
                    yield Problem(name, "null for tokenizer.family=byte", repr(getattr(self, name)))


@frozen
class GangSection:
    """`num_leaves`: micro-batches of the global batch, whatever the number of ranks; their sum is a fixed binary tree."""

    num_leaves: PowerOfTwo = 8
    sharding: Literal["replicate", "zero1", "zero2", "fsdp"] = "replicate"
    shard_size: PowerOfTwo | None = None
    tensor_parallel_size: Count = 1
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"
    reduction: Literal["invariant", "fast"] = "invariant"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Positive = 15.0


@frozen
class ActivationCheckpointingSection:
    """What is computed again for the gradient, instead of kept."""

    mode: Literal["off", "selective", "layerwise"] = "off"
    every_nth_layer: Count = 1

    def contradictions(self) -> Iterator[Problem]:
        if self.every_nth_layer > 1 and self.mode != "layerwise":
            expected = f"1 for trainer.activation_checkpointing.mode={self.mode}"
            yield Problem("every_nth_layer", expected, str(self.every_nth_layer))


@frozen
class TrainerSection:
    """`max_skipped_steps`: how many steps in a row may be skipped as not finite before the run stops.

    `fp16_loss_scale`: initial and minimum.
    """

    jit: Literal["auto", "off", "trace", "inductor"] = "auto"
    cuda_graph: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fp16_loss_scale: tuple[Positive, Positive] = (128.0, 1e-4)
    activation_checkpointing: ActivationCheckpointingSection = field(factory=ActivationCheckpointingSection)
    logits_at_once: Count | None = 1024
    max_grad_norm: Positive | None = 1.0
    max_skipped_steps: Count = 5

    def contradictions(self) -> Iterator[Problem]:
        if self.cuda_graph and self.jit == "off":
            yield Problem("cuda_graph", "false for trainer.jit=off", "true")
        initial, minimum = self.fp16_loss_scale
        if initial < minimum:
            yield Problem("fp16_loss_scale", "an initial scale of at least the minimum", f"{initial:g}, {minimum:g}")
        default = TrainerSection().fp16_loss_scale
        if self.dtype != "float16" and self.fp16_loss_scale != default:
            expected = f"{list(default)} for trainer.dtype={self.dtype}, which needs no loss scale"
            yield Problem("fp16_loss_scale", expected, str(list(self.fp16_loss_scale)))


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
    """`num_warmup_steps`: a number of steps, or a fraction of all steps (`schedule_steps`).

    `cycle_len`: steps from the peak to the final rate; null: all that `regime.num_steps` leaves after warm-up.
    """

    num_warmup_steps: Size | StepFraction = 0
    cycle_len: Count | None = None
    final_lr_scale: Fraction = 0.1


def schedule_steps(schedule: CosineAnnealingConfig, num_steps: int | None) -> tuple[int, int]:
    """Steps of warm-up, and steps up to the final rate, of a training of `num_steps` steps.

    A fraction of warm-up is one of `num_steps`, or, where that is None, of warm-up and cycle together; it is rounded, but never
    up to all steps.
    """
    written, cycle = schedule.num_warmup_steps, schedule.cycle_len
    if isinstance(written, int):
        warmup = written
    elif num_steps is not None:
        warmup = min(round(written * num_steps), num_steps - 1)
    else:
        warmup = round((cycle or 0) * written / (1 - written))
    return warmup, warmup + cycle if cycle else num_steps or 1


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
