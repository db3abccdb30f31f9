"""What tests of the command line share."""

from __future__ import annotations

import pytest

from tests.cli.helpers import Verb, fnrecipe_here


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """How `fnrecipe checkpoint ARGS` ends."""
    return lambda *args: fnrecipe_here(monkeypatch, capsys, "checkpoint", *args)
