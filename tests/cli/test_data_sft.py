"""`fnrecipe data` of examples: what is trained is marked, and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.helpers import Ended, assert_usage_error, fnrecipe_here

CHAT = [("system", "Be brief."), ("user", "größe?"), ("assistant", "7"), ("user", "<|endoftext|>"), ("assistant", "no")]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    (tmp_path / "a.jinja").write_text(TEMPLATE)
    messages = [{"role": role, "content": content} for role, content in CHAT]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    small = "{max_seq_len: 200, batch_size: 2, num_lanes: 2, valid_fraction: 0}"
    return [f"dataset={small}", f"dataset.sources={tmp_path}/a.jsonl", "gang.num_microbatches=1", "regime.num_data_epochs=1"]


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, *pairs: str) -> Ended:
    return fnrecipe_here(monkeypatch, capsys, "data", what, "sft", "--config", *pairs)


def test_what_is_trained_is_shown_in_brackets(
    tmp_path: Path, pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ended(monkeypatch, capsys, "show", *pairs, f"dataset.chat_template={tmp_path}/a.jinja")
    assert shown.status == 0
    end = "<|endoftext|>"
    assert shown.out.splitlines()[3:4] == [
        f"system: Be brief.{end}user: größe?{end}assistant: ⟦7{end}⟧user: {end}{end}assistant: ⟦no{end}⟧"
    ]
    size = len(re.sub(r"[⟦⟧]", "", shown.out.splitlines()[3]).encode()) - 5 * (len(end) - 1)
    assert shown.out.splitlines()[1:3] == [f"row 0: {size - 1} of 200 positions in 1 piece", f"── a, 5 of {size - 1} targets"]


def test_the_trained_share_is_counted(
    tmp_path: Path, pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = ended(monkeypatch, capsys, "stats", *pairs, f"dataset.chat_template={tmp_path}/a.jinja")
    assert counted.status == 0
    assert counted.out.rstrip().endswith(f"; {5 / 79:.2%} of the targets are trained")


def test_chats_without_a_template_are_told(
    pairs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_usage_error(ended(monkeypatch, capsys, "show", *pairs), "a.jsonl:1 ", "set dataset.chat_template")


def test_the_sides_of_a_pair_are_shown_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "größe? ", "chosen": "7", "rejected": "no"}) + "\n")
    small = "{max_seq_len: 200, batch_size: 2, num_lanes: 2, valid_fraction: 0}"
    given = [f"dataset={small}", f"dataset.sources={tmp_path}/b.jsonl", "gang.num_microbatches=1", "regime.num_data_epochs=1"]
    shown = fnrecipe_here(monkeypatch, capsys, "data", "show", "preference", "--config", *given)
    assert shown.status == 0
    end = "<|endoftext|>"
    assert shown.out.splitlines()[1:] == [
        "row 0: 23 of 200 positions in 2 pieces",
        "── b, chosen, 2 of 11 targets",
        f"{end}größe? ⟦7{end}⟧",
        "── b, rejected, 3 of 12 targets",
        f"{end}größe? ⟦no{end}⟧",
        "row 1: 0 of 200 positions in 0 piece",
    ]
