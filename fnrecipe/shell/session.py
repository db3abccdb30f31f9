"""What stays the same from the first step of a process to its last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Generic

import attrs
import torch

from fnrecipe.data import LaneAssignment
from fnrecipe.data.changes import Stamp
from fnrecipe.parallel.mesh import Mesh
from fnrecipe.recipe import C, Recipe
from fnrecipe.runtime.gang import Gang
from fnrecipe.runtime.process_groups import lane_assignment
from fnrecipe.runtime.signals import Signals
from fnrecipe.shell.directory import lock
from fnrecipe.shell.screen.display import Display


@attrs.frozen
class Session(Generic[C]):
    """A process of a run.

    directory  the output directory, by its path, and the descriptor by which it was claimed; None on ranks that do not write
    facts      about the run's data, as a checkpoint keeps them (`fnrecipe.shell.directory.identity`)
    beside     the gang as a thread beside the steps has it, with a process group of its own
    started    when the run began, on the monotonic clock
    stamps     of the data's local files before anything was read of them, by name and path; none on ranks that do not write
    """

    recipe: Recipe[C]
    config: C
    directory: tuple[Path, int | None]
    facts: Mapping[str, str]
    device: torch.device
    gang: Gang
    beside: Gang
    mesh: Mesh
    signals: Signals
    display: Display
    started: float
    stamps: Mapping[tuple[str, str], Stamp] = attrs.field(factory=dict)

    @property
    def out(self) -> Path:
        """The output directory; it is still the one that was claimed whenever something is about to be read or written."""
        lock.check_claim(*self.directory)
        return self.directory[0]

    @property
    def assignment(self) -> LaneAssignment:
        return lane_assignment(self.mesh, self.config.gang.num_microbatches)
