"""Recorders: small writers of rows of numbers. Each is a context in the run's directory, from its last step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fnrecipe.config import MetricRecordersSection
from fnrecipe.recipe import Recorder, Row, Write
from fnrecipe.shell.recording.jsonl import to_jsonl
from fnrecipe.shell.recording.tensorboard import is_installed, to_tensorboard
from fnrecipe.shell.recording.wandb import to_wandb


def recorders_of(section: MetricRecordersSection, config: dict[str, object]) -> list[Recorder]:
    """JSON lines always, TensorBoard where it is installed unless the config says otherwise, Weights & Biases if it says so."""
    found: list[Recorder] = [to_jsonl]
    if section.tensorboard.enabled or (section.tensorboard.enabled is None and is_installed()):
        found.append(to_tensorboard)
    if section.wandb.enabled:
        found.append(partial(to_wandb, section=section.wandb, config=config))
    return found


@contextmanager
def recording(recorders: Sequence[Recorder], out: Path, step: int) -> Iterator[Write]:
    """Writes to all recorders, in their order."""
    with ExitStack() as stack:
        writers = [stack.enter_context(recorder(out, step)) for recorder in recorders]

        def write(kind: str, rows: Sequence[Row]) -> None:
            for writer in writers:
                writer(kind, rows)

        yield write
