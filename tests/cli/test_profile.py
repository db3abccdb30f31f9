"""`fnrecipe profile`: its counts are those of the graph, and its times add up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, assert_usage_error, fnrecipe, fnrecipe_here
from tests.helpers import pairs

Profile = Callable[..., Ended]
PRODUCTS = 3 * (2 * 7 + 1) * 2  # forward and twice backward: 7 in each of 2 layers and the head, in 2 leaves


@pytest.fixture
def profile(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Profile:
    """Profiles a tiny model with more arguments and config pairs, in this process."""

    def profile(*args: str | Path, **changes: object) -> Ended:
        return fnrecipe_here(monkeypatch, capsys, "profile", "lm", *args, "--config", *pairs(texts, **changes))

    return profile


def test_a_profile_tells_what_a_step_runs_and_leaves_a_trace(profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "new/place"
    ended = profile("--out", out, "--steps", "2")
    assert ended.status == 0
    (line,) = [line for line in ended.out.splitlines() if "aten::mm " in line]
    assert [cell.strip() for cell in line.strip("│").split("│")][:2] == ["aten::mm", str(PRODUCTS)]
    facts = dict(re.findall(r"^(device|step|speed|model|MFU|data wait|idle) +(.*)$", ended.out, re.MULTILINE))
    assert list(facts) == ["device", "step", "speed", "model", "data wait", "idle"]
    assert facts["device"] == "cpu"
    for name in ("data wait", "idle"):
        assert 0 <= float(facts[name].partition("%")[0]) <= 100
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("aten::mm") == 2 * PRODUCTS
    assert (names.count("step"), names.count("wait for data")) == (2, 2)
    assert [path.name for path in out.iterdir()] == ["trace.json"]  # of the memory there is only something to see on a GPU


def test_the_share_of_the_peak_is_told_where_it_is_known(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fnrecipe.runtime.host.device_name", lambda _: "NVIDIA H100 80GB HBM3")
    ended = profile("--out", tmp_path, "--steps", "1")
    assert re.search(r"^MFU +0\.0%; 0\.0% with attention halved as causal$", ended.out, re.MULTILINE)


def test_data_that_does_not_last_is_told(profile: Profile, tmp_path: Path) -> None:
    ended = profile("--out", tmp_path, "--steps", "1000", regime__num_data_epochs=1)
    assert ended.status == 2
    assert "error: dataset: expected a batch for each step of the profile, found fewer; " in ended.err


def test_a_file_in_the_way_is_told_before_anything_is_measured(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = profile("--out", tmp_path / "file")
    assert ended.err.splitlines()[-1] == f"error: {tmp_path / 'file'}: expected a directory to write to, found a file"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("args", [[], ["--out", "a", "--steps", "0"]])
def test_wrong_usage_is_told(tmp_path: Path, args: list[str]) -> None:
    assert_usage_error(fnrecipe("profile", "lm", *args, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
