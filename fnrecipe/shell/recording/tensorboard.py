"""Records for TensorBoard, in `tensorboard/`: `tensorboard --logdir DIR`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fnrecipe.errors import UsageError
from fnrecipe.recipe import Row, Write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


def is_installed() -> bool:
    return find_spec("tensorboard") is not None


@contextmanager
def to_tensorboard(out: Path, step: int) -> Iterator[Write]:
    """Writes each number as a scalar. What was written after `step` by a run before is not shown any more.

    Raises:
        UsageError: if TensorBoard is not installed.
    """
    if not is_installed():
        name = "common.metric_recorders.tensorboard.enabled"
        raise UsageError(f"{name}: expected the package tensorboard for true, found none; pip install 'fnrecipe[tensorboard]'")
    opened: list[SummaryWriter] = []

    def write(kind: str, rows: Sequence[Row]) -> None:
        if not opened:
            opened.append(_open(out / FOLDER, step))
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    opened[0].add_scalar(name, value, int(row["step"]))
        opened[0].flush()

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def _open(folder: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # a second to import: not before there is something to write

    return SummaryWriter(str(folder), purge_step=step + 1)
