from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fnrecipe.data.files import File, fingerprint, opened
from fnrecipe.data.search import find_files
from fnrecipe.errors import DataError, UsageError

SUFFIXES = (".jsonl", ".jsonl.gz")


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's file system in memory, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def found(pattern: str, root: str) -> list[str]:
    return [file.path.removeprefix(f"{root}/") for file in find_files(pattern, SUFFIXES).files]


TREE = [
    "b.jsonl",
    "a.jsonl",
    "a.txt",
    "sub/c.jsonl",
    "sub/c.jsonl.gz",
    "sub/deep/d.jsonl",
    "[x]/e.jsonl",
    "x/f.jsonl",
    "wh?.jsonl",
    "a[bc].jsonl",
    "dots/.hidden.jsonl",
    "dots/.hidden/h.jsonl",
    "dots/seen.jsonl",
    "folder.jsonl/i.jsonl",
]

PATTERNS: dict[str, list[str]] = {
    "a.jsonl": ["a.jsonl"],
    "a.txt": ["a.txt"],
    "sub": ["sub/c.jsonl", "sub/c.jsonl.gz", "sub/deep/d.jsonl"],
    "sub/*.jsonl": ["sub/c.jsonl"],
    "sub/**/*.jsonl": ["sub/c.jsonl", "sub/deep/d.jsonl"],
    "?.jsonl": ["a.jsonl", "b.jsonl"],
    "a.*": ["a.jsonl", "a.txt"],
    "[ab].jsonl": ["a.jsonl", "b.jsonl"],
    "[x]": ["[x]/e.jsonl"],
    "wh?.jsonl": ["wh?.jsonl"],
    "a[bc].jsonl": ["a[bc].jsonl"],
    "sub*": [],
    "absent": [],
    "absent/*.jsonl": [],
    "**/**/d.jsonl": ["sub/deep/d.jsonl"],
    "dots": ["dots/seen.jsonl"],
    "dots/*": ["dots/seen.jsonl"],
    "dots/**/*.jsonl": ["dots/seen.jsonl"],
    "dots/.hidden": ["dots/.hidden/h.jsonl"],
    "dots/.hidden.jsonl": ["dots/.hidden.jsonl"],
    "f*.jsonl": [],
    "folder.jsonl": ["folder.jsonl/i.jsonl"],
}


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS.items(), ids=PATTERNS)
def test_what_a_path_names(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    make(tmp_path, *TREE)
    if expected:
        assert found(f"{tmp_path}/{pattern}", str(tmp_path)) == expected
    else:
        with pytest.raises(UsageError, match=r"expected data, found no file, directory or match \(\.jsonl\)"):
            find_files(f"{tmp_path}/{pattern}", SUFFIXES)


def test_a_directory_may_end_in_a_slash(tmp_path: Path) -> None:
    make(tmp_path, *TREE)
    assert [file.name for file in find_files(f"{tmp_path}/sub/", SUFFIXES).files] == ["c.jsonl", "c.jsonl.gz", "deep/d.jsonl"]


def test_a_directory_without_data(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".b.jsonl")
    with pytest.raises(
        UsageError, match=re.escape(f"{tmp_path}: expected data, found none in this directory (.jsonl), but 1 .txt, 1 hidden")
    ):
        find_files(str(tmp_path), SUFFIXES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}/empty: expected data, found none in this directory (.jsonl)")):
        find_files(f"{tmp_path}/empty", SUFFIXES)


NAMES: dict[str, list[str]] = {
    "one file": ["a.jsonl"],
    "one folder": ["a.jsonl", "b.jsonl"],
    "folders": ["a.jsonl", "sub/a.jsonl", "sub/deep/a.jsonl"],
    "only below": ["sub/deep/a.jsonl", "sub/deep/b.jsonl"],
    "folders that begin alike": ["part-10/a.jsonl", "part-1/a.jsonl", "part-1.jsonl"],
    "only folders that begin alike": ["part-10/a.jsonl", "part-11/a.jsonl"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_are_relative_to_the_common_folder(tmp_path: Path, names: list[str]) -> None:
    make(tmp_path, *names)
    files = find_files(str(tmp_path), SUFFIXES).files
    common = os.path.commonpath([tmp_path / os.path.dirname(name) for name in names])
    paths = sorted(str(tmp_path / name) for name in names)
    assert files == [File(path, os.path.relpath(path, common), os.path.getsize(path)) for path in paths]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jsonl", "sub/b.jsonl", "sub/c.jsonl")
    monkeypatch.chdir(tmp_path)
    for pattern, names in {"a.jsonl": ["a.jsonl"], "sub": ["b.jsonl", "c.jsonl"], "**/*.jsonl": None}.items():
        files = find_files(pattern, SUFFIXES).files
        assert [file.name for file in files] == (names or ["a.jsonl", "sub/b.jsonl", "sub/c.jsonl"])


@pytest.mark.parametrize("folder", ["lang=en", "v[1]"])
def test_of_a_directory_with_chunk_files_only_these(tmp_path: Path, folder: str) -> None:
    chunks = [f"{folder}/en.chunk.{number}.jsonl" for number in range(3)]
    make(tmp_path, *chunks, f"{folder}/sub/de.chunk.0.jsonl", f"{folder}/en.val.jsonl", f"{folder}/all.jsonl")
    assert found(f"{tmp_path}/{folder}", str(tmp_path)) == [*chunks, f"{folder}/sub/de.chunk.0.jsonl"]


def test_a_glob_takes_chunk_files_and_others(tmp_path: Path) -> None:
    make(tmp_path, "en.chunk.0.jsonl", "en.val.jsonl")
    assert found(f"{tmp_path}/*.jsonl", str(tmp_path)) == ["en.chunk.0.jsonl", "en.val.jsonl"]


REMOTE: dict[str, list[str]] = {
    "a.jsonl": ["a.jsonl"],
    "": ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz"],
    "sub": ["sub/c.jsonl.gz"],
    "*.jsonl": ["a.jsonl", "b.jsonl"],
    "*": ["a.jsonl", "a.txt", "b.jsonl"],
    "**/*.gz": ["sub/c.jsonl.gz"],
    ".hidden": [".hidden/e.jsonl"],
    ".d.jsonl": [".d.jsonl"],
}


@pytest.mark.parametrize(("pattern", "expected"), REMOTE.items(), ids=REMOTE)
def test_what_an_address_names(memory: MemoryFileSystem, pattern: str, expected: list[str]) -> None:
    for number, name in enumerate(["b.jsonl", "a.jsonl", "a.txt", "sub/c.jsonl.gz", ".d.jsonl", ".hidden/e.jsonl"]):
        memory.pipe(f"/data/{name}", b"x" * number)
    files = find_files(f"memory://data/{pattern}", SUFFIXES).files
    assert [file.path for file in files] == [f"memory:///data/{name}" for name in expected]
    assert [file.size for file in files] == [memory.size(f"/data/{name}") for name in expected]


def test_an_address_of_chunk_files(memory: MemoryFileSystem) -> None:
    for name in ("en.chunk.1.jsonl", "en.chunk.0.jsonl", "en.val.jsonl"):
        memory.pipe(f"/data/{name}", b"{}")
    files = find_files("memory://data", SUFFIXES).files
    assert [file.name for file in files] == ["en.chunk.0.jsonl", "en.chunk.1.jsonl"]


def test_names_of_addresses_are_relative_to_the_common_folder(memory: MemoryFileSystem) -> None:
    for name in ("part-1/a.jsonl", "part-10/a.jsonl"):
        memory.pipe(f"/data/{name}", b"{}")
    assert [file.name for file in find_files("memory://data", SUFFIXES).files] == ["part-1/a.jsonl", "part-10/a.jsonl"]
    assert [file.name for file in find_files("memory://data/part-1/a.jsonl", SUFFIXES).files] == ["a.jsonl"]


ADDRESSES = {
    "memory://absent.jsonl": "expected data, found no file, directory or match (.jsonl)",
    "memory://absent/*.jsonl": "expected data, found no file, directory or match (.jsonl)",
    "nonsense://bucket/a.jsonl": "expected an address of files that are read as they are, found 'nonsense'; valid names:",
    "htps://host/a.jsonl": "expected an address of files that are read as they are, found 'htps'; did you mean https?",
    "zip://a.jsonl::/absent.zip": "expected the address of one file system, found several",
    "simplecache::memory://a.jsonl": "expected the address of one file system, found several",
}


@pytest.mark.parametrize(("address", "expected"), ADDRESSES.items(), ids=ADDRESSES)
def test_addresses_that_name_nothing(memory: MemoryFileSystem, address: str, expected: str) -> None:
    memory.pipe("/a.jsonl", b"{}")
    with pytest.raises(UsageError, match=f"^{re.escape(f'{address}: {expected}')}"):
        find_files(address, SUFFIXES)


CONTENT = b"first\nsecond\n" * 30_000

STORED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "one.gz": gzip.compress,
    "members.gz": lambda data: gzip.compress(data[:7]) + gzip.compress(b"") + gzip.compress(data[7:]),
    "padded.gz": lambda data: gzip.compress(data) + bytes(512),
    "ONE.GZ": gzip.compress,
    "one.bz2": bz2.compress,
    "streams.bz2": lambda data: bz2.compress(data[:7]) + bz2.compress(b"") + bz2.compress(data[7:]),
    "one.xz": lzma.compress,
    "streams.xz": lambda data: lzma.compress(data[:7]) + bytes(4) + lzma.compress(data[7:]) + bytes(8),
    "no checksum.xz": lambda data: lzma.compress(data, check=lzma.CHECK_NONE),
    "one.zst": zstd,
    "frames.zst": lambda data: zstd(data[:7]) + zstd(b"") + zstd(data[7:]),
}


@pytest.mark.parametrize("name", STORED)
def test_opened_gives_the_content(tmp_path: Path, memory: MemoryFileSystem, name: str) -> None:
    stored = STORED[name](CONTENT)
    (tmp_path / name).write_bytes(stored)
    memory.pipe(f"/{name}", stored)
    for path in (str(tmp_path / name), f"memory://{name}", f"file://{tmp_path}/{name}"):
        with opened(path) as file:
            assert file.read(5) == CONTENT[:5]
            assert file.read() == CONTENT[5:]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.gz", "gone.bz2", "gone.xz", "gone.zst", "folder"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(DataError, match=rf"{name}: cannot read the data: (No such file|Is a directory)"),
        opened(f"{tmp_path}/{name}"),
    ):
        pass


def test_an_address_that_cannot_be_opened(memory: MemoryFileSystem) -> None:
    with pytest.raises(DataError, match=r"^memory://gone\.jsonl: cannot read the data: "), opened("memory://gone.jsonl"):
        pass


@pytest.mark.parametrize("name", ["a.gz", "a.bz2", "a.xz", "a.zst"])
def test_damage_that_the_reader_does_not_expect_is_an_error_of_the_data(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(STORED[f"one{path.suffix}"](CONTENT)[:-9])
    with pytest.raises(DataError, match=re.escape(f"{path}: expected a whole compressed file")), opened(str(path)) as file:
        file.read()


def print_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    (file,) = find_files(str(path), SUFFIXES).files
    return fingerprint(file)


SIZES = [1, 2, 1000, 65_536, 65_537, 200_001, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_the_fingerprint_tells_contents_apart(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    others = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in {0, size // 2, size - 1}]
    versions = [data, data + b"\0", data[:-1], *others]
    assert len({print_of(tmp_path / "a", version) for version in versions}) == len(versions)


@pytest.mark.parametrize("size", [0, *SIZES])
def test_the_fingerprint_does_not_tell_names_apart(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    assert print_of(tmp_path / "a", data) == print_of(tmp_path / "b", data)


def test_the_fingerprint_of_an_address(memory: MemoryFileSystem) -> None:
    found = []
    for data in (b"aaa", b"bbb", b"bbbb"):
        memory.pipe("/a.jsonl", data)
        (file,) = find_files("memory://a.jsonl", SUFFIXES).files
        found.append(fingerprint(file))
        assert fingerprint(file) == found[-1]
    assert len(set(found)) == 3
    memory.rm("/a.jsonl")
    with pytest.raises(DataError, match=r"^memory:///a\.jsonl: cannot read the data: "):
        fingerprint(file)


def test_the_fingerprint_of_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: cannot read the data: No such file"):
        fingerprint(File(str(tmp_path / "gone"), "gone", 3))
