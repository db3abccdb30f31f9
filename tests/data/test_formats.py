"""Formats as values: those that come with fnrecipe, and one that a user defines, which obeys the same laws."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fnrecipe.data import (
    FORMATS,
    Block,
    Blocks,
    Document,
    Format,
    Reading,
    Tokenizer,
    byte_tokenizer,
    open_corpus,
    read_blocks,
    share,
)
from fnrecipe.data.blocks import cut
from fnrecipe.data.document import Read
from fnrecipe.data.files import File, opened
from fnrecipe.data.formats.format import blocks_of_records
from fnrecipe.data.records import Record, read_records
from fnrecipe.errors import DataError, UsageError
from tests.data.laws import check_resumes

TOKENIZER = byte_tokenizer()


# A format of lines, cut into blocks at any byte: the text is what follows a line's first tab.
def plan_lines(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    return blocks_of_records(files, b"\n", by_document)


def read_lines(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    for record in read_records(block, b"\n", reading.max_record_bytes):
        text = record.text() if isinstance(record, Record) else record
        if isinstance(text, DataError):
            yield text
        else:
            _, tab, content = text.rstrip("\n").partition("\t")
            yield Document(content) if tab else record.bad("expected a tab")


TSV = Format((".tsv", ".tsv.gz"), plan_lines, read_lines)


# A format whose unit is a record, not a byte: each is 8 bytes, filled up with dots.
def plan_cards(files: Sequence[File], reading: Reading, tokenizer: Tokenizer, by_document: bool) -> Blocks:
    return cut([file.path for file in files], [file.size // 8 for file in files], limit=1 if by_document else 4)


def read_cards(block: Block, reading: Reading, tokenizer: Tokenizer) -> Iterator[Read]:
    with opened(block.path) as file:
        file.seek(8 * block.start)
        for number in range(block.start, block.stop):
            card = file.read(8).decode()
            if number % block.stripes == block.stripe:
                yield Document(card.rstrip("."))


CARDS = Format((".cards",), plan_cards, read_cards)
FORMATS_AND_MORE = {**FORMATS, "tsv": TSV, "cards": CARDS}
TEXTS = [f"{number}" * (1 + number * 5 % 3) for number in range(90)]


def write(folder: Path, name: str) -> str:
    for part, texts in enumerate([TEXTS[:31], TEXTS[31:]]):
        lines = [f"{number}\t{text}\n" if name == "tsv" else f"{text:.<8}" for number, text in enumerate(texts)]
        (folder / f"{part}.{name}").write_text("".join(lines))
    return str(folder)


def shown(item: Read) -> str:
    assert isinstance(item, Document)
    return item.text or ""


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", ["tsv", "cards"])
def test_a_format_of_ones_own_is_read_once_by_all_shares_and_resumes_at_every_cursor(
    tmp_path: Path, name: str, size: int, by_document: bool
) -> None:
    corpus = open_corpus(write(tmp_path, name), TOKENIZER, by_document=by_document, formats=FORMATS_AND_MORE)
    shares = [share(corpus.blocks, number, size, [7]) for number in range(size)]

    def read(block: Block) -> Iterator[str]:
        return map(shown, corpus.read(block))

    sources: list[Any] = [partial(read_blocks, blocks=blocks, read=read) for blocks in shares]
    assert sorted(text for source in sources for text, _ in source()) == sorted(TEXTS)
    assert sum(check_resumes(source, limit=100) for source in sources) == len(TEXTS)


def test_a_bad_record_of_a_format_of_ones_own_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("0\ta\nno tab\n")
    corpus = open_corpus(str(tmp_path), TOKENIZER, formats=FORMATS_AND_MORE)
    found = [item for block in corpus.blocks for item in corpus.read(block)]
    assert isinstance(found[0], Document)
    assert str(found[1]) == f"{tmp_path}/a.tsv:2 (byte 4): expected a tab\n  no tab"


def test_a_format_is_told_by_the_suffixes_of_those_that_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, "tsv")
    with pytest.raises(UsageError, match=r"^.*: expected data, found none in this directory \(\.jsonl, .*, but 2 \.tsv$"):
        open_corpus(path, TOKENIZER)
    with pytest.raises(UsageError, match=r"0\.tsv: expected a file called \.cards, or `format` set for this source$"):
        open_corpus(f"{path}/0.tsv", TOKENIZER, formats={"cards": CARDS})
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(UsageError, match="expected files of one format, found 1 jsonl, 2 tsv; set `format`"):
        open_corpus(path, TOKENIZER, formats=FORMATS_AND_MORE)


def test_a_suffix_of_two_formats_is_settled_by_name(tmp_path: Path) -> None:
    path, both = write(tmp_path, "tsv"), {"tsv": TSV, "raw": Format((".tsv",), FORMATS["text"].plan, FORMATS["text"].read)}
    with pytest.raises(UsageError, match=r"found 2 tsv, 2 raw; set `format` for this source$"):
        open_corpus(path, TOKENIZER, formats=both)
    corpus = open_corpus(path, TOKENIZER, format="raw", formats=both)
    assert [shown(item)[:4] for block in corpus.blocks for item in corpus.read(block)] == ["0\t0\n", "0\t31"]


@pytest.mark.parametrize(("name", "hint"), [("jsnl", "did you mean jsonl?"), ("xyz", "valid names: cards, jsonl, parquet, ")])
def test_an_unknown_name_is_refused_before_files_are_sought(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_corpus("nowhere", TOKENIZER, format=name, formats=FORMATS_AND_MORE)
    assert str(caught.value).startswith(f"format: expected the name of a format, found {name!r}; {hint}")


def test_order_by_documents_is_refused_for_parquet_whatever_its_files_are_called(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a\.data: order=documents cannot enter this file in the middle"):
        open_corpus(str(tmp_path / "a.data"), TOKENIZER, format="parquet", by_document=True)


def test_naming_the_formats_imports_nothing_that_only_some_of_them_need() -> None:
    code = (
        "import sys, fnrecipe.data.formats; print(*sorted({'pyarrow', 'fsspec', 'tokenizers', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
