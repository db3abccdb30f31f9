"""Manifests that lie, with sums that are right: nothing is loaded but what was saved."""

from __future__ import annotations

import copy
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fnrecipe import checkpoint
from fnrecipe.checkpoint import manifest
from fnrecipe.checkpoint.tensors import Saved
from fnrecipe.errors import CheckpointError
from tests.checkpoints import FILES, assert_is_step, newest, save_two, sign, silent, small_state

SHARD = FILES[0]
QUERY, NORM = "params.layers.0.query", "params.norm"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return save_two(tmp_path)


def document(place: Path) -> Any:
    return json.loads((place / "state.json").read_text())


def lie(place: Path, text: str | bytes) -> None:
    """Puts `text` into the manifest, with the right sum."""
    (place / "state.json").write_bytes(text.encode() if isinstance(text, str) else text)
    sign(place)


def assert_falls_back(root: Path, word: str = "damaged checkpoint passed over") -> None:
    found, (warning,) = newest(root)
    assert_is_step(found, 10)
    assert "step_00000020: damaged checkpoint passed over: " in warning
    assert word in warning
    assert warning.isprintable()


WRONG: dict[str, tuple[list[Any], tuple[Any, ...]]] = {
    "a format": ([None, True, 3.0, "3", [3], -3, 2**70], ("format",)),
    "a step": ([None, True, 20.0, "20", [20], -20, 2**63, 10**400, 19, 21], ("step",)),
    "files": ([None, [], "x", {"a": 1}, {"a": None}, {"a": ["x"]}], ("files",)),
    "shards": ([None, {}, [], "x", [1], [SHARD, SHARD], [[SHARD]], ["state_0001.safetensors"]], ("shards",)),
    "the name of a shard": (
        [f"../step_00000010/{SHARD}", f"/{SHARD}", f"./{SHARD}", f"a/{SHARD}", f"{SHARD}\n", "state.json", "", "..", "\0"],
        ("shards", 0),
    ),
    "tensors": ([None, [], "x", {}], ("tensors",)),
    "a tensor": ([None, {}, [], "x", ["float32"], ["float32", [2, 3]], ["float32", [2, 3], {}, 1]], ("tensors", QUERY)),
    "a dtype": (["int32", "F32", "float64", "torch.float32", "", "save", None, 3, ["float32"]], ("tensors", QUERY, 0)),
    "a shape": (
        [
            [3, 2],
            [6],
            [2, 3, 1],
            [2, 4],
            [1, 3],
            [],
            [-2, -3],
            [2.0, 3],
            [2, True],
            ["2", 3],
            [2**63, 3],
            [[2], 3],
            {},
            "23",
            6,
        ],
        ("tensors", QUERY, 1),
    ),
    "parts": (
        [{}, [], None, {"state_0001.safetensors": [[0, 2], [0, 3]]}, {"/etc/passwd": [[0, 2], [0, 3]]}, {"": [[0, 2], [0, 3]]}],
        ("tensors", QUERY, 2),
    ),
    "the ranges of a part": (
        [
            *([[0, 2]], [[0, 2], [0, 3], [0, 1]], [[0, 2], [0, 2]], [[0, 2], [1, 3]], [[0, 2], [0, 4]], [[0, 2], [1, 4]]),
            *(
                [[0, 2], [-1, 2]],
                [[-2, 0], [-3, 0]],
                [[2, 0], [3, 0]],
                [[0, 0], [0, 3]],
                [[0, 2], [0, 3.0]],
                [[0, 2], [False, 3]],
            ),
            *([[0, 2], [0]], [[0, 2], [0, 1, 3]], [[0, 2], 3], {"0": [0, 2], "1": [0, 3]}, None, "", [["0", 2], [0, 3]]),
            *([[0, 2**63], [0, 3]], [[2**62, 2**62 + 2], [0, 3]]),
        ],
        ("tensors", QUERY, 2, SHARD),
    ),
}


@pytest.mark.parametrize(("values", "path"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_so_is_damage(two: Path, values: list[Any], path: tuple[Any, ...]) -> None:
    place = two / "step_00000020"
    true = document(place)
    for value in values:
        lied = copy.deepcopy(true)
        parent = lied
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
        lie(place, json.dumps(lied))
        assert_falls_back(two)


@pytest.mark.parametrize("key", ["step", "cursor", "files", "shards", "tensors"])
def test_a_key_that_is_missing_or_unknown_is_damage(two: Path, key: str) -> None:
    true = document(two / "step_00000020")
    for lied in ({**true, f"{key}s": 1}, {name: value for name, value in true.items() if name != key}):
        lie(two / "step_00000020", json.dumps(lied))
        assert_falls_back(two, "keys")


def test_tensors_other_than_those_in_the_file_are_damage(two: Path) -> None:
    true = document(two / "step_00000020")
    tensors = true["tensors"]
    swapped = {**tensors, NORM: tensors["step"], "step": tensors[NORM]}
    fewer = {path: entry for path, entry in tensors.items() if path != NORM}
    for lied in (fewer, {**tensors, "more": tensors[NORM]}, {**fewer, "other": tensors[NORM]}, swapped):
        lie(two / "step_00000020", json.dumps({**true, "tensors": lied}))
        assert_falls_back(two, f"{SHARD} does not hold the tensors of state.json")


TEXTS = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"3",
    "two documents": b"{}{}",
    "deep lists": b"[" * 100_000,
    "deep mappings": b'{"format":' * 100_000,
    "a long number": b'{"format": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"format": 3, "\xff": 1}',
    "UTF-16": '{"format": 3}'.encode("utf-16"),
    "a byte order mark": '\ufeff{"format": 3}'.encode(),
    "a line of zeros": bytes(4096),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_what_is_no_manifest_is_damage(two: Path, text: bytes) -> None:
    lie(two / "step_00000020", text)
    assert_falls_back(two)


@pytest.mark.parametrize("cursor", ["NaN", "Infinity", "-Infinity", "1e999", '{"a": 1, "a": 1}', "[" * 65 + "]" * 65])
def test_a_cursor_that_other_readers_of_json_would_refuse_is_damage(two: Path, cursor: str) -> None:
    place = two / "step_00000020"
    lie(place, json.dumps({**document(place), "cursor": 0}).replace('"cursor": 0', f'"cursor": {cursor}'))
    assert_falls_back(two)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_manifest_that_is_too_big_is_not_read(two: Path, name: str) -> None:
    os.truncate(two / "step_00000020" / name, 1 << 40)
    assert_falls_back(two, f"{name}: expected at most ")


def a_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # the whole path is too long for a socket's name
    os.close(folder)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": a_socket,
    "a link": lambda path: (path.with_name("copy").write_bytes(path.read_bytes()), path.unlink(), path.symlink_to("copy")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_only_files_are_opened(two: Path, name: str, kind: str) -> None:
    path = two / "step_00000020" / name
    if kind != "a link":
        path.unlink()
    KINDS[kind](path)
    assert_falls_back(two, f"{name}: expected a file, found {kind}")


@pytest.mark.parametrize("kind", ["a pipe", "a socket"])
def test_only_directories_are_checkpoints(two: Path, kind: str) -> None:
    KINDS[kind](two / "step_00000030")
    found, (warning,) = newest(two)
    assert_is_step(found, 20)
    assert f"step_00000030: expected a directory, found {kind}" in warning


def test_a_linked_checkpoint_is_never_loaded_and_nothing_starts_from_scratch_beside_it(two: Path, tmp_path: Path) -> None:
    root = tmp_path / "other"
    root.mkdir()
    (root / "step_00000020").symlink_to(two / "step_00000020")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        checkpoint.newest(root, warnings.append)
    assert warnings[0].endswith("expected a directory, found a link")
    assert_is_step(checkpoint.newest(two, silent), 20)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(two: Path) -> None:
    (two / "step_00000020").rename(two / "step_00000030")
    found, (warning,) = newest(two)
    assert_is_step(found, 10)
    assert "step_00000030: damaged checkpoint passed over: state.json is of step 20" in warning


@pytest.mark.parametrize("cursor", [float("nan"), {1: 0, "1": 0}, [[[]]] * 3 + [json.loads("[" * 64 + "]" * 64)]])
def test_a_cursor_that_could_not_be_read_back_is_not_saved(two: Path, cursor: Any) -> None:
    with pytest.raises(CheckpointError, match="step_00000030: cannot write the checkpoint: "):
        checkpoint.save(two, 30, small_state(30.0), cursor, {})
    assert_is_step(checkpoint.newest(two, silent), 20)
    assert len(list(two.iterdir())) == 2


# Any other lie.

SCALARS = st.none() | st.booleans() | st.integers(-3, 25) | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
KEYS = st.text(max_size=3) | st.sampled_from([QUERY, NORM, "step", SHARD, "state_0001.safetensors", "cursor"])


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), value=VALUES, how=st.sampled_from(["other", "copied", "gone", "renamed"]))
def test_a_changed_manifest_loads_what_was_saved_or_is_damage(
    tmp_path: Path, data: st.DataObject, value: Any, how: str
) -> None:
    place = tmp_path / "step_00000020"
    if not place.exists():
        save_two(tmp_path)
        (tmp_path / "true.json").write_bytes((place / "state.json").read_bytes())
    lied = json.loads((tmp_path / "true.json").read_text())
    everywhere = list(spots(lied))
    parent, key = data.draw(st.sampled_from(everywhere))
    if how == "copied":
        other, there = data.draw(st.sampled_from(everywhere))
        value = copy.deepcopy(other[there])
    if how in ("other", "copied"):
        parent[key] = value
    else:
        old = parent.pop(key)
        if how == "renamed" and isinstance(parent, dict):
            parent[data.draw(KEYS)] = old
    lie(place, json.dumps(lied))
    try:
        found, warnings = newest(tmp_path)
    except CheckpointError:
        assert lied["format"] != manifest.FORMAT
        return
    assert_is_step(found, 10 if warnings else 20)
    if not warnings:
        assert found is not None
        assert (found.cursor, found.files) == (lied["cursor"], lied["files"])


# Parts make up their tensor.

BOXES = st.lists(st.integers(0, 4), min_size=0, max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.lists(st.tuples(*(st.tuples(st.integers(0, size + 1), st.integers(0, size + 1)) for size in shape)), max_size=5),
    )
)


def read(shape: list[int], parts: list[Any]) -> manifest.Manifest:
    """What is read of a manifest of one tensor, which lies in so many parts."""
    names = [f"state_{number:04d}.safetensors" for number in range(len(parts))]
    tensor = ["float32", shape, dict(zip(names, parts, strict=True))]
    document = {"format": 3, "step": 0, "cursor": None, "files": {}, "shards": names, "tensors": {"x": tensor}}
    return manifest.read(json.dumps(document).encode())


def times_covered(shape: list[int], parts: list[Any]) -> set[int]:
    count = np.zeros(shape, int)
    for part in parts:
        count[tuple(slice(*pair) for pair in part)] += 1
    return set(count.flatten().tolist())


@settings(max_examples=300, deadline=None)
@given(BOXES)
def test_parts_that_are_taken_hold_every_element_once(case: tuple[list[int], list[Any]]) -> None:
    shape, parts = case
    try:
        read(shape, parts)
    except ValueError:
        return
    assert all(0 <= start <= stop <= size for part in parts for (start, stop), size in zip(part, shape, strict=True))
    assert times_covered(shape, parts) <= {1}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=3), st.randoms())
def test_a_grid_of_parts_is_taken_and_none_of_them_may_be_missing_twice_or_moved(sizes: list[list[int]], draw: Any) -> None:
    axes = [list(itertools.pairwise([0, *itertools.accumulate(axis)])) for axis in sizes]
    shape = [sum(axis) for axis in sizes]
    parts = [list(cell) for cell in itertools.product(*axes)]
    draw.shuffle(parts)
    assert list(read(shape, parts).tensors["x"].slices.values()) == [[list(pair) for pair in part] for part in parts]
    with pytest.raises(ValueError, match="once"):
        read(shape, parts[1:])
    with pytest.raises(ValueError, match="once"):
        read(shape, [*parts, parts[0]])
    assume(shape)
    (start, stop), *rest = parts[0]
    with pytest.raises(ValueError, match="once"):
        read(shape, [[(start + 1, stop + 1), *rest], *parts[1:]])


def test_a_manifest_comes_back_from_its_text() -> None:
    tensors = {"x": Saved("float32", [4], {"state_0000.safetensors": [[0, 2]], "state_0001.safetensors": [[2, 4]]})}
    given = manifest.Manifest(7, {"0": [1]}, {"a": "b"}, ["state_0000.safetensors", "state_0001.safetensors"], tensors)
    found = manifest.read(manifest.text(given).encode())
    assert (found.step, found.cursor, found.files) == (7, {"0": [1]}, {"a": "b"})
    assert (found.shards, found.tensors) == (given.shards, tensors)
    assert found.headers() == {name: {"x": ("float32", [2])} for name in given.shards}


def test_a_checkpoint_of_an_empty_state_is_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {}, None, {})
    found = checkpoint.newest(tmp_path, silent)
    assert found is not None
    assert checkpoint.restore(found, {}) == {}
