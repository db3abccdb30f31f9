"""The least memory and time that a config needs, counted from it alone: before torch is imported and before anything is made.

Each count is a lower bound, and what is small is left out: a config that is found to need more than there is cannot run.
"""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import frozen

from fnrecipe.config.sections import DatasetSection, GangSection, TrainerSection

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


class DecoderConfig(Protocol):
    """What is read of a decoder's config."""

    @property
    def num_layers(self) -> int: ...

    @property
    def model_dim(self) -> int: ...


def decoder_needs(
    config: DecoderConfig,
    dtype: str,
    parameters: tuple[int, int],
    kept: int,
    dataset: DatasetSection,
    gang: GangSection,
    trainer: TrainerSection,
    ranks: int,
) -> list[Need]:
    """What one of `ranks` processes needs to train a decoder.

    dtype       of the parameters and moments
    parameters  of the vocabulary, embedding and head; and of the layers
    kept        tensors like the parameters: themselves, and where all are trained their gradients and moments
    """
    shard, tensor = _cuts(gang, ranks)
    whole = min(kept, {"replicate": kept, "zero1": 2, "zero2": 1, "fsdp": 0}[gang.sharding])
    what = "parameters, gradients and moments" if kept > 1 else "parameters"
    state = _BYTES[dtype] * (whole * shard + kept - whole)
    vocabulary, layers = (number * state // (shard * tensor) for number in parameters)
    positions = dataset.batch_size * dataset.max_seq_len // (gang.num_microbatches * tensor)
    activations = config.num_layers * positions * config.model_dim * _BYTES[trainer.dtype]
    batch_keys = ("dataset.batch_size", "dataset.max_seq_len", "gang.num_microbatches")
    return [
        Need("state", f"the vocabulary's {what}", vocabulary, _of("vocab_size", "model_dim"), True),
        Need(
            "state",
            f"the layers' {what}",
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


def frozen_needs(parameters: tuple[int, int], dtype: str, gang: GangSection, ranks: int) -> list[Need]:
    """What one of `ranks` processes needs to keep parameters that are not trained."""
    shard, tensor = _cuts(gang, ranks)
    size = sum(parameters) * _BYTES[dtype] // (shard * tensor)
    keys = _of("vocab_size", "num_layers", "model_dim", "ffn_inner_dim")
    return [Need("state", "the reference model's parameters", size, keys, True)]


def stream_needs(dataset: DatasetSection, ranks: int) -> list[Need]:
    """What one of `ranks` processes needs to make batches."""
    positions, readers = dataset.batch_size * dataset.max_seq_len, dataset.num_readers or 1
    stream = positions * _TEXT_BYTES + readers * _READER_BYTES
    return [
        Need("batch", "a batch", positions * _BATCH_BYTES // ranks, ("dataset.batch_size", "dataset.max_seq_len")),
        Need("stream", "rows", stream // ranks, ("dataset.num_readers", "dataset.batch_size", "dataset.max_seq_len")),
        Need("workers", "data workers", dataset.num_workers * _WORKER_BYTES, ("dataset.num_workers",)),
    ]


def _cuts(gang: GangSection, ranks: int) -> tuple[int, int]:
    """How many ranks share a replica of the state, and how many its single tensors."""
    tensor = gang.tensor_parallel_size
    return 1 if gang.sharding == "replicate" else gang.shard_size or max(ranks // tensor, 1), tensor


def _of(*names: str) -> tuple[str, ...]:
    return tuple(f"model.config.{name}" for name in names)
