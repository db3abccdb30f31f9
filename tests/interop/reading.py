"""Reading the weights of a directory, here and on several ranks; without transformers, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from fnrecipe import random, tree
from fnrecipe.config import ModelSection
from fnrecipe.interop import pretrained
from fnrecipe.parallel.mesh import Placement, replicated
from fnrecipe.tree import Tree
from tests.helpers import assert_same_bits
from tests.ranks import assembled, mesh_of


def section(path: Path, **changes: Any) -> ModelSection:
    return attrs.evolve(ModelSection(path=str(path)), **changes)


def read(path: Path, place: Placement = replicated, **changes: Any) -> Tree:
    return pretrained(section(path, **changes), random.key(0), place)


def check_shards(rank: int, size: int, path: Path) -> None:
    """Whether each rank reads its shards, and all of them make up what one process reads."""
    mine, whole = read(path, mesh_of(rank, size, sharding="fsdp", num_microbatches=2).cut), tree.paths(read(path))
    assert sum(leaf.numel() for leaf in tree.leaves(mine)) < 0.6 * sum(leaf.numel() for leaf in whole.values())
    assert_same_bits(assembled(size, mine), whole)
