"""Addresses: what a real server on this machine does, well or badly, and which kinds are read at all."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import pytest

from fnrecipe.data import Corpus, Document, byte_tokenizer, open_corpus
from fnrecipe.data.remote import is_address, reason
from fnrecipe.errors import DataError, FnrecipeError, UsageError
from tests.web import Handler, serving

TEXTS = [f"document {number} ü" for number in range(3000)]
CONTENT = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Texts(Handler):
    """Serves CONTENT, as the path says: with ranges, without a length, cut off in the middle, or not at all."""

    def answer(self) -> None:
        kind = self.path.strip("/").partition(".")[0]
        if kind.isdigit():
            self.close_connection = True
            self.send_error(int(kind))
            return
        self.send(CONTENT, with_length=kind != "endless", most=100 if kind == "cut" else None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Texts) as place:
        yield f"http://{place}"


def texts(corpus: Corpus) -> list[str]:
    items = [item for block in corpus.blocks for item in corpus.read(block)]
    return [item.text or "" for item in items if isinstance(item, Document)]


@pytest.mark.parametrize("name", ["good.jsonl", "good.JSONL", "good.jsonl?download=1&x=[a]"])
def test_documents_of_a_web_server(server: str, name: str) -> None:
    corpus = open_corpus(f"{server}/{name}", byte_tokenizer())
    assert len(corpus.blocks) > 16
    assert texts(corpus) == TEXTS


BAD = {
    "404.jsonl": "cannot read the data: 404",
    "500.jsonl": "cannot read the data: 500",
    "endless.jsonl": "expected a file whose size is known, found none told by the server; copy it first",
    "cut.jsonl": "cannot read the data: ",
}


@pytest.mark.parametrize(("name", "expected"), BAD.items(), ids=BAD)
def test_what_a_server_does_wrong_is_one_line(server: str, name: str, expected: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"{server}/{name}: {expected}")) as caught:
        texts(open_corpus(f"{server}/{name}", byte_tokenizer()))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", ["http", "https", "hf"])
def test_a_refused_connection_is_one_line(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    address = f"{protocol}://{'datasets/a/b' if protocol == 'hf' else place}/c.jsonl"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{place}")
    monkeypatch.setattr("huggingface_hub.hf_file_system.constants.ENDPOINT", f"http://{place}")
    with pytest.raises(DataError, match=re.escape(f"{address}: cannot read the data: ")) as caught:
        open_corpus(address, byte_tokenizer())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", sorted(fsspec.available_protocols()))
def test_every_kind_of_address_is_local_or_read_or_refused_in_one_line(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    address = f"{protocol}://{tmp_path}/a.jsonl"
    if not is_address(address):
        assert texts(open_corpus(address, byte_tokenizer())) == ["a"]
        return
    with pytest.raises(FnrecipeError, match=re.escape(address)) as caught:
        open_corpus(address, byte_tokenizer())
    assert len(str(caught.value).splitlines()) == 1


MADE_UP = [
    "zip",
    "tar",
    "reference",
    "data",
    "dir",
    "generic",
    "filecache",
    "blockcache",
    "simplecache",
    "git",
    "github",
    "dask",
]


@pytest.mark.parametrize("protocol", MADE_UP)
def test_file_systems_that_are_no_plain_read_are_refused_by_name(protocol: str) -> None:
    with pytest.raises(UsageError, match=f"expected an address of files that are read as they are, found '{protocol}'; "):
        open_corpus(f"{protocol}://a.jsonl", byte_tokenizer())


def test_a_file_system_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)  # other tests have loaded it
    expected = r"^s3://bucket/a\.jsonl: cannot read this kind of address: Install s3fs.*; pip install 'fnrecipe\[remote\]'$"
    with pytest.raises(UsageError, match=expected):
        open_corpus("s3://bucket/a.jsonl", byte_tokenizer())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://k:s3cr%20t@bucket/x", 'Invalid bucket name "k:s3cr t@bucket", s3cr t and s3cr%20t'),
        ("https://t0ken@host/a", "no host t0ken@host"),
    ],
)
def test_what_a_file_system_says_of_an_address_is_shown_without_its_secret(address: str, said: str) -> None:
    told = reason(ValueError(said), address)
    assert "***" in told
    assert not any(secret in told for secret in ("s3cr", "t0ken"))


def test_a_path_with_an_at_sign_is_no_secret() -> None:
    assert reason(ValueError("no bucket/a"), "s3://bucket/a@b") == "no bucket/a"
