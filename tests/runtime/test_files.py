from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fnrecipe.runtime import files


def test_a_write_that_dies_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.replace(tmp_path / "config.yaml", b"old")

    def die(*args: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="no"):
        files.replace(tmp_path / "config.yaml", b"new")
    assert (tmp_path / "config.yaml").read_text() == "old"
