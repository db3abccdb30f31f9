"""Records for Weights & Biases. Nothing else of the run or the machine is sent: no code, no console, no environment."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fnrecipe.config import WandbSection
from fnrecipe.errors import UsageError
from fnrecipe.recipe import Row, Write
from fnrecipe.runtime.files import replace

STATE = "wandb.json"


@contextmanager
def to_wandb(out: Path, step: int, section: WandbSection, config: Mapping[str, object]) -> Iterator[Write]:
    """Logs rows under one run id, which `wandb.json` keeps; rows that a run before has sent are not sent again.

    Weights & Biases takes rows in the order of steps only, and a run that goes on from `step` repeats the rows behind it
    exactly: so each step is there once.

    Raises:
        UsageError: if the package is not installed, or does not take the run.
    """
    name = "common.metric_recorders.wandb.enabled"
    if find_spec("wandb") is None:
        raise UsageError(f"{name}: expected the package wandb for true, found none; pip install 'fnrecipe[wandb]'")
    import wandb as library

    identity, sent = _read(out / STATE)
    settings = library.Settings(
        console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True, x_disable_stats=True
    )
    try:
        run = library.init(
            dir=str(out),
            id=identity,
            resume="allow",
            entity=section.entity,
            project=section.project,
            name=section.run_name or out.resolve().name,
            mode=section.mode,
            config=dict(config),
            settings=settings,
        )
    except (library.Error, OSError) as error:
        raise UsageError(f"{name}: wandb cannot start the run: {' '.join(str(error).split())}") from error

    def write(kind: str, rows: Sequence[Row]) -> None:
        for row in rows:
            number = int(row["step"])
            if number > sent.get(kind, -1):
                run.log({name: value for name, value in row.items() if name != "step"}, step=number)
                sent[kind] = number
        replace(out / STATE, json.dumps({"id": identity, "sent": sent}).encode())

    with run:
        yield write


def _read(path: Path) -> tuple[str, dict[str, int]]:
    """The id of the run, and the last step of each kind that was sent; a new id where there is no such file, or another one."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError):
        state = None
    if isinstance(state, dict) and {"id", "sent"} <= state.keys():
        return state["id"], dict(state["sent"])
    return uuid.uuid4().hex[:8], {}
