"""Links, special files, what cannot be read, and what is left out: each real file once, and nothing passed over in silence."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import byte_tokenizer, open_corpus, search
from fnrecipe.data.files import opened
from fnrecipe.data.search import find_files
from fnrecipe.errors import DataError, UsageError

SUFFIXES = (".jsonl", ".jsonl.gz")
ROOT = Path(__file__).resolve().parents[2]


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def found(path: Path | str, root: Path) -> list[str]:
    return [os.path.relpath(file.path, root) for file in find_files(str(path), SUFFIXES).files]


LINKS: dict[str, Callable[[Path], object]] = {
    "a folder in itself": lambda root: os.symlink(".", root / "data/self"),
    "two folders in each other": lambda root: [os.symlink("..", root / "data/sub/up"), os.symlink("sub", root / "data/down")],
    "a folder above": lambda root: os.symlink("../../data", root / "data/sub/again"),
    "a file": lambda root: os.symlink("z.jsonl", root / "data/a.jsonl"),
    "a link to a link": lambda root: [os.symlink("sub", root / "data/a"), os.symlink("a", root / "data/b")],
    "a hard link": lambda root: os.link(root / "data/sub/y.jsonl", root / "data/zz.jsonl"),
}


@pytest.mark.parametrize("pattern", ["data", "data/**/*.jsonl"])
@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_each_file_is_found_once_whatever_links_lead_to_it(
    tmp_path: Path, link: Callable[[Path], object], pattern: str
) -> None:
    make(tmp_path, "data/z.jsonl", "data/sub/y.jsonl")
    link(tmp_path)
    assert found(tmp_path / pattern, tmp_path) == ["data/sub/y.jsonl", "data/z.jsonl"]


def test_links_out_of_a_directory_are_followed_each_place_once(tmp_path: Path) -> None:
    make(tmp_path, "data/z.jsonl", "other/deep/x.jsonl", "other/w.jsonl")
    for name in ("first", "second"):
        os.symlink("../other", tmp_path / "data" / name)
    os.symlink("../other/w.jsonl", tmp_path / "data/file.jsonl")
    assert found(tmp_path / "data", tmp_path) == ["data/first/deep/x.jsonl", "data/first/w.jsonl", "data/z.jsonl"]


NAMES = st.sampled_from(["a", "b.jsonl", ".h", "c.txt", "d[1]", "sub"])
TREES = st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=6)
PATTERNS = st.lists(
    st.sampled_from(["*", "**", "a", "sub", "*.jsonl", "?", ".*", "[ab]*", "d[1]", "."]), min_size=1, max_size=4
)


@given(tree=TREES, pattern=PATTERNS.map("/".join))
def test_a_glob_finds_the_files_that_pythons_does(
    tmp_path_factory: pytest.TempPathFactory, tree: list[str], pattern: str
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name in tree:
        if (
            not any((root / parent).is_file() for parent in [name, *map(str, Path(name).parents)])
            and not (root / name).is_dir()
        ):
            make(root, name)
    matches = glob.glob(f"{glob.escape(str(root))}/{pattern}", recursive=True)
    expected = {os.path.realpath(path) for path in matches if os.path.isfile(path)}
    if os.path.lexists(root / pattern):  # a path that is there is no glob
        return
    try:
        assert {os.path.realpath(file.path) for file in find_files(f"{root}/{pattern}", SUFFIXES).files} == expected
    except UsageError:
        assert not expected


@pytest.mark.parametrize("pattern", ["data", "data/*", "data/**/*"])
def test_a_link_to_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "data/a.jsonl")
    os.symlink("gone", tmp_path / "data/b.jsonl")
    with pytest.raises(
        DataError, match=r"data/b\.jsonl: expected a file or a folder, found a link to gone, which is not there"
    ):
        find_files(f"{tmp_path}/{pattern}", SUFFIXES)


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    os.symlink("b.jsonl", tmp_path / "b.jsonl")
    for path in (tmp_path, tmp_path / "b.jsonl", tmp_path / "*"):
        with pytest.raises(DataError, match=r"b\.jsonl: cannot read the data: Too many levels of symbolic links"):
            find_files(str(path), SUFFIXES)


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A folder with one special file each, and what it is called."""
    with socket.socket(socket.AF_UNIX) as server:
        for folder in ("pipe", "socket"):
            make(tmp_path, f"{folder}/z.jsonl")
        os.mkfifo(tmp_path / "pipe/a.jsonl")
        os.chdir(tmp_path)
        server.bind("socket/a.jsonl")
        yield {f"{tmp_path}/pipe": "a pipe", f"{tmp_path}/socket": "a socket"}


def test_pipes_sockets_and_devices_are_refused_and_never_waited_for(
    special: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    places = {path: kind for folder, kind in special.items() for path in (folder, f"{folder}/a.jsonl", f"{folder}/*")}
    for path, kind in {**places, "/dev/zero": "a device"}.items():
        with pytest.raises(DataError, match=f": expected a file that can be read again, found {kind}"):
            find_files(path, SUFFIXES)


def test_a_pipe_that_took_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="found a pipe"), opened(str(tmp_path / "a.jsonl")):
        pass


UNREADABLE = {"folder": "data/closed", "path in it": "data/closed/a.jsonl", "glob": "data/*/*.jsonl", "tree": "data"}


@pytest.mark.parametrize("path", UNREADABLE.values(), ids=UNREADABLE)
def test_a_folder_without_read_permission_is_an_error(path: str) -> None:
    code = "import os, sys; from fnrecipe.data.search import find_files; os.getuid() or os.setuid(65534); "
    code += "find_files(sys.argv[1], ('.jsonl',))"
    root = Path(tempfile.mkdtemp())
    try:
        make(root, "data/b.jsonl", "data/closed/a.jsonl")
        root.chmod(0o755)
        (root / "data/closed").chmod(0o000)
        done = subprocess.run([sys.executable, "-c", code, root / path], cwd=ROOT, capture_output=True, text=True)
        assert f"DataError: {root}/data/closed" in done.stderr
        assert "cannot read the data: Permission denied" in done.stderr
    finally:
        (root / "data/closed").chmod(0o700)
        shutil.rmtree(root)


def test_a_file_that_vanishes_after_it_was_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl")
    listdir = os.listdir

    def listed_and_gone(path: str) -> list[str]:
        names = listdir(path)
        (tmp_path / "b.jsonl").unlink(missing_ok=True)
        return names

    monkeypatch.setattr(os, "listdir", listed_and_gone)
    with pytest.raises(DataError, match=r"b\.jsonl: cannot read the data: No such file"):
        find_files(str(tmp_path), SUFFIXES)


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"two\nlines.jsonl", b"\x1b[2J.jsonl"])
def test_a_name_that_no_message_could_hold_is_an_error(tmp_path: Path, name: bytes) -> None:
    make(tmp_path, "a.jsonl", "größe 東京\u3000.jsonl")
    assert len(find_files(str(tmp_path), SUFFIXES).files) == 2
    (tmp_path / os.fsdecode(name)).touch()
    with pytest.raises(DataError, match=r"\.jsonl: expected a name in UTF-8 without control characters; rename it") as caught:
        find_files(str(tmp_path), SUFFIXES)
    assert len(str(caught.value).encode().splitlines()) == 1


LEFT_OUT = {
    "nothing": (["a.jsonl"], ""),
    "hidden": (["a.jsonl", ".b.jsonl", ".git/c.jsonl"], "2 hidden"),
    "other suffixes": (["a.jsonl", "README.MD", "b.md", "LICENSE", "c.csv.gz"], "1 .csv.gz, 2 .md, 1 without suffix"),
    "chunks": (["a.chunk.0.jsonl", "a.jsonl", "sub/b.jsonl", "c.md"], "1 .md, 2 beside *.chunk.* files"),
    "many kinds": (
        ["a.jsonl", *(f"a.x{n}" for n in range(11))],
        "1 .x0, 1 .x1, 1 .x10, 1 .x2, 1 .x3, 1 .x4, 1 .x5, 1 .x6, 3 more",
    ),
}


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize(("names", "expected"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_a_directory_holds_beside_its_data_is_counted_by_kind(
    tmp_path: Path, names: list[str], expected: str, where: str
) -> None:
    make(tmp_path, *names)
    path = str(tmp_path)
    if where == "memory":
        path = "memory://left"
        fsspec.filesystem("memory").put(f"{tmp_path}/", "/left", recursive=True)
    try:
        line = find_files(path, SUFFIXES).left_out
    finally:
        fsspec.filesystem("memory").store.clear()
    assert line.startswith(f"{path}: left out: {expected}" if expected else "")
    assert bool(line) == bool(expected)


def test_folders_and_further_names_that_a_glob_matches_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "sub/b.jsonl")
    os.symlink("a.jsonl", tmp_path / "c.jsonl")
    expected = f"{tmp_path}/*: left out: 1 folder(s), 1 further name(s) of the same files"
    assert find_files(f"{tmp_path}/*", SUFFIXES).left_out == expected


@pytest.mark.parametrize("name", ["a.JSONL", "a.Ndjson", "a.json", "a.jsonl.BZ2", "a.NDJSON.xz", "a.json.Zst"])
def test_suffixes_in_any_case_are_found_in_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    assert len(open_corpus(str(tmp_path), byte_tokenizer()).files) == 2


def test_a_search_that_takes_long_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "a.jsonl")
    told = threading.Event()
    monkeypatch.setattr(caplog.handler, "emit", lambda record, emit=caplog.handler.emit: (emit(record), told.set()))
    monkeypatch.setattr(search, "_PATIENCE", 0.0)
    monkeypatch.setattr(search, "_local", lambda *args, slow=search._local: told.wait(60) and slow(*args))
    assert found(tmp_path, tmp_path) == ["a.jsonl"]
    assert caplog.messages == [f"{tmp_path}: still searching for files"]
