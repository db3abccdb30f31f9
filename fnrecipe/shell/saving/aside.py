"""Going back to an older checkpoint: what is newer becomes a run of its own, below the directory of the run."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from fnrecipe import checkpoint
from fnrecipe.errors import FnrecipeError
from fnrecipe.runtime.files import sync
from fnrecipe.shell.directory import layout
from fnrecipe.shell.saving.local_copies import copy_records

FOLDER = "aside"


def set_aside(out: Path, step: int) -> Path | None:
    """Moves the checkpoints of the run in `out` behind `step` to `aside/N`, with copies of its config and records.

    Returns that directory, which is one of a run; None if there is no such checkpoint.

    Raises:
        FnrecipeError: if it cannot be written.
    """
    root = out / layout.CHECKPOINTS
    newer = checkpoint.later(root, step)
    if not newer:
        return None
    place = next(path for number in count(1) if not (path := out / FOLDER / str(number)).exists())
    try:
        # The records first: whoever is killed between two checkpoints finds all of them here, and the older one there.
        (place / layout.CHECKPOINTS).mkdir(parents=True)
        copy_records(out, place)
        for path in newer:
            path.rename(place / layout.CHECKPOINTS / path.name)
        sync(place / layout.CHECKPOINTS)
        sync(root)
    except OSError as error:
        raise FnrecipeError(f"{place}: cannot set aside what is newer than step {step:,}: {error.strerror or error}") from error
    return place
