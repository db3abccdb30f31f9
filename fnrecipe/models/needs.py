"""What the sections of a config need at least, by the family and the optimizer that they name. No torch here."""

from __future__ import annotations

from typing import cast

from fnrecipe.config import DatasetSection, GangSection, ModelSection, OptimizerSection, TrainerSection
from fnrecipe.config.find import find_component
from fnrecipe.config.needs import DecoderConfig, Need, decoder_needs, frozen_needs
from fnrecipe.config.sections.optim import OPTIMIZERS
from fnrecipe.models.model import find_family


def model_needs(
    model: ModelSection,
    optimizer: OptimizerSection,
    dataset: DatasetSection,
    gang: GangSection,
    trainer: TrainerSection,
    ranks: int,
) -> list[Need]:
    """What one of `ranks` processes needs to train the model; nothing that is known if its family does not tell.

    Where only some parameters are trained, or an adapter, gradients and moments are not counted.
    """
    count = find_family(model.family).parameters
    if count is None:
        return []
    names = [optimizer.of(group)[0] for group in optimizer.groups]
    moments = min(find_component(name, OPTIMIZERS).moments for name in [optimizer.name, *names])
    if optimizer.state_dtype is not None:  # in parameters, rounded down
        moments = moments * {"bfloat16": 2, "8bit": 1}[optimizer.state_dtype] // {"float32": 4, "bfloat16": 2}[model.dtype]
    moments += trainer.average is not None
    all_trained = model.adapter.name is None and trainer.trains is None
    kept = 2 + moments if all_trained else 1
    config = cast("DecoderConfig", model.config)
    return decoder_needs(config, model.dtype, count(model.config), kept, dataset, gang, trainer, ranks)


def reference_needs(model: ModelSection, dtype: str, gang: GangSection, ranks: int) -> list[Need]:
    """What one of `ranks` processes needs to keep a frozen copy of the model in `dtype`, if its family tells."""
    count = find_family(model.family).parameters
    return [] if count is None else frozen_needs(count(model.config), dtype, gang, ranks)
