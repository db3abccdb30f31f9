from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import attrs
import numpy as np
import pytest
import safetensors.numpy

from fnrecipe import streams as recipe_streams
from fnrecipe.config import DataSource
from fnrecipe.data import Batch, Block, Document, Source, Tokenizer, byte_tokenizer, cached
from fnrecipe.data.document import Ids, Read
from fnrecipe.errors import DataError, UsageError
from tests.data.laws import check_resumes, items, plain, take
from tests.recipes.streams import DOCUMENTS, recipe, texts, train, write, write_folder

BYTE = byte_tokenizer()
BLOCK = Block("a.jsonl", 0, 1)
TEXTS = ["one", "", "größe 🙂", "x" * 300]


def counting(tokenizer: Tokenizer, encoded: list[str]) -> Tokenizer:
    """A tokenizer that notes the texts it is given."""

    def encode(given: Sequence[str]) -> list[Ids]:
        encoded.extend(given)
        return tokenizer.encode(given)

    return attrs.evolve(tokenizer, encode=encode)


def reader(found: Sequence[str | Document | DataError]) -> Callable[[Block], Iterator[Read]]:
    return lambda block: iter([Document(item) if isinstance(item, str) else item for item in found])


def read(folder: Path, found: Sequence[str | Document | DataError] = TEXTS, tokenizer: Tokenizer = BYTE) -> list[Read]:
    return list(cached(BLOCK, read=reader(found), tokenizer=tokenizer, folder=folder))


def encoded_by_reading(folder: Path, found: Sequence[str] = TEXTS, tokenizer: Tokenizer = BYTE) -> list[str]:
    encoded: list[str] = []
    read(folder, found, counting(tokenizer, encoded))
    return encoded


def entries(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    assert all(path.suffix == ".safetensors" for path in found)
    return found


def ids_of(documents: Sequence[Read]) -> list[list[int]]:
    assert all(isinstance(document, Document) and document.ids is not None for document in documents)
    assert {document.ids.dtype for document in documents} == {np.dtype(np.int32)}
    return [document.ids.tolist() for document in documents]


BYTES = [list(text.encode()) for text in TEXTS]


def test_every_pass_gives_the_texts_with_their_ids_and_only_the_first_encodes(tmp_path: Path) -> None:
    encoded: list[str] = []
    for _ in range(3):
        found = read(tmp_path, tokenizer=counting(BYTE, encoded))
        assert [document.text for document in found] == TEXTS
        assert ids_of(found) == BYTES
    assert encoded == TEXTS
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "changed",
    [
        [*TEXTS[:3], "y" * 300],
        TEXTS[1:],
        TEXTS[::-1],
        [*TEXTS, ""],
        ["on", "e", "größe 🙂", "x" * 300],
        ["oneg", "", "röße 🙂", "x" * 300],
    ],
)
def test_other_texts_miss(tmp_path: Path, changed: list[str]) -> None:
    read(tmp_path)
    assert encoded_by_reading(tmp_path, changed) == changed
    assert encoded_by_reading(tmp_path) == []
    assert len(entries(tmp_path)) == 2


def test_another_tokenizer_misses(tmp_path: Path) -> None:
    shifted = attrs.evolve(byte_tokenizer(), fingerprint="shifted", encode=lambda given: [i + 1 for i in BYTE.encode(given)])
    read(tmp_path)
    assert ids_of(read(tmp_path, tokenizer=shifted)) == [[i + 1 for i in ids] for ids in BYTES]
    assert ids_of(read(tmp_path)) == BYTES


@pytest.mark.parametrize("largest", [0, 65535, 65536, 150_000])
def test_ids_of_large_vocabularies_are_kept(tmp_path: Path, largest: int) -> None:
    encode = lambda given: [np.array([largest, 0, 1], np.int32) for _ in given]  # noqa: E731
    wide = attrs.evolve(BYTE, fingerprint="wide", encode=encode)
    for _ in range(2):
        assert ids_of(read(tmp_path, ["a", "b"], wide)) == [[largest, 0, 1]] * 2
    assert encoded_by_reading(tmp_path, ["a", "b"], wide) == []


@pytest.mark.parametrize("documents", [[""], ["", ""], []])
def test_blocks_without_text_are_read_again(tmp_path: Path, documents: list[str]) -> None:
    for _ in range(2):
        assert [document.text for document in read(tmp_path, documents)] == documents


def test_token_arrays_pass_through(tmp_path: Path) -> None:
    document = Document(ids=np.array([1, 2], np.int32))
    assert read(tmp_path, [document]) == [document]
    assert entries(tmp_path) == []


def test_bad_records_are_the_same_with_a_cache_and_without(tmp_path: Path) -> None:
    bad = DataError("a.jsonl:2 (byte 3): expected text")
    for _ in range(2):
        found = read(tmp_path, ["one", bad, "two"])
        assert found[1] is bad
        assert [document.text for document in found[::2]] == ["one", "two"]


def inverted(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def another_entry(content: bytes) -> bytes:
    """A whole entry of as many documents, as if its file had been given a wrong name."""
    with_ids = safetensors.numpy.load(content)
    return safetensors.numpy.save(with_ids | {"ids": with_ids["ids"][::-1].copy()})


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in its header": lambda content: content[:50],
    "cut by a byte": lambda content: content[:-1],
    "a byte longer": lambda content: content + b"\0",
    "a byte of the ids": lambda content: inverted(content, content.index(b"x\0x")),
    "text": lambda content: b"not a cache entry",
    "zeros": lambda content: bytes(len(content)),
    "other tensors": lambda content: safetensors.numpy.save({"a": np.zeros(3)}),
    "shuffled ids": another_entry,
    "signed ids": lambda content: content.replace(b'"U16"', b'"I16"'),
    "half-precision ids": lambda content: content.replace(b'"U16"', b'"F16"'),
}


def entry_of(folder: Path) -> Path:
    read(folder)
    (path,) = entries(folder)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    path = entry_of(tmp_path)
    content = path.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert ids_of(read(tmp_path)) == BYTES
    assert [f"{path}: damaged cache entry made anew" in record.getMessage() for record in caplog.records] == [True]
    assert path.read_bytes() == content
    assert encoded_by_reading(tmp_path) == []


def test_no_inverted_byte_of_an_entry_gives_wrong_ids(tmp_path: Path) -> None:
    path = entry_of(tmp_path)
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(inverted(content, place))
        assert ids_of(read(tmp_path)) == BYTES, place
        path.write_bytes(content)


def test_an_entry_of_other_texts_is_not_taken(tmp_path: Path) -> None:
    path = entry_of(tmp_path / "a")
    others = ["two", "", "größe 🙃", "y" * 300]
    read(tmp_path / "b", others)
    path.write_bytes(entries(tmp_path / "b")[0].read_bytes())
    assert ids_of(read(tmp_path / "a")) == BYTES


@pytest.mark.parametrize("folder", ["file/below", "/proc/fnrecipe"])
def test_a_folder_that_cannot_be_written_to_is_an_error_of_use(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"dataset\.cache: cannot write to .*(file/below|/proc/fnrecipe)"):
        read(tmp_path / folder)


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        read(tmp_path)
    assert entries(tmp_path) == []


def test_entries_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert entry_of(tmp_path).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_an_entry_that_another_writes_at_the_same_time_is_as_good(tmp_path: Path) -> None:
    def encode(given: Sequence[str]) -> list[Ids]:
        read(tmp_path)
        return BYTE.encode(given)

    assert ids_of(read(tmp_path, tokenizer=attrs.evolve(BYTE, encode=encode))) == BYTES
    assert encoded_by_reading(tmp_path) == []
    assert len(entries(tmp_path)) == 1


FILL = """
import sys
from pathlib import Path

from fnrecipe.data import byte_tokenizer, cached, open_corpus

corpus = open_corpus(sys.argv[1], byte_tokenizer())
print("ready", flush=True)
sys.stdin.readline()
for block in corpus.blocks:
    for document in cached(block, read=corpus.read, tokenizer=byte_tokenizer(), folder=Path(sys.argv[2])):
        assert document.ids.tolist() == list(document.text.encode())
"""


def test_two_processes_fill_the_same_folder(tmp_path: Path) -> None:
    source, folder = write(tmp_path / "a.jsonl", texts(0, 3000)), tmp_path / "cache"
    command = [sys.executable, "-c", FILL, source.path, str(folder)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in both]
    assert ended == [("", 0)] * 2
    assert len(entries(folder)) > 50


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the recipe's tokenizer is given."""
    found: list[str] = []
    monkeypatch.setattr(recipe_streams, "open_tokenizer", lambda *given, **names: counting(BYTE, found))
    return found


def streams(source: DataSource, folder: Path) -> tuple[Source[Batch], Source[Batch]]:
    """Two epochs without a cache and with one."""
    config = recipe(source, epochs=2, valid_fraction=0.2)
    return train(config), train(attrs.evolve(config, dataset=attrs.evolve(config.dataset, cache=str(folder))))


def test_the_stream_is_the_same_with_a_cache_and_without(tmp_path: Path, encoded: list[str]) -> None:
    without, within = streams(write_folder(tmp_path / "corpus"), tmp_path / "cache")
    expected = take(without, None, 99)
    encoded.clear()
    assert take(within, None, 99) == expected
    assert sorted(encoded) == sorted(DOCUMENTS)
    encoded.clear()
    assert take(within, None, 99) == expected
    assert encoded == []
    assert entries(tmp_path / "cache")


def test_a_stream_goes_on_with_a_cache_where_it_stopped_without_and_the_other_way_round(tmp_path: Path) -> None:
    without, within = streams(write_folder(tmp_path / "corpus"), tmp_path / "cache")
    expected = take(without, None, 99)
    for k in (1, 3, len(expected) // 2, len(expected) - 1):
        for before, after in ((without, within), (within, without)):
            cursor = json.loads(json.dumps(list(islice(before(None), k))[-1][1]))
            assert take(after, cursor, 99) == expected[k:]
    assert check_resumes(within, limit=12) == 12


def test_changed_files_are_tokenised_anew(tmp_path: Path, encoded: list[str]) -> None:
    source = write_folder(tmp_path / "corpus")
    items(streams(source, tmp_path / "cache")[1])
    encoded.clear()
    write(tmp_path / "corpus" / "b.jsonl", ["changed"])
    without, within = streams(source, tmp_path / "cache")
    found = plain(items(within))
    assert encoded == ["changed"]
    assert found == plain(items(without))


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_bad_lines_are_reported_the_same_with_a_cache_and_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": text}) for text in texts(0, 200)]
    path.write_text("\n".join([*lines[:70], "{", *lines[70:170], "[]", *lines[170:]]))
    config = recipe(DataSource(str(path)), max_bad_records=limit, num_lanes=1, order="sequential")
    with_cache = attrs.evolve(config, dataset=attrs.evolve(config.dataset, cache=str(tmp_path / "cache")))

    def outcome(stream: Source[Batch]) -> tuple[object, str, list[str]]:
        caplog.clear()
        found, error = [], ""
        try:
            found += [plain(entry) for entry in stream(None)]
        except DataError as raised:
            error = str(raised)
        return found, error, [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        results = [outcome(partial(stream)) for stream in (train(config), train(with_cache), train(with_cache))]
    assert results[0] == results[1] == results[2]
    assert bool(results[0][1]) == (limit < 2)
    assert len(results[0][2]) == limit
