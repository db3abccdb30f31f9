"""The least memory and time that a config needs, counted from it alone: before torch is imported and before anything is made.

Each count is a lower bound, and what is small is left out: a config that is found to need more than there is cannot run.
"""

from __future__ import annotations

from typing import Literal

from attrs import frozen

from fnrecipe.config.sections import DatasetSection, GangSection, LlamaConfig, ModelSection, TrainerSection

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BATCH_BYTES = 17
"""Of a position in a batch: segment, source and mask. Tokens, targets and positions take memory where there is text only."""
_TEXT_BYTES = 24
_READER_BYTES = 16_384
"""Of a reader with a window of short documents; measured 20 kB and more."""
_WORKER_BYTES = 8_000_000
"""Of a Python process with NumPy, without what it shares with others."""
_LAYER_BYTES = 1_000_000
"""Of a layer in the traced step, forward and backward; measured 3 MB."""
_LAYER_SECONDS = 0.2
"""Of tracing it; measured 0.56 of CPU time."""


@frozen
class Need:
    """The least memory and time of one process for one purpose.

    part       what a command must do to need it
    size       bytes
    seconds    before the first step
    keys       the values of the config that it follows from
    on_device  whether it is memory of the GPU where there is one
    """

    part: Literal["state", "graph", "batch", "stream", "workers"]
    what: str
    size: int
    keys: tuple[str, ...]
    on_device: bool = False
    seconds: float = 0.0


def llama_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Parameters of the vocabulary, embedding and head; and those of the layers and the last norm."""
    model, inner = config.model_dim, config.ffn_inner_dim
    groups = config.num_key_value_heads * (model // config.num_attn_heads)
    layer = 2 * model + 2 * model * model + 2 * groups * model + 3 * inner * model
    return config.vocab_size * model * (1 if config.tied_embeddings else 2), config.num_layers * layer + model


def llama_needs(
    model: ModelSection, dataset: DatasetSection, gang: GangSection, trainer: TrainerSection, ranks: int
) -> list[Need]:
    """What one of `ranks` processes needs to train a Llama by AdamW."""
    config, tensor = model.config, gang.tensor_parallel_size
    shard = 1 if gang.sharding == "replicate" else gang.shard_size or max(ranks // tensor, 1)
    whole = {"replicate": 4, "zero1": 2, "zero2": 1, "fsdp": 0}[gang.sharding]  # of parameters, gradients and two moments
    state = _BYTES[model.dtype] * (whole * shard + 4 - whole)
    vocabulary, layers = (number * state // (shard * tensor) for number in llama_parameters(config))
    positions = dataset.batch_size * dataset.max_seq_len // (gang.num_microbatches * tensor)
    activations = config.num_layers * positions * config.model_dim * _BYTES[trainer.dtype]
    batch_keys = ("dataset.batch_size", "dataset.max_seq_len", "gang.num_microbatches")
    return [
        Need("state", "the vocabulary's parameters, gradients and moments", vocabulary, _of("vocab_size", "model_dim"), True),
        Need(
            "state",
            "the layers' parameters, gradients and moments",
            layers,
            _of("num_layers", "model_dim", "ffn_inner_dim"),
            True,
        ),
        Need("state", "activations", activations, (*batch_keys, *_of("num_layers", "model_dim")), True),
        Need(
            "graph",
            "the graph of the step",
            config.num_layers * _LAYER_BYTES,
            _of("num_layers"),
            seconds=config.num_layers * _LAYER_SECONDS,
        ),
    ]


def stream_needs(dataset: DatasetSection, ranks: int) -> list[Need]:
    """What one of `ranks` processes needs to make batches."""
    positions, readers = dataset.batch_size * dataset.max_seq_len, dataset.num_readers or 1
    stream = positions * _TEXT_BYTES + readers * _READER_BYTES
    return [
        Need("batch", "a batch", positions * _BATCH_BYTES // ranks, ("dataset.batch_size", "dataset.max_seq_len")),
        Need("stream", "rows", stream // ranks, ("dataset.num_readers", "dataset.batch_size", "dataset.max_seq_len")),
        Need("workers", "data workers", dataset.num_workers * _WORKER_BYTES, ("dataset.num_workers",)),
    ]


def _of(*names: str) -> tuple[str, ...]:
    return tuple(f"model.config.{name}" for name in names)
