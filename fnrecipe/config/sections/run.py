"""The run: processes, the step, how long to train and what to do when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from attrs import field, frozen

from fnrecipe.config.affects import RUNTIME
from fnrecipe.config.bounds import NonNegativeInt, Positive, PositiveInt, PowerOfTwo, ProperFraction
from fnrecipe.config.patterns import tag_conflicts
from fnrecipe.errors import Problem


@frozen
class GangSection:
    """`num_microbatches`: microbatches of the global batch, whatever the number of ranks; their sum is a fixed binary tree."""

    num_microbatches: PowerOfTwo = 8
    sharding: Literal["replicate", "zero1", "zero2", "fsdp"] = field(default="replicate", metadata=RUNTIME)
    shard_size: PowerOfTwo | None = field(default=None, metadata=RUNTIME)
    tensor_parallel_size: PositiveInt = field(default=1, metadata=RUNTIME)
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"
    reduction: Literal["invariant", "fast"] = "invariant"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Positive = field(default=15.0, metadata=RUNTIME)
    step_timeout: Positive = field(default=2.0, metadata=RUNTIME)


@frozen
class ActivationCheckpointingSection:
    """What is computed again for the gradient, instead of kept."""

    mode: Literal["off", "selective", "layerwise"] = "off"
    every_nth_layer: PositiveInt = 1

    def conflicts(self) -> Iterator[Problem]:
        if self.every_nth_layer > 1 and self.mode != "layerwise":
            expected = f"1 for trainer.activation_checkpointing.mode={self.mode}"
            yield Problem("every_nth_layer", expected, str(self.every_nth_layer))


@frozen
class AverageSection:
    """An average of the parameters over steps, which is kept beside them.

    decay     of an exponential average; null: all steps count alike
    start     the step behind which it begins; up to there it is the parameters
    every     which of the steps behind that are averaged
    evaluate  whether validations, the sample and the export at the end of a run are of the average
    """

    decay: ProperFraction | None = 0.999
    start: NonNegativeInt = 0
    every: PositiveInt = 1
    evaluate: bool = True


@frozen
class TrainerSection:
    """`max_skipped_steps`: how many steps in a row may be skipped as not finite before the run stops.

    `trains`: patterns of the paths of parameters that are trained, or tags, of those that the recipe trains; null: all of them.
    `fp16_loss_scale`: initial and minimum.
    """

    jit: Literal["auto", "off", "trace", "inductor"] = "auto"
    cuda_graph: Literal["auto"] | bool = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    fp16_loss_scale: tuple[Positive, Positive] = (128.0, 1e-4)
    activation_checkpointing: ActivationCheckpointingSection = field(factory=ActivationCheckpointingSection)
    logits_at_once: Literal["auto"] | PositiveInt | None = "auto"
    max_grad_norm: Positive | None = 1.0
    trains: tuple[str, ...] | None = None
    neftune_noise_alpha: Positive | None = None
    max_skipped_steps: PositiveInt = 5
    average: AverageSection | None = None

    def conflicts(self) -> Iterator[Problem]:
        if self.cuda_graph is True and self.jit == "off":
            yield Problem("cuda_graph", "auto or false for trainer.jit=off", "true")
        if self.trains == ():
            yield Problem("trains", "a pattern of the paths of parameters, or null for all", "[]")
        yield from tag_conflicts("trains", self.trains or ())
        initial, minimum = self.fp16_loss_scale
        if initial < minimum:
            yield Problem("fp16_loss_scale", "an initial scale of at least the minimum", f"{initial:g}, {minimum:g}")
        default = TrainerSection().fp16_loss_scale
        if self.dtype != "float16" and self.fp16_loss_scale != default:
            expected = f"{list(default)} for trainer.dtype={self.dtype}, which needs no loss scale"
            yield Problem("fp16_loss_scale", expected, str(list(self.fp16_loss_scale)))


@frozen
class SpikesSection:
    """What a spike is, and how the run goes back from one.

    window         steps that were made by whose losses and gradient norms the next one is judged
    bound          how many MADs above their median a spike begins
    pass_over      batches that are passed over when the run goes back, that of the spike the last one
    max_rollbacks  how often the run goes back before it ends with an error
    """

    window: PositiveInt = 128
    bound: Positive = 10.0
    pass_over: PositiveInt = 100
    max_rollbacks: PositiveInt = 10


@frozen
class RegimeSection:
    """How long to train, what to do when, and what to keep. A null interval means never.

    The last step is always saved and validated, and a run that a signal or `max_minutes` ends saves first.

    `batch_size_schedule`: pairs (last step, rows) of steps that take less than `dataset.batch_size` rows, first to last.

    `on_spike`: what is done at a step whose loss or gradient norm is far above those before it.
    """

    num_steps: PositiveInt | None = None
    num_data_epochs: PositiveInt | None = None
    batch_size_schedule: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    max_minutes: Positive | None = field(default=None, metadata=RUNTIME)
    checkpoint_every_n_steps: PositiveInt | None = field(default=1000, metadata=RUNTIME)
    checkpoint_every_n_minutes: Positive | None = field(default=None, metadata=RUNTIME)
    checkpoint_in_background: bool = field(default=True, metadata=RUNTIME)
    keep_last_n_checkpoints: PositiveInt | None = field(default=3, metadata=RUNTIME)
    keep_checkpoint_every_n_steps: PositiveInt | None = field(default=None, metadata=RUNTIME)
    keep_best_n_checkpoints: PositiveInt | None = field(default=None, metadata=RUNTIME)
    score_metric: str = field(default="valid/loss", metadata=RUNTIME)
    lower_score_is_better: bool = field(default=True, metadata=RUNTIME)
    keep_model_only: bool = field(default=False, metadata=RUNTIME)
    copy_checkpoints_to: str | None = field(default=None, metadata=RUNTIME)
    validate_every_n_steps: PositiveInt | None = 1000
    num_validation_batches: PositiveInt = 16
    publish_metrics_every_n_steps: PositiveInt = 10
    on_spike: Literal["ignore", "skip", "rollback"] = "ignore"
    spikes: SpikesSection = field(factory=SpikesSection)
    hash_every_n_steps: PositiveInt | None = field(default=None, metadata=RUNTIME)
    recompute_every_n_steps: PositiveInt | None = field(default=None, metadata=RUNTIME)
    sample_prompt: str = ""
    num_sample_tokens: NonNegativeInt = 256
    export_hugging_face: bool = field(default=False, metadata=RUNTIME)

    def conflicts(self) -> Iterator[Problem]:
        if self.num_steps is None and self.num_data_epochs is None:
            yield Problem("num_steps", "a number where regime.num_data_epochs is null", "null")
        older = self.keep_checkpoint_every_n_steps or self.keep_best_n_checkpoints
        if self.keep_last_n_checkpoints is None and older:
            name = "keep_checkpoint_every_n_steps" if self.keep_checkpoint_every_n_steps else "keep_best_n_checkpoints"
            expected = "null where regime.keep_last_n_checkpoints is null, by which all are kept"
            yield Problem(name, expected, str(getattr(self, name)))
        if self.keep_model_only and not older:
            expected = "false where neither regime.keep_checkpoint_every_n_steps nor keep_best_n_checkpoints keeps older ones"
            yield Problem("keep_model_only", expected, "true")
        if not all(self.score_metric.partition("/")):
            yield Problem("score_metric", "EVALUATION/NAME, such as valid/loss", repr(self.score_metric))
        if self.copy_checkpoints_to is not None and not self.copy_checkpoints_to.strip():
            yield Problem(
                "copy_checkpoints_to", "an address, a directory, or null for no copies", repr(self.copy_checkpoints_to)
            )
        if self.batch_size_schedule and self.on_spike == "rollback":
            expected = "[] for regime.on_spike=rollback, which passes over batches and not over parts of them"
            yield Problem("batch_size_schedule", expected, str([list(pair) for pair in self.batch_size_schedule]))
        default = SpikesSection()
        unread = {"ignore": ("window", "bound", "pass_over", "max_rollbacks"), "skip": ("pass_over", "max_rollbacks")}
        for name in unread.get(self.on_spike, ()):
            found, usual = getattr(self.spikes, name), getattr(default, name)
            if found != usual:
                yield Problem(
                    f"spikes.{name}", f"{usual:g} for regime.on_spike={self.on_spike}, which does not read it", f"{found:g}"
                )

    def part(self, step: int, batch_size: int) -> tuple[int, int]:
        """Which part of a batch that is read the step, counted from 1, takes; and of how many."""
        begun = 0
        for last, rows in self.batch_size_schedule:
            if step <= last:
                parts = batch_size // rows
                return (step - 1 - begun) % parts, parts
            begun = last
        return 0, 1

    def batch_size_conflicts(self, batch_size: int, num_microbatches: int) -> Iterator[Problem]:
        """What of the schedule does not cut batches of so many rows, in so many microbatches, into equal parts."""
        for number, ((begun, _), (last, rows)) in enumerate(pairwise([(0, 0), *self.batch_size_schedule])):
            where = f"batch_size_schedule[{number}]"
            if batch_size % rows or rows % num_microbatches:
                of = f"gang.num_microbatches = {num_microbatches} that divide dataset.batch_size = {batch_size}"
                yield Problem(f"{where}[1]", f"rows that are a multiple of {of}", str(rows))
            elif last <= begun or (last - begun) % (batch_size // rows):
                expected = f"{begun} and a multiple of {batch_size // rows}, the steps of {rows} rows that use up a batch"
                yield Problem(f"{where}[0]", expected, str(last))


@frozen
class TorchSection:
    """`num_threads`: threads of torch on the CPU; null: torch's own choice.

    `deterministic`: kernels that give the same bits each time.
    """

    num_threads: PositiveInt | None = None
    deterministic: bool = False


@frozen
class TensorBoardSection:
    """`enabled`: null: where TensorBoard is installed."""

    enabled: bool | None = field(default=None, metadata=RUNTIME)


@frozen
class WandbSection:
    """`entity`, `project`, `run_name`, `mode`: as in `wandb.init`; the run is named after its directory by default."""

    enabled: bool = field(default=False, metadata=RUNTIME)
    entity: str | None = field(default=None, metadata=RUNTIME)
    project: str = field(default="fnrecipe", metadata=RUNTIME)
    run_name: str | None = field(default=None, metadata=RUNTIME)
    mode: Literal["online", "offline"] | None = field(default=None, metadata=RUNTIME)


@frozen
class MetricRecordersSection:
    """Who records metrics beside the JSON lines, which are always written."""

    tensorboard: TensorBoardSection = field(factory=TensorBoardSection)
    wandb: WandbSection = field(factory=WandbSection)


@frozen
class CommonSection:
    seed: NonNegativeInt = 2
    torch: TorchSection = field(factory=TorchSection)
    metric_recorders: MetricRecordersSection = field(factory=MetricRecordersSection)
