"""Records for Weights & Biases. Nothing else of the run or the machine is sent: no code, no console, no environment."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fnrecipe.config import WandbSection
from fnrecipe.errors import UsageError
from fnrecipe.recipe import Row, Write
from fnrecipe.runtime.files import replace

STATE = "wandb.json"


@contextmanager
def to_wandb(out: Path, step: int, section: WandbSection, config: Mapping[str, Any]) -> Iterator[Write]:
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

    state = _read(out / STATE) or {"id": uuid.uuid4().hex[:8], "sent": {}}
    sent: dict[str, int] = dict(state["sent"])
    settings = library.Settings(
        console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True, x_disable_stats=True
    )
    try:
        run = library.init(
            dir=str(out),
            id=state["id"],
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
        replace(out / STATE, json.dumps({"id": state["id"], "sent": sent}).encode())

    with run:
        yield write


def _read(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"id", "sent"} <= state.keys() else None
