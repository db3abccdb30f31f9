from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnrecipe.data import Block, Blocks, Document, Reading, byte_tokenizer, open_corpus, read_blocks, share, unevenness
from fnrecipe.data.blocks import MAX_BLOCK_BYTES, blocks_of, cut, points
from fnrecipe.data.document import Read
from tests.data.laws import check_resumes, items

SIZES = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 500_000)), max_size=6)


def paths(size: int) -> list[str]:
    return [f"file {number}" for number in range(size)]


@given(sizes=SIZES, power=st.integers(10, 14))
def test_cut_covers_every_unit_once_in_order(sizes: list[int], power: int) -> None:
    found = cut(paths(len(sizes)), sizes, 1 << power)
    blocks = list(found)
    assert [block.path for block in blocks] == sorted(block.path for block in blocks)
    for path, size in zip(paths(len(sizes)), sizes, strict=True):
        mine = [block for block in blocks if block.path == path]
        assert [block.start for block in mine] + [size] == [0] + [block.stop for block in mine]
    assert all((block.stripe, block.stripes) == (0, 1) for block in blocks)
    assert found.sizes.tolist() == [block.stop - block.start for block in blocks]


@given(sizes=SIZES, power=st.integers(10, 14))
def test_there_are_64_blocks_unless_they_would_be_of_less_than_1024_units(sizes: list[int], power: int) -> None:
    lengths = [block.stop - block.start for block in cut(paths(len(sizes)), sizes, 1 << power)]
    assert min(lengths, default=1) > 0
    wanted = [size for size in (1 << p for p in range(10, power + 1)) if size * 64 <= sum(sizes)] or [1024]
    assert sum(-(-size // wanted[-1]) for size in sizes) == len(lengths)
    assert max(lengths, default=0) == min(max(sizes, default=0), wanted[-1])


def test_blocks_of_big_files_are_a_mebibyte() -> None:
    blocks = cut(["a", "b"], [1 << 40, 5])
    assert len(blocks) == (1 << 20) + 1
    assert blocks[-1] == Block("b", 0, 5)
    assert blocks[12345] == Block("a", 12345 * MAX_BLOCK_BYTES, 12346 * MAX_BLOCK_BYTES)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_cut_of_nothing(sizes: list[int]) -> None:
    assert list(cut(paths(len(sizes)), sizes)) == []


BLOCKS = st.lists(
    st.builds(Block, st.sampled_from("abc"), *[st.integers(0, 1 << 62)] * 2, st.integers(0, 3), st.integers(1, 9)), max_size=12
)


@given(listed=BLOCKS)
def test_blocks_are_a_sequence(listed: list[Block]) -> None:
    blocks = blocks_of(listed, range(len(listed)))
    assert list(blocks) == listed
    assert len(blocks) == len(listed)
    assert list(reversed(blocks)) == listed[::-1]
    assert blocks.table.dtype == np.int64
    with pytest.raises(IndexError):
        blocks[len(listed)]


@given(listed=BLOCKS, data=st.data())
def test_take_gives_those_blocks_in_that_order(listed: list[Block], data: st.DataObject) -> None:
    blocks = blocks_of(listed, range(len(listed)))
    order = data.draw(st.lists(st.integers(0, len(listed) - 1))) if listed else []
    taken = blocks.take(np.array(order, np.int64))
    assert (list(taken), taken.sizes.tolist()) == ([listed[number] for number in order], order)
    part, parts = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    assert list(blocks.take(slice(part, None, parts))) == listed[part::parts]
    assert list(blocks) == listed


def sized(sizes: Sequence[int], *, single: bool = False) -> Blocks:
    """Blocks of these sizes that are each recognised by where they start."""
    return blocks_of([Block("a", number, number + 1) for number in range(len(sizes))], sizes, single=single)


KEYS = st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=3))


@given(sizes=st.lists(st.integers(0, 1000), max_size=500), size=st.integers(1, 7), key=KEYS, single=st.booleans())
def test_shares_are_together_every_document_once(sizes: list[int], size: int, key: list[int] | None, single: bool) -> None:
    parts = [list(share(sized(sizes, single=single), number, size, key)) for number in range(size)]
    dealt = Counter((block.start, stripe) for part in parts for block in part for stripe in stripes_of(block, size))
    assert dealt == Counter((start, stripe) for start in range(len(sizes)) for stripe in range(size))


def stripes_of(block: Block, size: int) -> list[int]:
    """Which of `size` stripes of its records a block has."""
    assert block.stripes in (1, size)
    return [block.stripe] if block.stripes == size > 1 else list(range(size))


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=500), size=st.integers(1, 7), key=st.lists(st.integers(0, 99)))
def test_shares_differ_by_no_more_than_a_block(sizes: list[int], size: int, key: list[int]) -> None:
    blocks = sized(sizes, single=True)
    sums = [sum(share(blocks, number, size, key).sizes.tolist()) for number in range(size)]
    assert max(sums) - min(sums) <= max(sizes)
    mean = sum(sums) / size
    assert unevenness(blocks, size) == pytest.approx(max(sums) / mean - 1 if mean else 0.0)


@pytest.mark.parametrize("count", [1, 3, 255])
def test_of_few_blocks_every_share_has_a_stripe_of_each(count: int) -> None:
    for number in range(4):
        blocks = list(share(sized([5] * count), number, 4, [1]))
        assert [(block.start, block.stripes) for block in blocks] == [(start, 4) for start in range(count)]
    assert unevenness(sized([5] * count), 4) == 0.0


def test_the_stripes_change_with_the_key_and_shares_of_blocks_do_too() -> None:
    assert len({share(sized([5]), 0, 8, [2, epoch])[0].stripe for epoch in range(40)}) == 8
    assert len({tuple(share(sized([5] * 64, single=True), 0, 2, [2, epoch])) for epoch in range(5)}) == 5


def test_shares_without_a_key_keep_the_order() -> None:
    assert [block.start for block in share(sized([1] * 300), 1, 3, None)] == list(range(1, 300, 3))
    assert [(b.start, b.stripe, b.stripes) for b in share(sized([1] * 2), 1, 3, None)] == [(0, 1, 3), (1, 1, 3)]


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


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_reading_of_every_format_resumes(tmp_path: Path, name: str, size: int) -> None:
    write, count = WRITERS[name]
    write(tmp_path)
    corpus = open_corpus(str(tmp_path), byte_tokenizer(), reading=Reading(separator="\n\n"))

    def read(block: Block) -> Iterator[str | list[int]]:
        return map(shown, corpus.read(block))

    shares = [share(corpus.blocks, number, size, [1]) for number in range(size)]
    counts = [check_resumes(partial(read_blocks, blocks=blocks, read=read), limit=50) for blocks in shares]
    assert sum(counts) == count
    assert min(counts) > 0
