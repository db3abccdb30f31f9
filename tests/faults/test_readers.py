"""Whatever is in a file, what reads it reads it or gives one of fnrecipe's errors: no other, no hang.

Real files are changed at random: bytes, and where they are JSON, values. With FUZZ=1 in the environment forty times as many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnrecipe import checkpoint
from fnrecipe.config import DataSource
from fnrecipe.config.layers import read_file
from fnrecipe.data import Block, LaneAssignment, byte_tokenizer, cached, pipe
from fnrecipe.data.document import Document
from fnrecipe.errors import FnrecipeError
from fnrecipe.interop import dcp
from fnrecipe.interop.survey import describe_model
from fnrecipe.recipes.lm.data import train_stream
from fnrecipe.shell import products
from fnrecipe.shell.directory.recorded_recipe import recorded
from fnrecipe.shell.guards import rollbacks
from fnrecipe.shell.recording.jsonl import found_in, last_step, rewind
from fnrecipe.shell.streams import resumed
from tests.checkpoints import CURSOR, FINGERPRINTS, save_two, sign, small_state
from tests.recipes.streams import recipe, texts, write

EXAMPLES = 2000 if os.environ.get("FUZZ") else 50
HASTE = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@attrs.frozen
class Reader:
    """`make` writes what is read below a directory and gives the file to change; `read` reads it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def load(root: Path) -> None:
    found = checkpoint.newest(root, lambda line: None)
    assert found is not None
    checkpoint.restore(found, small_state())


def load_signed(root: Path) -> None:
    sign(root / "step_00000020")
    load(root)


def of_checkpoint(name: str) -> Callable[[Path], Path]:
    return lambda root: save_two(root) / "step_00000020" / name


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
        return root / name

    return make


def run(folder: Path) -> object:
    return list(
        cached(
            Block("a", 0, 1),
            read=lambda block: iter([Document("one"), Document("two")]),
            tokenizer=byte_tokenizer(),
            folder=folder,
        )
    )


def cache_entry(root: Path) -> Path:
    run(root / "cache")
    (entry,) = (path for path in root.rglob("*") if path.is_file())
    return entry


def records(root: Path) -> None:
    path = root / "train.jsonl"
    assert last_step(path) >= -1
    rewind(path, 2)
    assert all(row["step"] is not None for row in found_in(path))


def dcp_metadata(root: Path) -> Path:
    checkpoint.save(root / "ours", 3, small_state(), CURSOR, FINGERPRINTS)
    dcp.write(checkpoint.of_step(root / "ours", 3), root / "dcp")
    return root / "dcp/.metadata"


def dcp_back(root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", lambda *args, **options: root)  # reading is what is tried
        dcp.convert_back(root / "dcp", root / "back")


RUN = json.dumps({"recipe": "lm", "origin": "lm", "versions": {"torch": "2.13.0"}})
HUGGING_FACE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
READERS = {
    "SHA256SUMS": Reader(of_checkpoint("SHA256SUMS"), load),
    "state.json": Reader(of_checkpoint("state.json"), load),
    "state.json with its sum": Reader(of_checkpoint("state.json"), load_signed),
    "shard": Reader(of_checkpoint("state_0000.safetensors"), load),
    "shard with its sum": Reader(of_checkpoint("state_0000.safetensors"), load_signed),
    "config.yaml": Reader(
        text_file("config.yaml", "model:\n  config: {num_layers: 2, norm_eps: 1e-5}\nregime:\n  num_steps: 30  # few\n"),
        lambda root: read_file(root / "config.yaml", bounded=False),
    ),
    "run.json": Reader(text_file("run.json", RUN), lambda root: recorded(root, "give one")),
    "rollbacks.jsonl": Reader(
        text_file("metrics/rollbacks.jsonl", '{"step": 9, "batches": [7, 9]}\n{"step": 12, "batches": [11, 14]}\n'),
        rollbacks.read,
    ),
    "records": Reader(text_file("train.jsonl", '{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": null}\n'), records),
    "products.json": Reader(
        text_file("products.json", '{"processor": "x", "kernels": {"4 x 4": "mkl"}}\n'),
        lambda root: products._read(root / "products.json"),
    ),
    "cache": Reader(cache_entry, lambda root: run(root / "cache")),
    "config.json": Reader(text_file("config.json", json.dumps(HUGGING_FACE)), lambda root: describe_model(str(root))),
    "DCP": Reader(dcp_metadata, dcp_back),
}
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def changed_bytes(draw: st.DrawFn, real: bytes) -> bytes:
    """Something else, or the real bytes with a piece of them replaced, left out, or doubled."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | st.sampled_from([b"[" * 4000, b'{"a":' * 4000, b"9" * 5000]))
    start = draw(st.integers(0, len(real)))
    stop = draw(st.sampled_from([start, start + 1, start + 8, len(real)]))
    piece = draw(st.binary(max_size=9) | st.just(real[start:stop] * 2))
    return real[:start] + piece + real[stop:]


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one that it holds replaced or left out."""
    copy = json.loads(json.dumps(value))
    container, key = draw(st.sampled_from(list(spots(copy))))
    if draw(st.integers(0, 4)):
        container[key] = draw(JSON)
    else:
        del container[key]
    return copy


def changed(real: bytes) -> st.SearchStrategy[bytes]:
    """A file of JSON lines is changed in its first one, too."""
    first, newline, rest = real.partition(b"\n")
    for head, tail in ((real, b""), (first, newline + rest)):
        try:
            value = json.loads(head)
        except ValueError:
            continue
        return changed_bytes(real) | changed_json(value).map(lambda other, tail=tail: json.dumps(other).encode() + tail)
    return changed_bytes(real)


@contextmanager
def read_or_told() -> Iterator[None]:
    told = ""
    try:
        yield
    except FnrecipeError as error:
        told = str(error)
    assert len(told.splitlines()) <= 12
    assert len(told) < 5000


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_change_of_a_file_is_read_or_told(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    file = reader.make(tmp_path)
    real = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    reader.read(tmp_path)  # as it is

    @HASTE
    @given(changed(real[file]))
    def check(content: bytes) -> None:
        for path, before in real.items():
            path.write_bytes(before)
        file.write_bytes(content)
        with read_or_told():
            reader.read(tmp_path)

    check()


def test_any_change_of_a_cursor_goes_on_or_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", texts(0, 30))
    write(tmp_path / "b.jsonl", texts(30, 60))
    made = recipe(DataSource(str(tmp_path)), epochs=2)
    stream = pipe(train_stream(made, LaneAssignment()), resumed)
    real = [cursor for _, cursor in islice(stream(None), 4)]

    @HASTE
    @given(st.sampled_from(real).flatmap(changed_json) | JSON)
    def check(cursor: Any) -> None:
        with read_or_told():
            list(islice(stream(cursor), 2))

    check()
