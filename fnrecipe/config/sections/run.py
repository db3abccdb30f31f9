"""The run: processes, the step, how long to train and what to do when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen

from fnrecipe.config.bounds import Count, Positive, PowerOfTwo, Size
from fnrecipe.errors import Problem


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
