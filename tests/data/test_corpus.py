from __future__ import annotations

import gzip
import json
import re
import sysconfig
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fnrecipe.data import Block, Corpus, Document, Reading, byte_tokenizer, fingerprints, open_corpus, share
from fnrecipe.data.corpus import STDLIB, texts_of
from fnrecipe.data.files import fingerprint
from fnrecipe.errors import DataError, UsageError

TOKENIZER = byte_tokenizer()
BOM = b"\xef\xbb\xbf"


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def jsonl(texts: Sequence[str]) -> bytes:
    return BOM + b"\r\n" + b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts) + b"\n"


def separated(texts: Sequence[str]) -> bytes:
    return "<|sep|>".join(texts).encode()


def parquet(texts: Sequence[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink, row_group_size=7)
    return bytes(sink.getvalue())


def tokens(texts: Sequence[str]) -> bytes:
    return np.concatenate([np.array([*text.encode(), 256], np.uint16) for text in texts]).tobytes()


# How the documents of one file are written, and its suffix; None: each document is a file.
FORMATS: dict[str, tuple[Callable[[Sequence[str]], bytes] | None, str, Reading]] = {
    "jsonl": (jsonl, ".jsonl", Reading()),
    "jsonl.gz": (lambda texts: gzip.compress(jsonl(texts)), ".jsonl.gz", Reading()),
    "jsonl.zst": (lambda texts: zstd(jsonl(texts)), ".json.zst", Reading()),
    "files": (None, ".txt", Reading()),
    "separated": (separated, ".txt", Reading(separator="<|sep|>")),
    "separated.gz": (lambda texts: gzip.compress(separated(texts)), ".txt.gz", Reading(separator="<|sep|>")),
    "python": (None, ".py", Reading()),
    "parquet": (parquet, ".parquet", Reading()),
    "tokens": (tokens, ".bin", Reading()),
}

PLAIN = ["jsonl", "separated", "tokens"]
CLOSED = ["jsonl.gz", "jsonl.zst", "separated.gz", "parquet"]
WHOLE = ["files", "python"]

DOCUMENTS = [f"{number}" * (1 + number * 7 % 11) for number in range(40)]


def write(folder: Path, name: str, sizes: Sequence[int] = (11, 0, 28, 1)) -> str:
    """DOCUMENTS in files of so many each; a file of none is empty."""
    make, suffix, _ = FORMATS[name]
    bounds = np.cumsum([0, *sizes]).tolist()
    for number, size in enumerate(sizes):
        texts = DOCUMENTS[bounds[number] : bounds[number + 1]]
        if make is None:
            for text in texts:
                (folder / f"{len(list(folder.iterdir())):02}{suffix}").write_text(text)
        else:
            (folder / f"{number}{suffix}").write_bytes(make(texts) if size or name == "parquet" else b"")
    return str(folder)


def open_some(path: str, name: str, **options: Any) -> Corpus:
    return open_corpus(path, TOKENIZER, reading=FORMATS[name][2], **options)


def documents_of(corpus: Corpus) -> list[list[str]]:
    """By block."""
    found = [list(corpus.read(block)) for block in corpus.blocks]
    assert all(isinstance(item, Document) for items in found for item in items)
    return [[shown(item) for item in items if isinstance(item, Document)] for items in found]


def share_of(corpus: Corpus, number: int, size: int) -> list[list[str]]:
    """The documents of a share of the blocks, by block."""
    return documents_of(attrs.evolve(corpus, blocks=share(corpus.blocks, number, size, [7])))


def shown(document: Document) -> str:
    return TOKENIZER.decode(document.ids.tolist()) if document.ids is not None else document.text or ""


def joined(blocks: Sequence[list[str]]) -> list[str]:
    return sorted(text for block in blocks for text in block)


@pytest.mark.parametrize("size", [1, 3, 8, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_every_document_once_whatever_the_number_of_shares(tmp_path: Path, name: str, size: int) -> None:
    corpus = open_some(write(tmp_path, name), name)
    assert joined([block for number in range(size) for block in share_of(corpus, number, size)]) == sorted(DOCUMENTS)
    assert [file.name for file in corpus.files] == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("name", CLOSED)
def test_one_closed_file_is_shared_out_by_documents(tmp_path: Path, name: str, size: int) -> None:
    corpus = open_some(write(tmp_path, name, [40]), name)
    counts = [sum(map(len, share_of(corpus, number, size))) for number in range(size)]
    assert sum(counts) == len(DOCUMENTS)
    assert max(counts) - min(counts) <= len(corpus.blocks)


@pytest.mark.parametrize("name", [*PLAIN, *WHOLE])
def test_a_block_a_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    blocks = documents_of(open_some(path, name, by_document=True))
    assert max(map(len, blocks)) == 1
    assert [text for block in blocks for text in block] == DOCUMENTS
    assert joined(documents_of(open_some(path, name))) == joined(blocks)


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_file_has_no_block_a_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    first = min(tmp_path.iterdir())
    with pytest.raises(UsageError, match=rf"^{first}: order=documents cannot enter this file in the middle; use order=blocks"):
        open_some(path, name, by_document=True)


@pytest.mark.parametrize(
    ("name", "by_document"),
    [(name, False) for name in FORMATS if name != "parquet"] + [(name, True) for name in (*PLAIN, *WHOLE)],
)
def test_nothing_but_empty_files(tmp_path: Path, name: str, by_document: bool) -> None:
    for number in range(3):
        (tmp_path / f"{number}{FORMATS[name][1]}").touch()
    with pytest.raises(UsageError, match=f"^{tmp_path}: expected at least one document, found only empty files$"):
        open_some(str(tmp_path), name, by_document=by_document)


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [0, 0])
    with pytest.raises(UsageError, match=f"^{tmp_path}: expected at least one document, found only empty files$"):
        open_some(path, "parquet")


def test_plain_and_compressed_files_side_by_side(tmp_path: Path) -> None:
    for number, (suffix, pack) in enumerate({".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}.items()):
        (tmp_path / f"{number}{suffix}").write_bytes(pack(jsonl(DOCUMENTS[number::3])))
    corpus = open_corpus(str(tmp_path), TOKENIZER)
    for size in (1, 3, 100):
        assert joined([block for number in range(size) for block in share_of(corpus, number, size)]) == sorted(DOCUMENTS)


def test_a_directory_of_two_formats(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [2, 3])
    write(tmp_path, "separated", [1, 1, 1])
    message = f"^{tmp_path}: expected files of one format, found 2 jsonl, 3 text; set `format` for this source$"
    with pytest.raises(UsageError, match=message):
        open_corpus(str(tmp_path), TOKENIZER)
    assert joined(documents_of(open_corpus(str(tmp_path), TOKENIZER, format="jsonl"))) == sorted(DOCUMENTS[:5])
    assert joined(documents_of(open_corpus(str(tmp_path), TOKENIZER, format="text"))) == sorted(DOCUMENTS[:3])


def test_a_directory_takes_no_notice_of_other_files(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [2])
    (tmp_path / "README.md").write_text("not data")
    assert joined(documents_of(open_corpus(str(tmp_path), TOKENIZER))) == sorted(DOCUMENTS[:2])


@pytest.mark.parametrize("name", ["a.js", "a.jsonl.zip", "a"])
def test_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(jsonl(["a"]))
    with pytest.raises(
        UsageError, match=rf"^{re.escape(str(path))}: expected a file called \.jsonl, \.ndjson, .*\.parquet, .* or `format` set"
    ):
        open_corpus(str(path), TOKENIZER)
    assert joined(documents_of(open_corpus(str(path), TOKENIZER, format="jsonl"))) == ["a"]


OTHER_JSON = {
    "an array": (b'[{"text": "a"}, {"text": "b"}]', "one array; convert it: jq -c '.[]' FILE > FILE.jsonl"),
    "an array over lines": (BOM + b'\n[\n{"text": "a"},\n{"text": "b"}]\n', "one array; convert it: jq -c '.[]'"),
    "an object over lines": (b'{\r\n  "text": "a"\r\n}\r\n', "one object over several lines; convert it: jq -c '.'"),
}


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz"])
@pytest.mark.parametrize(("content", "expected"), OTHER_JSON.values(), ids=OTHER_JSON)
def test_json_that_is_not_lines_is_refused_by_name(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl(["b"]))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(
        UsageError, match=re.escape(f"{tmp_path}/{name}: expected a JSON object on each line, found {expected}")
    ):
        open_corpus(str(tmp_path), TOKENIZER)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.bin.XZ"])
def test_formats_that_are_not_read_from_compressed_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"some")
    (tmp_path / "b.jsonl").write_bytes(jsonl(["b"]))
    assert open_corpus(str(tmp_path), TOKENIZER).left_out == f"{tmp_path}: left out: 1 .{name.partition('.')[2].lower()}"
    format: Any = "parquet" if "parquet" in name else "tokens"
    with pytest.raises(
        UsageError, match=rf"{name}: expected a file of format={format} that is not compressed as a whole; unpack"
    ):
        open_corpus(str(tmp_path / name), TOKENIZER, format=format)


def test_nothing_is_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(UsageError, match=re.escape(f"{path}: expected data, found no file, directory or match (.jsonl, ")):
            open_corpus(str(path), TOKENIZER)


def test_the_names_of_a_corpus(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    assert open_corpus(path, TOKENIZER).name == path
    assert open_corpus(path, TOKENIZER, name="web").name == "web"


def test_the_reading_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a"}')
    (tmp_path / "a.bin").write_bytes(np.array([7, 8, 256], "<u4").tobytes())
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "a.parquet")
    reading = Reading(text_key="body", dtype="uint32")
    for name, text in {"a.jsonl": "a", "a.bin": "\x07\x08", "a.parquet": "b"}.items():
        assert joined(documents_of(open_corpus(str(tmp_path / name), TOKENIZER, reading=reading))) == [text]


def test_chunk_files_beside_others(tmp_path: Path) -> None:
    for number, name in enumerate(["en.chunk.0.jsonl", "sub/en.chunk.1.jsonl", "en.val.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([f"{number}"]))
    assert joined(documents_of(open_corpus(str(tmp_path), TOKENIZER))) == ["0", "1"]


def test_the_library_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in {
        "os.py": "a = 1\n",
        "json/__init__.py": "",
        "json/decoder.py": "b = 2\n",
        "user.py": "c = 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = open_corpus(STDLIB, TOKENIZER)
    assert [file.name for file in corpus.files] == ["json/__init__.py", "json/decoder.py", "os.py"]
    assert documents_of(corpus) == [["b = 2\n"], ["a = 1\n"]]
    assert corpus.name == STDLIB


@pytest.fixture
def address() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "tokens"])
def test_documents_at_an_address(tmp_path: Path, address: str, name: str) -> None:
    write(tmp_path, name)
    for path in tmp_path.iterdir():
        fsspec.filesystem("memory").pipe(f"/corpus/{path.name}", path.read_bytes())
    for pattern in (address, f"{address}/*"):
        corpus = open_some(pattern, name)
        assert joined(documents_of(corpus)) == sorted(DOCUMENTS)
        assert all(file.path.startswith("memory:///corpus/") for file in corpus.files)


def test_tokens_at_an_address_are_refused(address: str) -> None:
    fsspec.filesystem("memory").pipe("/corpus/a.bin", tokens(["a"]))
    with pytest.raises(UsageError, match=r"^memory:///corpus/a\.bin: token arrays are read from local files only"):
        open_corpus(address, TOKENIZER)


def test_texts_of_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "", "b"]) + b"{bad\n" + jsonl(["c"]))
    texts = texts_of(open_corpus(str(path), TOKENIZER))
    assert [next(texts), next(texts)] == ["a", "b"]
    with pytest.raises(DataError, match=rf"^{path}:6 \(byte "):
        next(texts)


def test_fingerprints_name_corpus_and_file(tmp_path: Path) -> None:
    corpora = [open_corpus(write(tmp_path, "jsonl"), TOKENIZER, name=name) for name in ("web", "books")]
    files = {file.name: fingerprint(file) for file in corpora[0].files}
    assert fingerprints(corpora) == {f"{corpus}: {name}": found for corpus in ("web", "books") for name, found in files.items()}
    assert len(set(files.values())) == len(files) == 4


SPARSE = {
    "a.jsonl": (10 << 30, Reading(), 10 << 10),
    "a.txt": (10 << 30, Reading(separator="\n\n"), 10 << 10),
    "a.bin": (10 << 30, Reading(), 5 << 10),
    "b.bin": (10 << 30, Reading(dtype="uint32"), 10 << 8),
    "a.jsonl.gz": (10 << 30, Reading(), 1),
    "whole.txt": (10 << 30, Reading(), 1),
}


@pytest.mark.parametrize(("name", "size", "reading", "expected"), [(name, *row) for name, row in SPARSE.items()], ids=SPARSE)
def test_a_big_file_is_planned_without_reading_it(
    tmp_path: Path, name: str, size: int, reading: Reading, expected: int
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        start = time.process_time()
        blocks = open_corpus(str(tmp_path / name), TOKENIZER, reading=reading).blocks
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(blocks) == expected
    assert isinstance(blocks[0], Block)
    assert blocks[0].path == str(tmp_path / name)
    assert peak < 8 << 20
    assert seconds < 1
