"""A recipe that is no language model: regression of y on x, with a batch, a loss and an epoch of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from fnrecipe import optim, random
from fnrecipe.config import CommonSection, DatasetSection, GangSection, RegimeSection, TrainerSection
from fnrecipe.data import Cursor, LaneAssignment, Source, batch_lanes
from fnrecipe.loss import Loss, Sums
from fnrecipe.models.flops import TokenFlops
from fnrecipe.optim.transform import Transform
from fnrecipe.parallel.mesh import Placement
from fnrecipe.recipe import Evaluation, Recipe
from fnrecipe.transforms import unshard
from fnrecipe.tree import Tree

WIDTH = 128
EMPTY = np.zeros(WIDTH, np.float32), 0.0, False
Row = tuple[np.ndarray, float, bool]


@frozen(eq=False)
class Pairs:
    """Rows x [rows, WIDTH] and y [rows], both float32; `real` [rows] bool is false where the row is padding."""

    x: Any
    y: Any
    real: Any


@frozen
class Config:
    dataset: DatasetSection = field(factory=lambda: DatasetSection(num_lanes=8, num_readers=4))
    gang: GangSection = field(factory=lambda: GangSection(device="cpu"))
    trainer: TrainerSection = field(factory=TrainerSection)
    regime: RegimeSection = field(
        factory=lambda: RegimeSection(num_steps=20, checkpoint_every_n_steps=5, validate_every_n_steps=10)
    )
    common: CommonSection = field(factory=CommonSection)


def init(config: Config, key: Tensor, place: Placement) -> Tree:
    return {"weight": place("weight", random.normal(key, WIDTH, std=0.1)), "bias": place("bias", torch.zeros(()))}


def loss(config: Config) -> Loss:
    def of_batch(params: Tree, batch: Pairs, key: Tensor | None) -> tuple[Tensor, Sums]:
        whole = unshard(params)
        error = torch.where(batch.real, (batch.x @ whole["weight"] + whole["bias"] - batch.y) ** 2, 0).sum()
        return error, {"loss": error, "targets": batch.real.sum()}

    return of_batch


def update(config: Config) -> Transform:
    rate = optim.cosine_annealing(1e-1, num_warmup_steps=2, num_steps=20, final_scale=0.1)
    return optim.adamw(rate, max_norm=config.trainer.max_grad_norm)


def collate(rows: Sequence[Row]) -> Pairs:
    x, y, real = zip(*rows, strict=True)
    return Pairs(np.stack(x), np.array(y, np.float32), np.array(real, np.bool_))


def example(config: Config, rows: int) -> Pairs:
    return collate([EMPTY] * rows)


def reader(number: int, cursor: Cursor = None, *, seed: int) -> Iterator[tuple[Row, Cursor]]:
    """The rows of a reader, of which it gives two a step; the last two readers have rows for ten steps only."""
    for index in range(cursor or 0, 10_000 if number < 2 else 20):
        x = np.random.default_rng((seed, number, index)).normal(size=WIDTH).astype(np.float32)
        yield (x, float(x.sum()), True), index + 1


def rows(config: Config, assignment: LaneAssignment, seed: int) -> Source[Pairs]:
    dataset = config.dataset
    return partial(
        batch_lanes,
        [partial(reader, number, seed=seed) for number in range(dataset.num_readers or 1)],
        num_lanes=dataset.num_lanes,
        rows_per_lane=dataset.batch_size // dataset.num_lanes,
        collate=collate,
        padding=EMPTY,
        assignment=assignment,
    )


def stream(config: Config, assignment: LaneAssignment) -> Source[Pairs]:
    return rows(config, assignment, config.common.seed)


def validate(config: Config, assignment: LaneAssignment) -> Source[Pairs]:
    return lambda cursor: islice(rows(config, assignment, config.common.seed + 1)(cursor), 2)


def evaluations(config: Config) -> Mapping[str, Evaluation[Config]]:
    return {"valid": Evaluation(validate)}


def flops(config: Config) -> TokenFlops:
    return TokenFlops(6 * WIDTH, 6 * WIDTH)


recipe = Recipe("regression", Config(), init, loss, update, stream, example, evaluations, flops=flops)
