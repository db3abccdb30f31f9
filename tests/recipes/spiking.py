"""The regression of `regression.py`, in whose stream two batches are spoiled: so their losses are spikes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np

from fnrecipe.config import GangSection, RegimeSection, SpikesSection
from fnrecipe.data import Cursor, LaneAssignment, Source, Stream, map_items, pipe
from fnrecipe.recipe import Recipe
from tests.recipes import regression
from tests.recipes.regression import Config, Pairs

SPOILED = 9, 14
"""The numbers of these batches, from 1; the first reader gives four rows a batch to the first of the processes."""
SPIKES = SpikesSection(window=4, bound=200.0, pass_over=3, max_rollbacks=3)
REGIME = RegimeSection(
    num_steps=20,
    checkpoint_every_n_steps=5,
    validate_every_n_steps=10,
    publish_metrics_every_n_steps=3,
    on_spike="rollback",
    spikes=SPIKES,
)


def spoil(entry: tuple[int, Pairs], spoiled: Sequence[int]) -> Pairs:
    number, batch = entry
    return attrs.evolve(batch, y=np.where(number in spoiled, batch.y + 1e3, batch.y).astype(np.float32))


def numbered(source: Source[Pairs], cursor: Cursor = None) -> Stream[tuple[int, Pairs]]:
    """The batches and their numbers: half of the readers give two rows a batch to each of their lanes."""
    for batch, after in source(cursor):
        yield (max(value for name, value in after.items() if name != "law" and value is not None) // 2, batch), after


def stream(config: Any, assignment: LaneAssignment, spoiled: Sequence[int] = SPOILED) -> Source[Pairs]:
    return pipe(regression.stream(config, assignment), numbered, partial(map_items, function=partial(spoil, spoiled=spoiled)))


def documents(config: Any, assignment: LaneAssignment) -> Source[Sequence[str]]:
    rows = pipe(regression.stream(config, assignment), numbered)
    return pipe(rows, partial(map_items, function=lambda entry: [f"batch:{entry[0]}"]))


recipe: Recipe[Config] = attrs.evolve(
    regression.recipe,
    name="spiking",
    config=Config(gang=GangSection(device="cpu", num_microbatches=2), regime=REGIME),
    stream=stream,
    documents=documents,
)
