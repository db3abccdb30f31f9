"""Records: the pieces of a file between separators, found from any byte offset on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import IO

import attrs
import numpy as np
from numpy.typing import NDArray

from fnrecipe.data.blocks import Block
from fnrecipe.data.compressed import is_damage
from fnrecipe.data.encoding import every_other_byte_is_zero, signature
from fnrecipe.data.files import opened
from fnrecipe.errors import DataError, one_line

WHOLE = int(np.iinfo(np.int64).max)
# A record is held in memory several times: as bytes, as text, as ids and what the tokenizer makes of it. 64 MiB are 16 million
# tokens, more than any book, and eight lanes of them still fit a small machine.
MAX_RECORD_BYTES = 64 << 20
_CHUNK = 1 << 20
_TAIL = 1 << 15
_BOM = b"\xef\xbb\xbf"


@attrs.frozen
class Record:
    """The bytes of a record with its separator, and their offset in the (decompressed) file."""

    path: str
    offset: int
    data: bytes

    def bad(self, what: str) -> DataError:
        """An error about this record: file, line, byte offset, `what`, and an excerpt."""
        excerpt = one_line(self.data[:80].decode(errors="backslashreplace").rstrip())
        return DataError(f"{_place(self.path, self.offset)} (byte {self.offset}): {what}\n  {excerpt}")

    @property
    def place(self) -> Callable[[], str]:
        """What says where it is, FILE:LINE, without its bytes: the file is read up to it for that."""
        return partial(_place, self.path, self.offset)

    def text(self) -> str | DataError:
        """The record decoded from UTF-8, or an error value, which the stream's reader raises or counts."""
        try:
            text = self.data.decode()
        except UnicodeDecodeError as error:
            found = signature(self.data) or f"byte {self.data[error.start]:#04x} at byte {error.start} of the record"
            return self.bad(f"expected UTF-8, found {found}")
        if every_other_byte_is_zero(self.data):
            return self.bad(
                "expected UTF-8, found what looks like UTF-16 (convert it: iconv -f UTF-16LE -t UTF-8, or UTF-16BE)"
            )
        return text


def read_records(block: Block, separator: bytes, limit: int = MAX_RECORD_BYTES) -> Iterator[Record | DataError]:
    """The records of a block, without byte order marks, and without records of white space alone.

    A record starts at the file's start and after each separator; a line feed in a separator also matches after a carriage
    return. A record of more than `limit` bytes is an error, and is not kept in memory. Truncated or corrupt compressed bytes
    end the block with an error as its last item.

    Raises:
        DataError: if the file cannot be read, or ends before the block does.
    """
    end = 0
    with opened(block.path) as file:
        try:
            records = (r for r in _split(file, block, separator, limit) if not r[1].isspace() or len(r[1]) > limit)
            for offset, data in islice(records, block.stripe, None, block.stripes):
                end = offset + len(data)
                record = Record(block.path, offset, data.removeprefix(_BOM))
                yield record if len(data) <= limit else too_long(record, limit)
        except Exception as error:
            if not is_damage(error):
                raise
            if block.stripe == 0:  # one report of each damage
                yield _damaged(block.path, end, error)


def read_whole(path: str, limit: int = MAX_RECORD_BYTES) -> Iterator[Record | DataError]:
    """The file as one record, or an error if it is longer than `limit`; no record if it is empty."""
    with opened(path) as file:
        try:
            data = file.read(limit + 1)
        except Exception as error:
            if not is_damage(error):
                raise
            yield _damaged(path, 0, error)
            return
    record = Record(path, 0, data.removeprefix(_BOM))
    if len(data) > limit:
        yield too_long(record, limit)
    elif record.data:
        yield record


def record_starts(path: str, size: int, separator: bytes) -> NDArray[np.int64]:
    """The offset of each record of an uncompressed file, int64: one pass over its bytes."""
    with opened(path) as file:
        starts = np.fromiter(_starts(file, separator), np.int64)
    return starts[starts < size]


def separator_end(text: str, separator: str) -> int:
    """The index of the separator at the end of a record's text; the text's length if there is none."""
    if "\n" not in separator or "\r" not in text[-2 * len(separator) :]:
        return len(text.removesuffix(separator))
    form = re.escape(separator).replace("\\\n", "\r?\n")
    found = re.compile(form + r"\Z").search(text, max(len(text) - 2 * len(separator), 0))
    return found.start() if found else len(text)


def _split(file: IO[bytes], block: Block, separator: bytes, limit: int) -> Iterator[tuple[int, bytes]]:
    """(offset, record) of the records that start in the block; of one longer than `limit`, at least `limit` + 1 bytes."""
    # A record belongs to the block that it starts in: the reader skips to the first separator that ends at or behind the
    # block's start, and reads past the block's stop to the end of its last record. So blocks may be cut at any byte, and each
    # record is read exactly once. The buffer holds the current record only; `keep` bytes before `start` stay in it, because
    # a separator may end behind `start` and begin before it.
    next_end, width = _ends(separator)
    keep = width - 1
    read = _careful(file)
    base = max(block.start - width, 0)  # offset of the buffer's first byte; a separator may end where the block starts
    if base:
        file.seek(base)
    # `inside`: whether a record begins at `start`; else the next one begins where the next separator behind `start` ends.
    inside = block.start == 0
    buffer, start = b"", 0 if inside else block.start - base - 1
    while base + start < block.stop:
        end = next_end(buffer, start)
        if end:
            if inside:
                yield base + start, buffer[start:end]
            start, inside = end, True
            if start > _CHUNK:
                buffer, base, start = buffer[start - keep :], base + start - keep, keep
            continue
        if inside and len(buffer) - start > limit:
            yield base + start, buffer[start:]
            inside = False
        left = block.stop - base - len(buffer)
        if not inside:
            if left <= 0:
                return
            kept = buffer[max(len(buffer) - keep, 0) :]
            buffer, base, start = kept, base + len(buffer) - len(kept), max(start - len(buffer), 0) + len(kept)
        size = min(left, max(_CHUNK, len(buffer))) if left > 0 else max(_TAIL, len(buffer) - start)
        chunk = read(min(size, max(limit - len(buffer) + start, _TAIL) if inside else _CHUNK))
        if not chunk:
            if left > 0 and block.stop != WHOLE:
                expected = f"expected {block.stop:,} bytes or more, as when the run began"
                raise DataError(f"{block.path}: {expected}, found its end after {file.seek(0, 2):,}")
            if inside and start < len(buffer):
                yield base + start, buffer[start:]
            return
        buffer += chunk


def _starts(file: IO[bytes], separator: bytes) -> Iterator[int]:
    """0, and the offset behind each separator."""
    next_end, width = _ends(separator)
    base, buffer = 0, b""
    yield 0
    while chunk := file.read(_CHUNK):
        kept = buffer[max(len(buffer) - width + 1, 0) :]
        base += len(buffer) - len(kept)
        buffer, end = kept + chunk, len(kept)
        while end := next_end(buffer, end):
            yield base + end


def _ends(separator: bytes) -> tuple[Callable[[bytes, int], int], int]:
    """(buffer, start) -> end of the first separator that ends behind `start`, or 0; and the longest separator's length.

    A carriage return before a separator's first byte is left to the record.
    """
    size = len(separator)
    if size == 1:
        return (lambda buffer, start: buffer.find(separator, start) + 1), 1
    if b"\n" not in separator[1:]:  # twice as fast as a pattern

        def literal_end(buffer: bytes, start: int) -> int:
            found = buffer.find(separator, max(start - size + 1, 0))
            return found + size if found >= 0 else 0

        return literal_end, size
    pattern = re.compile(re.escape(separator[:1]) + re.escape(separator[1:]).replace(b"\\\n", b"\r?\n"))
    width = size + separator[1:].count(b"\n")

    def next_end(buffer: bytes, start: int) -> int:
        found = pattern.search(buffer, max(start - width + 1, 0))
        while found and found.end() <= start:
            found = pattern.search(buffer, found.start() + 1)
        return found.end() if found else 0

    return next_end, width


def _careful(file: IO[bytes]) -> Callable[[int], bytes]:
    """`file.read`, which returns the bytes before corrupt ones first, and raises the error at the next call."""
    part_of: Callable[[int], bytes] = getattr(file, "read1", file.read)
    raised: list[Exception] = []

    def read(size: int) -> bytes:
        parts: list[bytes] = []
        try:
            while not raised and size > 0 and (part := part_of(size)):
                parts.append(part)
                size -= len(part)
        except Exception as error:
            if not is_damage(error):
                raise
            raised.append(error)
        if raised and not parts:
            raise raised[0]
        return b"".join(parts)

    return read


def too_long(record: Record, limit: int) -> DataError:
    return record.bad(f"expected a record of at most {limit:,} bytes (dataset.max_record_bytes), found more")


def _damaged(path: str, end: int, error: Exception) -> DataError:
    return DataError(f"{path} (byte {end} of its content): expected a whole compressed file, found damage: {error}")


def _place(path: str, offset: int) -> str:
    """The file, and the line in which a record starts, found by reading the file up to it."""
    number, left = 1, offset
    with opened(path) as file:
        while left and (chunk := file.read(min(_CHUNK, left))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}:{number}"
