from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, Document, byte_tokenizer, open_corpus, read_blocks
from fnrecipe.data.blocks import MAX_BLOCK_BYTES, blocks_of, cut, points, stripe
from fnrecipe.data.corpus import Reading
from fnrecipe.data.document import Read
from tests.data.laws import check_resumes, items

SIZES = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000)), max_size=6)
LANES = st.integers(1, 20)


def paths(size: int) -> list[str]:
    return [f"file {number}" for number in range(size)]


@given(sizes=SIZES, num_lanes=LANES, power=st.integers(0, 8))
def test_cut_covers_every_unit_once_in_order(sizes: list[int], num_lanes: int, power: int) -> None:
    blocks = list(cut(paths(len(sizes)), sizes, num_lanes, 1 << power))
    assert [block.path for block in blocks] == sorted(block.path for block in blocks)
    for path, size in zip(paths(len(sizes)), sizes, strict=True):
        mine = [block for block in blocks if block.path == path]
        assert [block.start for block in mine] + [size] == [0] + [block.stop for block in mine]
    assert all((block.stripe, block.stripes) == (0, 1) for block in blocks)


@given(sizes=SIZES, num_lanes=LANES, power=st.integers(0, 8))
def test_blocks_are_as_large_as_the_lanes_allow(sizes: list[int], num_lanes: int, power: int) -> None:
    lengths = [block.stop - block.start for block in cut(paths(len(sizes)), sizes, num_lanes, 1 << power)]
    assert min(lengths, default=1) > 0
    wanted = [size for size in (1 << p for p in range(power + 1)) if size * 16 * num_lanes <= sum(sizes)] or [1]
    assert sum(-(-size // wanted[-1]) for size in sizes) == len(lengths)
    assert max(lengths, default=0) == min(max(sizes, default=0), wanted[-1])
    assert len(lengths) >= min(sum(sizes), 16 * num_lanes, -(-sum(sizes) >> power))


def test_blocks_of_big_files_are_a_mebibyte() -> None:
    blocks = cut(["a", "b"], [1 << 40, 5], 8)
    assert len(blocks) == (1 << 20) + 1
    assert blocks[-1] == Block("b", 0, 5)
    assert blocks[12345] == Block("a", 12345 * MAX_BLOCK_BYTES, 12346 * MAX_BLOCK_BYTES)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_cut_of_nothing(sizes: list[int]) -> None:
    assert list(cut(paths(len(sizes)), sizes, 8)) == []


BLOCKS = st.lists(
    st.builds(Block, st.sampled_from("abc"), *[st.integers(0, 1 << 62)] * 2, st.integers(0, 3), st.integers(1, 9)), max_size=12
)


@given(listed=BLOCKS)
def test_blocks_are_a_sequence(listed: list[Block]) -> None:
    blocks = blocks_of(listed)
    assert list(blocks) == listed
    assert len(blocks) == len(listed)
    assert list(reversed(blocks)) == listed[::-1]
    assert blocks.table.dtype == np.int64
    with pytest.raises(IndexError):
        blocks[len(listed)]


@given(listed=BLOCKS, data=st.data())
def test_take_gives_those_blocks_in_that_order(listed: list[Block], data: st.DataObject) -> None:
    blocks = blocks_of(listed)
    order = data.draw(st.lists(st.integers(0, len(listed) - 1))) if listed else []
    assert list(blocks.take(np.array(order, np.int64))) == [listed[number] for number in order]
    lane, lanes = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    assert list(blocks.take(slice(lane, None, lanes))) == listed[lane::lanes]
    assert list(blocks) == listed


@given(listed=BLOCKS, num_lanes=LANES)
def test_stripe_gives_each_lane_a_block(listed: list[Block], num_lanes: int) -> None:
    whole = [Block(block.path, block.start, block.stop) for block in listed]
    striped = list(stripe(blocks_of(whole), num_lanes))
    count = len(striped) // max(len(whole), 1)
    assert striped == [Block(b.path, b.start, b.stop, number, count) for b in whole for number in range(count)]
    if whole:
        assert len(striped) >= num_lanes > (count - 1) * len(whole)


def test_points_are_a_block_for_each_record() -> None:
    starts = [np.array(values, np.int64) for values in ([0, 3, 7], [], [0])]
    assert list(points(["a", "b", "c"], starts)) == [Block("a", 0, 1), Block("a", 3, 4), Block("a", 7, 8), Block("c", 0, 1)]
    assert list(points([], [])) == []


def counting(block: Block) -> Iterator[tuple[str, int]]:
    yield from ((block.path, number) for number in range(block.start, block.stop))


@given(bounds=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=8))
def test_read_blocks_reads_one_after_another_and_resumes(bounds: list[tuple[int, int]]) -> None:
    blocks = [Block(str(number), *pair) for number, pair in enumerate(bounds)]
    source = partial(read_blocks, blocks=blocks, read=counting)
    assert items(source) == [item for block in blocks for item in counting(block)]
    assert check_resumes(source, limit=30) == min(sum(len(range(*pair)) for pair in bounds), 30)


def test_going_on_reads_no_block_before_the_cursor() -> None:
    opened: list[str] = []

    def read(block: Block) -> Iterator[int]:
        opened.append(block.path)
        yield from range(3)

    blocks = [Block(name, 0, 3) for name in "abc"]
    cursors = [cursor for _, cursor in read_blocks(blocks=blocks, read=read)]
    opened.clear()
    assert len(list(read_blocks(cursors[4], blocks=blocks, read=read))) == 4
    assert opened == ["b", "c"]


def write_lines(folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(f'{{"text": "{name}"}}\n{{bad\n\n' * 12)


def write_text(folder: Path) -> None:
    (folder / "a.txt").write_text("one\n\ntwo\n\n\n\n\nthree\nfour\n\n" * 6)


def write_tokens(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([1, 2, 256, 256, 3, 300, 256, 4] * 5, np.uint16))


def write_python(folder: Path) -> None:
    for number in range(9):
        (folder / f"{number}.py").write_bytes(b"a = %d # \xff\n" % number if number == 4 else b"a = %d\n" % number)


def shown(item: Read) -> str | list[int]:
    if not isinstance(item, Document):
        return str(item)
    return item.ids.tolist() if item.ids is not None else item.text or ""


WRITERS: dict[str, tuple[Callable[[Path], None], int]] = {
    "jsonl": (write_lines, 48),
    "text": (write_text, 18),
    "tokens": (write_tokens, 16),
    "python": (write_python, 9),
}


@pytest.mark.parametrize("num_lanes", [1, 5])
@pytest.mark.parametrize("name", WRITERS)
def test_reading_of_every_format_resumes(tmp_path: Path, name: str, num_lanes: int) -> None:
    write, count = WRITERS[name]
    write(tmp_path)
    corpus = open_corpus(str(tmp_path), byte_tokenizer(), reading=Reading(separator="\n\n"), num_lanes=num_lanes)

    def read(block: Block) -> Iterator[str | list[int]]:
        return map(shown, corpus.read(block))

    for blocks in (corpus.blocks, corpus.blocks.take(slice(None, None, -1))):
        assert check_resumes(partial(read_blocks, blocks=blocks, read=read), limit=50) == count
