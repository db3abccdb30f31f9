from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fnrecipe.data import Block, Document, Reading, byte_tokenizer, open_corpus
from fnrecipe.data.document import Read
from fnrecipe.data.formats import tokens as module
from fnrecipe.data.formats.tokens import check_dtype, read, sizes, starts
from fnrecipe.errors import DataError, UsageError

EOS, BOS, VOCAB_SIZE = 0, 1, 1000


def slow_starts(ids: Sequence[int], eos: int = EOS) -> list[int]:
    return [place for place in range(len(ids)) if place == 0 or ids[place - 1] == eos]


def slow_documents(ids: Sequence[int], eos: int = EOS, bos: int = BOS) -> list[list[int]]:
    found: list[list[int]] = []
    document: list[int] = []
    for place, token in enumerate(ids):
        if token != eos:
            document.append(token)
        if token == eos or place == len(ids) - 1:
            found.append(document[1:] if document[:1] == [bos] else document)
            document = []
    return found


def read_all(
    blocks: Sequence[Block], dtype: str = "uint16", eos: int = EOS, bos: int = BOS, vocab_size: int = VOCAB_SIZE
) -> list[Read]:
    return [item for block in blocks for item in read(block, dtype=dtype, eos=eos, bos=bos, vocab_size=vocab_size)]


def plain(items: Sequence[Read]) -> list[list[int] | str]:
    for item in items:
        assert not isinstance(item, Document) or (item.ids is not None and item.ids.dtype == np.int32 and item.text is None)
    return [item.ids.tolist() if isinstance(item, Document) and item.ids is not None else str(item) for item in items]


def save(path: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    np.save(path, np.array(ids, dtype))
    return path


def header(magic: int, version: int, count: int) -> bytes:
    return np.array([magic, version, count] + [0] * 253, "<i4").tobytes()


def array(dtype: str) -> Callable[[Path, Sequence[int]], Path]:
    return lambda folder, ids: save(folder / "a.npy", ids, dtype)


def raw(dtype: str, magic: tuple[int, int] | None = None) -> Callable[[Path, Sequence[int]], Path]:
    def write(folder: Path, ids: Sequence[int]) -> Path:
        path = folder / "a.bin"
        path.write_bytes((header(*magic, len(ids)) if magic else b"") + np.array(ids, dtype).tobytes())
        return path

    return write


# How a file is written, and the type of `.bin` files that the reader is told.
WRITERS: dict[str, tuple[Callable[[Path, Sequence[int]], Path], str]] = {
    "npy uint16": (array("uint16"), "uint32"),
    "npy uint32": (array("uint32"), "uint16"),
    "npy int32": (array("int32"), "uint16"),
    "npy int64": (array("int64"), "uint16"),
    "npy of another byte order": (array(">u4"), "uint16"),
    "bin uint16": (raw("<u2"), "uint16"),
    "bin uint32": (raw("<u4"), "uint32"),
    "bin with GPT-2's header": (raw("<u2", (20240520, 1)), "uint32"),
    "bin with Llama 3's header": (raw("<u4", (20240801, 7)), "uint16"),
}

IDS: dict[str, list[int]] = {
    "nothing": [],
    "one token": [5],
    "one document": [5, 6, 7, EOS],
    "no final end": [5, EOS, 6, 7],
    "two ends in a row": [5, EOS, EOS, 6, EOS],
    "only ends": [EOS, EOS],
    "begins with an end": [EOS, 5, 6, EOS, 7],
    "beginnings": [BOS, 5, 6, EOS, BOS, 7, EOS],
    "two beginnings": [BOS, BOS, 5, EOS],
    "a beginning inside": [5, BOS, 6, EOS],
    "beginnings alone": [BOS, EOS, BOS],
    "long": list(range(2, 900)),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("name", WRITERS)
def test_documents_of_every_kind_of_file(tmp_path: Path, name: str, ids: list[int]) -> None:
    write, dtype = WRITERS[name]
    path = write(tmp_path, ids)
    assert sizes([str(path)], dtype) == [len(ids)]
    assert plain(read_all([Block(str(path), 0, len(ids))], dtype)) == slow_documents(ids)
    assert starts(str(path), dtype, EOS).tolist() == slow_starts(ids)
    assert starts(str(path), dtype, EOS).dtype == np.int64


def test_a_token_that_both_begins_and_ends_documents(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", [9, 5, 6, 9, 7, 9])
    assert plain(read_all([Block(str(path), 0, 6)], eos=9, bos=9)) == [[], [5, 6], [7]]


def test_an_end_that_the_type_cannot_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", [5, 6, 7])
    assert plain(read_all([Block(str(path), 0, 3)], eos=100_000, bos=100_000, vocab_size=100_001)) == [[5, 6, 7]]
    assert starts(str(path), "uint16", 100_000).tolist() == [0]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens") / "a.npy"


@pytest.mark.parametrize("step", [1, 3, 1 << 16])
@settings(max_examples=60)
@given(ids=st.lists(st.integers(0, 4), max_size=30), bos=st.sampled_from([EOS, BOS]), data=st.data())
def test_every_document_once_whatever_the_cuts_and_their_order(
    scratch: Path, step: int, ids: list[int], bos: int, data: st.DataObject
) -> None:
    path = str(save(scratch, ids))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    blocks = [Block(path, start, stop) for start, stop in pairwise([0, *sorted(cuts), len(ids)])]
    order = data.draw(st.permutations(range(len(blocks))))
    with mock.patch.object(module, "_STEP", step):
        found = {number: plain(read_all([blocks[number]], bos=bos)) for number in order}
    assert [document for number in sorted(found) for document in found[number]] == slow_documents(ids, bos=bos)
    assert starts(path, "uint16", EOS).tolist() == slow_starts(ids)


def test_a_document_longer_than_many_steps(tmp_path: Path) -> None:
    ids = [2, EOS, *[3] * 300_000, EOS, 4]
    path = str(save(tmp_path / "a.npy", ids))
    blocks = [Block(path, start, min(start + 1000, len(ids))) for start in range(0, len(ids), 1000)]
    assert plain(read_all(blocks)) == [[2], [3] * 300_000, [4]]


OUTSIDE: dict[str, tuple[NDArray[np.generic], str]] = {
    "too large": (np.array([2, EOS, 3, 1000, 4, EOS, 5], np.uint16), "token 3: expected ids below 1000, found 1000"),
    "negative": (np.array([2, EOS, -1, 3, EOS, 5], np.int64), "token 2: expected ids below 1000, found -1"),
    "behind a beginning": (np.array([2, EOS, BOS, 3, 1234, EOS, 5], np.uint16), "token 4: expected ids below 1000, found 1234"),
    "far too large": (np.array([2, EOS, 1 << 63, EOS, 5], np.uint64), f"token 2: expected ids below 1000, found {1 << 63}"),
    "beyond 32 bits": (
        np.array([2, EOS, (1 << 32) + 2, EOS, 5], np.int64),
        "token 2: expected ids below 1000, found 4294967298",
    ),
}


@pytest.mark.parametrize(("ids", "expected"), OUTSIDE.values(), ids=OUTSIDE)
def test_ids_outside_the_vocabulary(tmp_path: Path, ids: NDArray[np.generic], expected: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, ids)
    assert plain(read_all([Block(str(path), 0, len(ids))])) == [[2], f"{path}: {expected}", [5]]


def test_the_last_id_of_the_vocabulary_is_valid(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", [999, EOS])
    assert plain(read_all([Block(str(path), 0, 2)])) == [[999]]


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def bad_files(folder: Path) -> dict[str, bytes]:
    trap = np.empty(1, object)
    trap[0] = Trap(folder / "sprung")
    arrays = {
        "two dimensions": np.zeros((2, 3), np.uint16),
        "a number": np.uint16(3),
        "float": np.zeros(3),
        "bool": np.zeros(3, bool),
        "text": np.array(["a"]),
        "structure": np.zeros(3, [("a", "u2")]),
        "objects": trap,
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    np.savez(folder / "archive.npz", a=np.zeros(3, np.uint16))
    whole = save(folder / "whole.npy", range(1000)).read_bytes()
    return {name: (folder / f"{name}.npy").read_bytes() for name in arrays} | {
        "archive": (folder / "archive.npz").read_bytes(),
        "pickle": pickle.dumps(Trap(folder / "sprung")),
        "empty": b"",
        "lines": b"this is no array",
        "cut off": whole[:-20],
        "cut off in the header": whole[:50],
        "cut off before the header": whole[:7],
    }


BAD_NPY = {
    "two dimensions": "expected a flat array of integers, found uint16 [2, 3]",
    "a number": "expected a flat array of integers, found uint16 []",
    "float": "expected a flat array of integers, found float64 [3]",
    "bool": "expected a flat array of integers, found bool [3]",
    "text": "expected a flat array of integers, found <U1 [1]",
    "structure": "expected a flat array of integers, found [('a', '<u2')] [3]",
    "objects": "expected an array of token ids, found ",
    "archive": "expected an array of token ids, found ",
    "pickle": "expected an array of token ids, found ",
    "empty": "expected an array of token ids, found ",
    "lines": "expected an array of token ids, found ",
    "cut off": "expected an array of token ids, found ",
    "cut off in the header": "expected an array of token ids, found ",
    "cut off before the header": "expected an array of token ids, found ",
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_what_is_no_array_of_tokens(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(bad_files(tmp_path)[name])
    for call in (lambda: sizes([str(path)], "uint16"), lambda: starts(str(path), "uint16", EOS)):
        with pytest.raises(DataError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: {BAD_NPY[name]}")
    assert not (tmp_path / "sprung").exists()


ODD = {
    "uint16": (b"123", "uint16", "expected a multiple of 2 bytes for uint16 ids, found 3"),
    "uint32": (b"123456", "uint32", "expected a multiple of 4 bytes for uint32 ids, found 6"),
    "GPT-2": (header(20240520, 1, 1) + b"1", "uint32", "expected a multiple of 2 bytes for uint16 ids, found 1"),
    "Llama 3": (header(20240801, 7, 1) + b"12", "uint16", "expected a multiple of 4 bytes for uint32 ids, found 2"),
}


@pytest.mark.parametrize(("data", "dtype", "expected"), ODD.values(), ids=ODD)
def test_files_that_end_within_a_token(tmp_path: Path, data: bytes, dtype: str, expected: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        sizes([str(path)], dtype)
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize("name", ["gone.npy", "gone.bin"])
def test_a_file_that_is_gone(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot read the data: No such file"):
        sizes([str(tmp_path / name)], "uint16")


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_only_local_files(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^memory://{name}: token arrays are read from local files only"):
        sizes([f"memory://{name}"], "uint16")


# Raw files of another type than the config says.

SMALL, LARGE = 8192, 151_936


def ids_of(kind: str, vocab_size: int, size: int, seed: int = 0) -> NDArray[np.int64]:
    """Ids that a corpus may have: anything, bytes, mostly zeros, zeros for long, or few words over and over."""
    draw = np.random.default_rng(seed)
    limit = min(vocab_size, 1 << 16)
    match kind:
        case "bytes":
            return draw.integers(0, 256, size)
        case "mostly zeros":
            return draw.integers(1, limit, size) * (draw.random(size) < 0.02)
        case "zeros first":
            return np.where(np.arange(size) < size // 2, 0, draw.integers(0, limit, size))
        case "two words":
            return draw.integers(0, 2, size)
        case "short documents":
            return np.where(np.arange(size) % 3 == 2, 0, draw.integers(1, limit, size))
    return draw.integers(0, limit, size)


ID_KINDS = ["anything", "bytes", "mostly zeros", "zeros first", "two words", "short documents"]
SIZES = [2000, 70_000, 400_001]


@pytest.mark.parametrize("vocab_size", [SMALL, 1 << 16, LARGE])
@pytest.mark.parametrize("kind", ID_KINDS)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ids_of_the_type_that_the_config_says_are_taken(tmp_path: Path, dtype: str, kind: str, vocab_size: int) -> None:
    for size in [0, 1, 31, *SIZES]:
        path = raw(dtype)(tmp_path, ids_of(kind, vocab_size, size).tolist())
        check_dtype(str(path), dtype, vocab_size)


@pytest.mark.parametrize("vocab_size", [SMALL, 1 << 16, LARGE])
@pytest.mark.parametrize("kind", ID_KINDS)
@pytest.mark.parametrize(
    ("dtype", "said", "advice"),
    [
        ("uint32", "uint16", "set `dtype: uint32` for this source"),
        ("uint16", "uint32", "set `dtype: uint16` for this source"),
        ("uint64", "uint16", "write them as .npy"),
        ("uint64", "uint32", "write them as .npy"),
    ],
)
def test_ids_of_another_type_are_refused_by_the_name_of_theirs(
    tmp_path: Path, dtype: str, said: str, advice: str, kind: str, vocab_size: int
) -> None:
    if (dtype, said) == ("uint16", "uint32") and kind in ("mostly zeros", "zeros first", "two words"):
        kind = "anything"  # most of these pairs of ids are ids too: what is none becomes a bad record
    if kind == "two words" and vocab_size == LARGE:
        kind = "bytes"  # two of 151,936 ids may be upper halves
    for size in SIZES:
        path = raw(dtype)(tmp_path, ids_of(kind, vocab_size, size - size % 2).tolist())
        with pytest.raises(UsageError) as caught:
            check_dtype(str(path), said, vocab_size)
        assert str(caught.value).startswith(f"{path}: expected ids of `dtype: {said}`, found what looks like {dtype}; {advice}")


@settings(max_examples=200)
@given(ids=st.lists(st.sampled_from([0, 0, 0, 1, 2, 255, 999]), max_size=200), dtype=st.sampled_from(["uint16", "uint32"]))
def test_no_list_of_ids_is_refused_unless_every_second_is_zero(scratch: Path, ids: list[int], dtype: str) -> None:
    path = scratch.with_suffix(".bin")
    path.write_bytes(np.array(ids, dtype).tobytes())
    odd = [number for number in ids[1::2] if number]
    if len(odd) > 0.2 * len(ids) / 2 or len(ids) < 64:
        check_dtype(str(path), dtype, VOCAB_SIZE)


def test_a_wrong_id_here_and_there_is_no_other_type(tmp_path: Path) -> None:
    ids = ids_of("anything", SMALL, 4000)
    ids[::100] = 70_000
    check_dtype(str(raw("uint32")(tmp_path, ids.tolist())), "uint32", SMALL)


def test_ids_of_a_larger_vocabulary_are_no_other_type(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 128_256, 4000)
    for vocab_size in (SMALL, 50_257, 100_000):
        check_dtype(str(raw("uint32")(tmp_path, ids.tolist())), "uint32", vocab_size)


@pytest.mark.parametrize("name", ["bin with GPT-2's header", "bin with Llama 3's header", "npy uint16", "npy uint32"])
def test_files_that_say_their_type_are_not_doubted(tmp_path: Path, name: str) -> None:
    write, dtype = WRITERS[name]
    check_dtype(str(write(tmp_path, ids_of("bytes", SMALL, 4000).tolist())), dtype, SMALL)


def test_a_source_of_another_type_is_refused(tmp_path: Path) -> None:
    path = raw("uint32")(tmp_path, ids_of("anything", 257, 200).tolist())
    with pytest.raises(UsageError, match=r"set `dtype: uint32` for this source"):
        open_corpus(str(path), byte_tokenizer())
    assert len(open_corpus(str(path), byte_tokenizer(), reading=Reading(dtype="uint32")).blocks)
