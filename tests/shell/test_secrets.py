"""Secrets in addresses are used, and neither written nor shown."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fnrecipe
from fnrecipe.data import byte_tokenizer, open_corpus
from fnrecipe.errors import UsageError, redacted
from fnrecipe.shell.directory.redact import redacted_values
from tests.helpers import end, pairs, start
from tests.web import Handler, serving


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:se/cr+et=@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("https://user:pass@host/x?token=abc&b=1", "https://***@host/x?token=***&b=1"),
        ("https://a@b.org:pass@host/x", "https://***@host/x"),
        ("https://user:p@ss@host/x", "https://***@host/x"),
        ("https://ghp_abc@host/x", "https://***@host/x"),
        ("https://host/x?X-Amz-Signature=a&sig=b&design=c&monkey=d&api_key=e", None),
        (
            "a=[{path: https://u:p@h/x, weight: 1}, {path: 's3://k:s@b/'}]",
            "a=[{path: https://***@h/x, weight: 1}, {path: 's3://***@b/'}]",
        ),
        ("https://host:8080/a@b.c", "https://host:8080/a@b.c"),
        ("sftp://alice@host/x", "sftp://alice@host/x"),
        ("s3://bucket/a@b.jsonl?versionId=3", "s3://bucket/a@b.jsonl?versionId=3"),
        ("added: a: a.jsonl?token=abc", "added: a: a.jsonl?token=***"),
        ("ratio 3:4@home, /data/a:b@c", "ratio 3:4@home, /data/a:b@c"),
    ],
)
def test_what_is_a_secret_of_an_address(text: str, shown: str | None) -> None:
    expected = "https://host/x?X-Amz-Signature=***&sig=***&design=c&monkey=d&api_key=***" if shown is None else shown
    assert redacted(text) == expected == redacted(expected)


safe = st.text("abcXYZ019-_", min_size=1)


@given(safe, st.text("abcXYZ019-_+/%=:@!$", min_size=1).map("hunter2".__add__), safe)
def test_no_password_is_shown(user: str, password: str, host: str) -> None:
    assert "hunter2" not in redacted(f"cannot read s3://{user}:{password}@{host}/a.jsonl: 403")


@pytest.mark.parametrize("part", ["://", "://a:b", "?token", "&a_", "http://a", ":", "@", "?", "://a:b/@", "https://u:"])
def test_a_long_text_takes_no_long_time(part: str) -> None:
    began = time.monotonic()
    redacted("://" + part * 20_000)
    assert time.monotonic() - began < 5  # quadratic time would be minutes


def test_values_are_redacted_at_any_depth_and_otherwise_as_they_are() -> None:
    values = {"a": [{"https://u:p@h": ("https://t@h", 1, None, True)}]}
    assert redacted_values(values) == {"a": [{"https://***@h": ("https://***@h", 1, None, True)}]}


@pytest.fixture
def server(texts: Path) -> Iterator[str]:
    """Serves texts, to those who have the password and the token."""
    content = (texts / "a.jsonl").read_bytes()

    class Guarded(Handler):
        def answer(self) -> None:
            if self.headers.get("Authorization") != "Basic dXNlcjpodW50ZXIy" or "token=hunter2" not in self.path:
                self.close_connection = True
                self.send_error(403)
                return
            self.send(content)

    with serving(Guarded) as place:
        yield f"http://user:hunter2@{place}"


@pytest.mark.slow
def test_a_run_uses_the_secrets_of_its_addresses_and_leaves_none(server: str, tmp_path: Path) -> None:
    address, out = f"{server}/a.jsonl?token=hunter2", tmp_path / "out"
    changes = {"dataset__sources": f"[{{path: '{address}'}}]", "dataset__valid_fraction": 0, "trainer__jit": "off"}
    small = {**changes, "regime__validate_every_n_steps": "null", "evaluations": "[]"}
    command = ("train", "lm", "--out", str(out), "--config")
    first = end(start(*command, *pairs(tmp_path, **small, regime__num_steps=4)))
    assert first.status == 0, first.errors
    longer = end(start(*command, *pairs(tmp_path, **small, regime__num_steps=6)))
    assert longer.status == 0, longer.errors
    refused = end(start(*command, *pairs(tmp_path, **{**small, "dataset__sources": f"[{{path: '{address}x.json'}}]"})))
    assert refused.status == 2
    told = [ended.output + ended.errors for ended in (first, longer, refused)]
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not [path for path, data in written.items() if b"hunter2" in data]
    assert not any("hunter2" in text for text in told)
    assert "token=***" in (out / "config.yaml").read_text()
    assert "token=***" in (out / "run.json").read_text()
    assert "token=***" in (out / "logs/rank_0.log").read_text()
    assert fnrecipe.load(out).config.dataset.sources[0].path == redacted(address)


def test_an_address_whose_secret_was_left_out_is_refused_with_a_reason() -> None:
    for address in ("s3://***@bucket/a.jsonl", "https://host/a.jsonl?token=***"):
        with pytest.raises(UsageError, match="expected a whole address, found one without its secret, as a run"):
            open_corpus(address, byte_tokenizer())


def test_an_error_shows_no_secret_wherever_it_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    error = UsageError("https://u:hunter2@h: cannot read it")
    assert str(error) == "https://***@h: cannot read it"
    logging.getLogger("fnrecipe").warning("%s", error)
    assert "hunter2" not in caplog.text
