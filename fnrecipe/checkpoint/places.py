"""The names of checkpoints in a directory.

step_00000100           whole
model_00000100          what is kept of an older one: its model alone
step_00000100.tmp       half written or half removed, by a process that was killed
step_00000100.damaged   the damaged checkpoint that was set aside last
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(step|model)_([0-9]{8}|[1-9][0-9]{8,})")
CHECKPOINTS = "checkpoints"
"""The directory with the checkpoints of a run, in that of the run."""
WHOLE, MODEL_ALONE = "step_", "model_"
TMP, DAMAGED = ".tmp", ".damaged"


def committed(root: Path) -> list[Path]:
    """The checkpoint directories below `root`, oldest first."""
    return [path for path in named(root) if path.is_dir() and not path.is_symlink()]


def models(root: Path) -> list[Path]:
    """The directories below `root` that hold the model of a checkpoint alone, oldest first."""
    return [path for path in named(root, kind=MODEL_ALONE) if path.is_dir() and not path.is_symlink()]


def later(root: Path, step: int) -> list[Path]:
    """The checkpoints after `step`, also of models alone, the newest first."""
    found = [directory for directory in (*committed(root), *models(root)) if step_in(directory) > step]
    return sorted(found, key=step_in, reverse=True)


def step_of(directory: Path) -> int | None:
    """The step that a directory's name says; None if it is not the name of a checkpoint."""
    return step_in(directory) if _NAME.fullmatch(directory.name) else None


def named(root: Path, suffix: str = "", kind: str = WHOLE) -> list[Path]:
    """The paths below `root` that have the name of a checkpoint of a kind and `suffix`, by step."""
    try:
        paths = [path for path in root.iterdir() if path.name.startswith(kind)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [path for path in paths if path.name.endswith(suffix) and _NAME.fullmatch(path.name.removesuffix(suffix))]
    return sorted(found, key=step_in)


def directory_of(root: Path, step: int, kind: str = WHOLE) -> Path:
    return root / f"{kind}{step:08d}"


def with_suffix(directory: Path, suffix: str) -> Path:
    return directory.with_name(directory.name + suffix)


def step_in(directory: Path) -> int:
    return int(directory.name.partition("_")[2].partition(".")[0])
