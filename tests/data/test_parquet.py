from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnrecipe.data import Block, Document, byte_tokenizer, open_corpus
from fnrecipe.data.blocks import share
from fnrecipe.data.document import Read
from fnrecipe.data.formats.parquet import read, row_groups
from fnrecipe.errors import DataError, UsageError

WORDS = [f"document {number} ü🙂" for number in range(10)]


def write(path: Path, column: object, rows_per_group: int = 4, name: str = "text") -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(column))), name: column}), path, row_group_size=rows_per_group)  # type: ignore[arg-type]
    return path


def read_all(path: Path | str, key: str = "text") -> list[Read]:
    return [item for block in row_groups([str(path)]) for item in read(block, key=key)]


def texts(items: Sequence[Read]) -> list[str]:
    return [(item.text or "") if isinstance(item, Document) else str(item) for item in items]


def test_a_block_is_a_row_group(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name, WORDS)) for name in ("a.parquet", "b.parquet")]
    blocks = row_groups(paths)
    assert list(blocks) == [Block(path, group, group + 1) for path in paths for group in range(3)]
    assert [texts(list(read(block, key="text"))) for block in blocks] == [WORDS[:4], WORDS[4:8], WORDS[8:]] * 2


COLUMNS = {
    "string": pa.array(WORDS),
    "large string": pa.array(WORDS, pa.large_string()),
    "string view": pa.array(WORDS, pa.string_view()),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "many batches": pa.array(WORDS * 300),
    "empty documents": pa.array(["", "a", ""]),
}


@pytest.mark.parametrize("rows_per_group", [1, 4, 5000])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_text(tmp_path: Path, name: str, rows_per_group: int) -> None:
    column = COLUMNS[name].slice(0, 1200 if rows_per_group > 4 else 10)
    assert texts(read_all(write(tmp_path / "a.parquet", column, rows_per_group))) == column.to_pylist()


@settings(max_examples=30)
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8")), max_size=30), stripes=st.integers(1, 5), rows=st.integers(1, 9)
)
def test_stripes_share_each_row_group_out_in_turn(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], stripes: int, rows: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "striped.parquet", pa.array(documents, pa.string()), rows)
    groups = [documents[start : start + rows] for start in range(0, len(documents), rows)]
    blocks = row_groups([str(path)])
    assert len(blocks.sizes) == len(groups)
    for number in range(stripes):
        found = [texts(list(read(block, key="text"))) for block in share(blocks, number, stripes, None)]
        assert found == [group[number::stripes] for group in groups]


@pytest.mark.parametrize("size", [1, 3, 4, 64])
def test_more_readers_than_row_groups(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.parquet", WORDS)
    corpus = open_corpus(str(path), byte_tokenizer())
    blocks = [block for number in range(size) for block in share(corpus.blocks, number, size, [3])]
    assert sorted(texts([item for block in blocks for item in corpus.read(block)])) == sorted(WORDS)


def test_tables_without_rows(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "no groups.parquet", pa.schema([("text", pa.string())])):
        pass
    with pq.ParquetWriter(tmp_path / "an empty group.parquet", schema := pa.schema([("text", pa.string())])) as writer:
        for documents in ([], ["a"], []):
            writer.write_table(pa.table({"text": documents}, schema=schema))
    write(tmp_path / "empty.parquet", pa.array([], pa.string()))
    for name, expected in {"no groups": [], "an empty group": ["a"], "empty": []}.items():
        blocks = row_groups([str(tmp_path / f"{name}.parquet")])
        assert len(blocks) == len(expected)
        assert texts(read_all(tmp_path / f"{name}.parquet")) == expected


MISSING = {
    "txet": "did you mean text?",
    "body": "valid names: id, text",
    "Text": "did you mean text?",
}


@pytest.mark.parametrize(("key", "hint"), MISSING.items())
def test_a_missing_column(tmp_path: Path, key: str, hint: str) -> None:
    path = write(tmp_path / "a.parquet", WORDS)
    with pytest.raises(UsageError) as caught:
        read_all(path, key)
    assert str(caught.value) == f"{path}: expected the column {key!r}, found none; {hint}"


BAD_COLUMNS = {
    "null": (pa.array(["a", None, "b"]), "null"),
    "nulls only": (pa.array([None] * 3), "null"),
    "dictionary": (pa.array(["a", None, "b"]).dictionary_encode(), "null"),
    "int": (pa.array([1, 2, 3]), "int"),
    "bytes": (pa.array([b"a", b"b", b"c"]), "bytes"),
    "list": (pa.array([["a"], ["b"], []]), "list"),
    "struct": (pa.array([{"a": "b"}] * 3), "dict"),
}


@pytest.mark.parametrize(("column", "found"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
@pytest.mark.parametrize("stripes", [1, 2])
def test_bad_values_are_named_by_row(tmp_path: Path, column: pa.Array, found: str, stripes: int) -> None:
    values = column.to_pylist()
    path = write(tmp_path / "a.parquet", pa.concat_arrays([column] * 2), 3)
    for block in (block for number in range(stripes) for block in share(row_groups([str(path)]), number, stripes, None)):
        rows = range(3)[block.stripe :: block.stripes]
        where = [
            f"{path}: row {row} of row group {block.start}: expected text in the column 'text', found {found}" for row in rows
        ]
        expected = [values[row] if isinstance(values[row], str) else place for row, place in zip(rows, where, strict=True)]
        assert texts(list(read(block, key="text"))) == expected


def test_rows_are_counted_through_all_batches(tmp_path: Path) -> None:
    column = pa.array([*("a" for _ in range(3210)), None])
    (error,) = [item for item in read_all(write(tmp_path / "a.parquet", column, 9999)) if isinstance(item, DataError)]
    assert "row 3,210 of row group 0: " in str(error)


def test_columns_whose_names_begin_alike(tmp_path: Path) -> None:
    table = pa.table({"text.raw": ["no"], "text": ["yes"], "texts": ["no"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(read_all(tmp_path / "a.parquet")) == ["yes"]
    assert texts(read_all(tmp_path / "a.parquet", "text.raw")) == ["no"]


def broken(folder: Path) -> dict[str, bytes]:
    whole = write(folder / "whole.parquet", WORDS).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    return {
        "text": b"this is no Parquet file, but long enough for one",
        "empty": b"",
        "cut off": whole[:-10],
        "first half": whole[: len(whole) // 2],
        "footer": whole[: -8 - footer] + b"\xff" * footer + whole[-8:],
    }


@pytest.mark.parametrize("name", ["text", "empty", "cut off", "first half", "footer"])
def test_what_is_not_parquet(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(broken(tmp_path)[name])
    with pytest.raises(DataError, match=rf"^{path}: (cannot be read as Parquet|cannot read the data): "):
        row_groups([str(path)])


def test_damaged_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", WORDS)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(DataError, match=rf"^{path}: (cannot be read as Parquet|cannot read the data): "):
        read_all(path)


BROKEN: dict[str, Callable[[pa.Array], pa.Array]] = {
    "string": lambda column: column,
    "large string": lambda column: column.cast(pa.large_string(), safe=False),
    "dictionary": lambda column: column.dictionary_encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_utf8_is_a_bad_record_of_its_row(tmp_path: Path, name: str) -> None:
    column = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    column = pa.concat_arrays([pa.array(["ü", None]), column.cast(pa.string()), pa.array(["z"])])
    path = write(tmp_path / "a.parquet", BROKEN[name](column), 5)
    assert texts(read_all(path)) == [
        "ü",
        f"{path}: row 1 of row group 0: expected text in the column 'text', found null",
        "a",
        f"{path}: row 3 of row group 0: expected UTF-8 in the column 'text', found byte 0xff at byte 0",
        "z",
    ]


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: cannot read the data: No such file"):
        row_groups([str(tmp_path / "gone.parquet")])


def test_parquet_at_an_address(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/parquet/a.parquet", write(tmp_path / "a.parquet", WORDS).read_bytes())
    try:
        corpus = open_corpus("memory://parquet", byte_tokenizer())
        assert [file.path for file in corpus.files] == ["memory:///parquet/a.parquet"]
        assert texts([item for block in corpus.blocks for item in corpus.read(block)]) == WORDS
    finally:
        system.rm("/parquet", recursive=True)
